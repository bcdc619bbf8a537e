"""Masking: which tokens, how many, with which weight, and the compacted list of positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dlm_kernels import noise_levels, reference
from dlm_kernels.philox import Purpose, Stream, random_bits
from dlm_kernels.reference import mask_tokens
from dlm_kernels.types import MaskedTokens, NoiseDraw

MASK_ID = 1000
DRAW = NoiseDraw("stratified_antithetic", step=2, global_batch_size=8)


def mask(tokens: Tensor, sample_ids: Any, **options: Any) -> MaskedTokens:
    return mask_tokens(tokens, sample_ids, seed=11, mask_token_id=MASK_ID, **options)


def example(batch: int = 8, seq: int = 37) -> tuple[Tensor, np.ndarray]:
    """Clean tokens [batch, seq], none of them [MASK], and the sample ids of step 2."""
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 1000, (batch, seq)))
    return tokens, 16 + np.arange(batch)


def level_tensors(levels: list[int], weight: float = 1.0) -> dict[str, Tensor]:
    return {"levels": torch.tensor(levels), "weights": torch.full((len(levels),), weight)}


def smallest_keys(sample_id: int, eligible: list[int], count: int, purpose: Purpose = Purpose.TRAIN) -> set[int]:
    """The definition, token by token: the `count` eligible positions with the smallest keys."""
    keys = {i: random_bits(11, Stream.TOKEN_KEY, sample_id * 2**22 + i, 0, purpose) for i in eligible}
    return set(sorted(eligible, key=lambda i: (keys[i], i))[:count])


@pytest.mark.parametrize("purpose", list(Purpose))
def test_exact_count_masks_the_smallest_keys(purpose: Purpose) -> None:
    tokens, ids = example()
    eligible = torch.from_numpy(np.random.default_rng(1).random((8, 37)) < 0.7)
    eligible[3] = False
    counts = [5, 0, 1, 0, int(eligible[4].sum()), 2, 3, 20]
    result = mask(tokens, ids, **level_tensors(counts), eligible=eligible, purpose=purpose)
    for row in range(8):
        expected = smallest_keys(int(ids[row]), eligible[row].nonzero().view(-1).tolist(), counts[row], purpose)
        assert set((result.tokens[row] == MASK_ID).nonzero().view(-1).tolist()) == expected


def test_outputs_describe_the_masked_positions() -> None:
    tokens, ids = example()
    before = tokens.clone()
    result = mask(tokens, ids, draw=DRAW)
    masked = result.tokens == MASK_ID
    assert torch.equal(tokens, before)
    assert torch.equal(result.tokens[~masked], tokens[~masked])
    assert torch.equal(result.rows.long(), masked.view(-1).nonzero().view(-1))
    assert torch.equal(result.targets, tokens[masked])
    assert not result.overflow
    dtypes = (result.tokens.dtype, result.rows.dtype, result.targets.dtype, result.weights.dtype)
    assert dtypes == (torch.int64, torch.int32, torch.int64, torch.float32)


def test_drawn_counts_and_weights_sum_to_the_eligible_tokens() -> None:
    tokens, ids = example()
    eligible = torch.arange(37) < torch.tensor([37, 1, 0, 12, 36, 37, 5, 2])[:, None]
    result = mask(tokens, ids, draw=DRAW, eligible=eligible)
    row = result.rows.long() // 37
    sums = torch.zeros(8).index_add_(0, row, result.weights)
    torch.testing.assert_close(sums, eligible.sum(1).float(), rtol=1e-6, atol=0)
    u_levels = noise_levels.draw(ids, "stratified_antithetic", seed=11, step=2, global_batch_size=8)
    counts = noise_levels.linear_count(u_levels, eligible.sum(1).numpy())
    np.testing.assert_array_equal(np.bincount(row.numpy(), minlength=8), counts)
    assert eligible[result.tokens == MASK_ID].all()


def test_bernoulli_compares_keys_with_the_threshold() -> None:
    tokens, ids = example()
    thresholds = [0, 1, 2**30, 2**31, 3 * 2**30, 2**32 - 1, 2**32, 2**32]
    eligible = torch.ones(8, 37, dtype=torch.bool)
    eligible[7, 5:] = False
    result = mask(tokens, ids, masking="bernoulli", **level_tensors(thresholds, 2.5), eligible=eligible)
    masked = result.tokens == MASK_ID
    for row in range(7):
        keys = random_bits(11, Stream.TOKEN_KEY, int(ids[row]) * 2**22 + np.arange(37))
        np.testing.assert_array_equal(masked[row].numpy(), keys < thresholds[row])
    assert masked[6].all() and masked[7].sum() == 5
    assert (result.weights == 2.5).all()


def test_bernoulli_draw_weights_with_the_inverse_probability() -> None:
    tokens, ids = example()
    result = mask(tokens, ids, masking="bernoulli", draw=DRAW)
    u_levels = noise_levels.draw(ids, "stratified_antithetic", seed=11, step=2, global_batch_size=8)
    p = (1 - DRAW.eps) * (u_levels + 0.5) / 2**32 + DRAW.eps
    np.testing.assert_allclose(result.weights.numpy(), 1 / p[result.rows.numpy() // 37], rtol=3e-7)


def test_bernoulli_loss_is_that_of_llada_and_smdm() -> None:
    """In fp64: sum over the masked of cross-entropy / p, divided by batch * seq, at p = (1 - eps) t + eps."""
    tokens, ids = example()
    result = mask(tokens, ids, masking="bernoulli", draw=DRAW)
    logits = torch.randn(8, 37, 1001, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = (noise_levels.draw(ids, DRAW.mode, seed=11, step=2, global_batch_size=8) + 0.5) / 2**32
    p = torch.from_numpy((1 - DRAW.eps) * t + DRAW.eps)[:, None].expand(8, 37)
    masked = result.tokens == MASK_ID
    theirs = torch.nn.functional.cross_entropy(logits[masked], tokens[masked], reduction="none") / p[masked]
    ours, _, _ = reference.cross_entropy(logits.flatten(0, 1)[result.rows], result.targets, result.weights)
    torch.testing.assert_close(ours / (8 * 37), theirs.sum() / (8 * 37), rtol=3e-7, atol=0)


def test_masked_positions_are_uniform() -> None:
    """5 of 16 positions in 4000 sequences: each position, and each pair of neighbours, within 5 sigma."""
    tokens = torch.zeros(4000, 16, dtype=torch.int64)
    masked = mask(tokens, np.arange(4000), **level_tensors([5] * 4000)).tokens == MASK_ID
    assert (masked.sum(1) == 5).all()
    for counts, p in [(masked.sum(0), 5 / 16), ((masked[:, 1:] & masked[:, :-1]).sum(0), 5 / 16 * 4 / 15)]:
        sigmas = (counts.double() - 4000 * p) / (4000 * p * (1 - p)) ** 0.5
        assert sigmas.abs().max() < 5


def test_ties_are_broken_by_position_and_the_threshold_is_exclusive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "random_bits", lambda seed, stream, counter, *_: counter % 2)
    result = mask(torch.zeros(1, 10, dtype=torch.int64), np.array([4]), **level_tensors([7]))
    assert result.rows.tolist() == [0, 1, 2, 3, 4, 6, 8]  # all even positions, then the first odd ones
    result = mask(torch.zeros(1, 10, dtype=torch.int64), np.array([4]), masking="bernoulli", **level_tensors([1]))
    assert result.rows.tolist() == [0, 2, 4, 6, 8]  # below the threshold, not at it


@pytest.mark.parametrize("masking", ["exact_count", "bernoulli"])
def test_any_split_of_the_batch_gives_the_same_masks(masking: str) -> None:
    tokens, ids = example()
    eligible = torch.arange(37) < torch.tensor([37, 30, 37, 12, 36, 37, 5, 2])[:, None]
    whole = mask(tokens, ids, masking=masking, draw=DRAW, eligible=eligible)
    row = whole.rows.long() // 37
    for part in (torch.tensor([0, 1, 2, 3]), torch.tensor([7]), torch.tensor([6, 2, 5])):
        for sample_ids in (ids[part.numpy()], torch.from_numpy(ids)[part]):
            result = mask(tokens[part], sample_ids, masking=masking, draw=DRAW, eligible=eligible[part])
            assert torch.equal(result.tokens, whole.tokens[part])
            assert torch.equal(result.targets, torch.cat([whole.targets[row == i] for i in part]))
            assert torch.equal(result.weights, torch.cat([whole.weights[row == i] for i in part]))


def test_masks_change_with_sample_and_seed() -> None:
    tokens = torch.zeros(2, 300, dtype=torch.int64)
    first = mask(tokens, np.array([0, 1]), **level_tensors([150, 150])).tokens
    other = mask_tokens(tokens, np.array([0, 1]), seed=12, mask_token_id=MASK_ID, **level_tensors([150, 150])).tokens
    for a, b in [(first[0], first[1]), (first[0], other[0])]:
        assert 100 < (a == b).sum() < 200


def test_capacity_pads_the_list() -> None:
    tokens, ids = example()
    exact = mask(tokens, ids, draw=DRAW)
    count = exact.rows.numel()
    padded = mask(tokens, ids, draw=DRAW, capacity=256)
    assert torch.equal(padded.tokens, exact.tokens) and not padded.overflow
    assert torch.equal(padded.rows, torch.nn.functional.pad(exact.rows, (0, 256 - count), value=8 * 37))
    assert torch.equal(padded.targets, torch.nn.functional.pad(exact.targets, (0, 256 - count)))
    assert torch.equal(padded.weights, torch.nn.functional.pad(exact.weights, (0, 256 - count)))
    full = mask(tokens, ids, draw=DRAW, capacity=count)
    assert torch.equal(full.rows, exact.rows) and not full.overflow


def test_capacity_overflow_is_flagged_and_keeps_the_first_rows() -> None:
    tokens, ids = example()
    exact = mask(tokens, ids, draw=DRAW)
    for missing in (1, 20):
        short = mask(tokens, ids, draw=DRAW, capacity=exact.rows.numel() - missing)
        assert short.overflow
        assert torch.equal(short.rows, exact.rows[:-missing]) and torch.equal(short.targets, exact.targets[:-missing])


@pytest.mark.parametrize("masking", ["exact_count", "bernoulli"])
def test_complement_masks_the_eligible_tokens_that_would_have_stayed(masking: str) -> None:
    tokens, ids = example()
    eligible = torch.from_numpy(np.random.default_rng(1).random((8, 37)) < 0.7)
    # From none to all of the eligible tokens, or to a probability of 1.
    levels = torch.arange(8) * eligible.sum(1) // 7 if masking == "exact_count" else torch.arange(8) * 2**32 // 7
    given: dict[str, Any] = {"levels": levels, "weights": torch.arange(8) + 1.0}
    complement = torch.tensor([True, True, False, True, False, True, True, False])
    plain = mask(tokens, ids, masking=masking, eligible=eligible, **given)
    result = mask(tokens, ids, masking=masking, eligible=eligible, complement=complement, **given)
    was, now = plain.tokens == MASK_ID, result.tokens == MASK_ID
    assert torch.equal(now, torch.where(complement[:, None], eligible & ~was, was))
    assert torch.equal(result.rows.long(), now.view(-1).nonzero().view(-1))
    assert torch.equal(result.targets, tokens[now])
    assert torch.equal(result.weights, (torch.arange(8) + 1.0)[result.rows.long() // 37])


def test_wrong_arguments_are_refused() -> None:
    tokens, ids = example()
    given = level_tensors([1] * 8)
    for options in ({}, {"draw": DRAW, **given}, {"levels": given["levels"]}, {"weights": given["weights"]}):
        with pytest.raises(ValueError, match="either draw, or levels and weights"):
            mask(tokens, ids, **options)
    with pytest.raises(ValueError, match="levels and weights where it is given a complement"):
        mask(tokens, ids, draw=DRAW, complement=torch.zeros(8, dtype=torch.bool))
    with pytest.raises(ValueError, match="too long"):
        mask(torch.zeros(1, 1, dtype=torch.int64).expand(1, 2**22), ids[:1], **level_tensors([1]))
