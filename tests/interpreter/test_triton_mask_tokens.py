"""`mask_tokens` as kernels against the plain-torch twin, bit for bit, in the interpreter of Triton."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from dlm_kernels import reference, triton_mask_tokens
from dlm_kernels.philox import Purpose, Stream, random_bits
from dlm_kernels.types import MaskedTokens, Masking, NoiseDraw, NoiseMode

MASK_ID = 1000
MASKINGS = get_args(Masking)


def example(batch: int, seq: int, seed: int = 0) -> Tensor:
    """Clean tokens [batch, seq], none of them [MASK]."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, MASK_ID, (batch, seq)))


def step_2(batch: int, global_batch_size: int = 8, mode: NoiseMode = "antithetic") -> dict[str, Any]:
    """The first sequences of step 2, and the draw of their levels."""
    ids = 2 * global_batch_size + np.arange(batch)
    return {"sample_ids": ids, "draw": NoiseDraw(mode, step=2, global_batch_size=global_batch_size)}


def given(masking: Masking, batch: int, seq: int, seed: int = 0) -> dict[str, Any]:
    """Levels from none to all, and weights."""
    rng = np.random.default_rng(seed)
    top = seq if masking == "exact_count" else 2**32
    levels = rng.integers(0, top + 1, batch)
    levels[0] = top
    levels[-1] = 0 if batch > 1 else top // 2
    return {"levels": torch.from_numpy(levels), "weights": torch.from_numpy(rng.random(batch)).float()}


def eligibility(kind: str, batch: int, seq: int) -> Tensor | None:
    rng = np.random.default_rng(3)
    if kind == "everything":
        return None
    if kind == "lengths":
        return torch.arange(seq) < torch.from_numpy(rng.integers(1, seq + 1, batch))[:, None]
    if kind == "prompts":
        return torch.arange(seq) >= torch.from_numpy(rng.integers(0, seq, batch))[:, None]
    eligible = torch.from_numpy(rng.random((batch, seq)) < 0.6)
    eligible[kind == "none" or [1, batch - 1]] = False
    return eligible


def same(result: MaskedTokens, expected: MaskedTokens) -> None:
    for field in fields(MaskedTokens):
        ours, theirs = getattr(result, field.name), getattr(expected, field.name)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), field.name


def check(tokens: Tensor, sample_ids: Any, seed: int = 11, **options: Any) -> MaskedTokens:
    """Run both; every bit must be the same, and the arguments are left alone."""
    before = tokens.clone()
    options = {"seed": seed, "mask_token_id": MASK_ID, **options}
    result = triton_mask_tokens.mask_tokens(tokens, sample_ids, **options)
    same(result, reference.mask_tokens(tokens, sample_ids, **options))
    assert torch.equal(tokens, before)
    return result


def shorten_programs(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Longer rows take the form for long ones, and there are several blocks per row."""
    for name in ("MAX_ROW", "SELECT_BLOCK", "BLOCK"):
        monkeypatch.setattr(triton_mask_tokens, name, block)


@pytest.mark.parametrize("global_batch_size", [4, 5])
@pytest.mark.parametrize("mode", get_args(NoiseMode))
@pytest.mark.parametrize("masking", MASKINGS)
def test_drawn_levels(masking: Masking, mode: NoiseMode, global_batch_size: int) -> None:
    check(example(4, 37), **step_2(4, global_batch_size, mode), masking=masking)


@pytest.mark.parametrize("seq", [1, 7, 128, 1000])
@pytest.mark.parametrize("masking", MASKINGS)
def test_given_levels(masking: Masking, seq: int) -> None:
    for batch in (1, 2, 5):
        check(example(batch, seq), 40 + np.arange(batch), masking=masking, **given(masking, batch, seq))


@pytest.mark.parametrize("kind", ["lengths", "prompts", "some", "none"])
@pytest.mark.parametrize("masking", MASKINGS)
def test_eligible_tokens(masking: Masking, kind: str) -> None:
    eligible = eligibility(kind, 4, 50)
    check(example(4, 50), **step_2(4), masking=masking, eligible=eligible)
    # Some rows have fewer eligible tokens than are to be masked.
    check(example(4, 50), np.arange(4), masking=masking, eligible=eligible, **given(masking, 4, 50))


@pytest.mark.parametrize("kind", ["everything", "some"])
@pytest.mark.parametrize("masking", MASKINGS)
def test_several_programs_per_row(masking: Masking, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_programs(monkeypatch, 32)
    eligible = eligibility(kind, 3, 70)
    check(example(3, 70), **step_2(3), masking=masking, eligible=eligible)
    options = {"masking": masking, "eligible": eligible, **given(masking, 3, 70)}
    check(example(3, 70), np.arange(3), **options, capacity=100)
    check(example(3, 70), np.arange(3), **options, complement=torch.tensor([True, False, True]))


@pytest.mark.parametrize("masking", MASKINGS)
def test_a_row_longer_than_the_limit(masking: Masking) -> None:
    seq = triton_mask_tokens.MAX_ROW + 300
    eligible = torch.arange(seq) < torch.tensor([seq, 5000])[:, None]
    options = given(masking, 2, seq)
    options["levels"][1] = options["levels"][0] // 3
    check(example(2, seq), np.array([7, 8]), masking=masking, eligible=eligible, **options)


def test_one_program_holds_a_long_row() -> None:
    options = {"levels": torch.tensor([3000]), "weights": torch.tensor([2.0])}
    check(example(1, triton_mask_tokens.MAX_ROW), np.array([7]), **options)


@pytest.mark.parametrize("capacity", [0, 100, 105, 128, 700])
@pytest.mark.parametrize("masking", MASKINGS)
def test_capacity(masking: Masking, capacity: int) -> None:
    levels = torch.tensor([10, 40, 0, 55]) * (1 if masking == "exact_count" else 2**25)
    options = {"masking": masking, "levels": levels, "weights": torch.arange(4) + 0.5}
    result = check(example(4, 60), np.arange(4), **options, capacity=capacity)
    if masking == "exact_count":
        assert result.overflow == (capacity < 105)


@pytest.mark.parametrize("masking", MASKINGS)
def test_complement(masking: Masking) -> None:
    """The rows of a pair have the same sample id, tokens and level."""
    tokens, complement = example(3, 50).repeat_interleave(2, 0), torch.arange(6) % 2 == 1
    ids = np.arange(12, 18) >> 1
    options: dict[str, Any] = {name: x.repeat_interleave(2) for name, x in given(masking, 3, 50).items()}
    options |= {"masking": masking, "complement": complement}
    result = check(tokens, ids, **options)
    assert ((result.tokens == MASK_ID).view(3, 2, 50).sum(1) == 1).all()
    eligible = eligibility("lengths", 3, 50)
    assert eligible is not None
    check(tokens, ids, **options, eligible=eligible.repeat_interleave(2, 0), capacity=128)


@pytest.mark.parametrize("first", [0, 2**31 + 3, 2**40])
@pytest.mark.parametrize("masking", MASKINGS)
def test_sample_ids(masking: Masking, first: int) -> None:
    options = {"masking": masking, **given(masking, 3, 30)}
    consecutive = first + np.arange(3)
    every_other = torch.from_numpy(first + np.arange(6))[::2]
    for ids in (consecutive, torch.from_numpy(consecutive), consecutive[[2, 0, 1]], every_other):
        check(example(3, 30), ids, **options)


@pytest.mark.parametrize("masking", MASKINGS)
def test_drawn_levels_of_other_than_consecutive_ids(masking: Masking) -> None:
    options = step_2(8)
    ids = options.pop("sample_ids")[[6, 1, 4]]
    check(example(3, 30), torch.from_numpy(ids), **options, masking=masking)


@pytest.mark.parametrize("purpose", list(Purpose))
@pytest.mark.parametrize("seed", [0, 2**31, 2**64 - 1])
def test_seeds_and_purposes(seed: int, purpose: Purpose) -> None:
    for masking in MASKINGS:
        check(example(2, 40), **step_2(2), seed=seed, masking=masking, purpose=purpose)


@pytest.mark.parametrize("masking", MASKINGS)
def test_any_split_of_the_batch_gives_the_same_rows(masking: Masking) -> None:
    tokens, options = example(6, 33), step_2(6)
    ids, draw = options["sample_ids"], options["draw"]
    common = {"seed": 11, "mask_token_id": MASK_ID, "masking": masking, "draw": draw}
    eligible = eligibility("lengths", 6, 33)
    assert eligible is not None
    whole = triton_mask_tokens.mask_tokens(tokens, ids, eligible=eligible, **common)
    row = whole.rows // 33
    for part in (torch.arange(4), torch.tensor([5]), torch.tensor([4, 1])):
        result = triton_mask_tokens.mask_tokens(tokens[part], ids[part.numpy()], eligible=eligible[part], **common)
        assert torch.equal(result.tokens, whole.tokens[part])
        for name in ("targets", "weights"):
            expected = torch.cat([getattr(whole, name)[row == i] for i in part])
            assert torch.equal(getattr(result, name), expected)


@pytest.mark.parametrize("form", ["one program", "blocks"])
def test_equal_keys_at_the_threshold(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "blocks":
        shorten_programs(monkeypatch, 256)
    # Two of the keys of this sequence are equal, the 936th and 937th smallest.
    ids, positions = np.array([3734]), [255, 916]
    keys = random_bits(11, Stream.TOKEN_KEY, ids * 2**22 + np.arange(1000))
    assert keys[positions[0]] == keys[positions[1]] and (keys < keys[positions[0]]).sum() == 936
    tokens, weights = example(1, 1000), torch.ones(1)
    for count, expected in [(936, [False, False]), (937, [True, False]), (938, [True, True])]:
        result = check(tokens, ids, levels=torch.tensor([count]), weights=weights)
        assert (result.tokens[0, positions] == MASK_ID).tolist() == expected
    eligible = torch.ones(1, 1000, dtype=torch.bool)
    eligible[0, 255] = False
    result = check(tokens, ids, levels=torch.tensor([937]), weights=weights, eligible=eligible)
    assert result.tokens[0, 916] == MASK_ID


def test_other_than_contiguous_tensors() -> None:
    longer = example(3, 41)
    options = {name: x[::2] for name, x in given("exact_count", 6, 40).items()}
    eligible = (torch.arange(40) < 30).expand(3, 40)
    check(longer[:, :-1], np.arange(3), **options, eligible=eligible)
    check(longer[:, 1:], np.arange(3), **options, complement=torch.arange(6)[::2] > 2)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_tokens(shape: tuple[int, int]) -> None:
    options = {"levels": torch.zeros(shape[0], dtype=torch.int64), "weights": torch.ones(shape[0])}
    tokens = torch.zeros(shape, dtype=torch.int64)
    for capacity in (None, 3):
        result = triton_mask_tokens.mask_tokens(
            tokens, np.arange(shape[0]), seed=1, mask_token_id=MASK_ID, capacity=capacity, **options
        )
        assert result.tokens.shape == shape and not result.overflow
        assert result.rows.tolist() == result.targets.tolist() == result.weights.tolist() == [0] * (capacity or 0)


def test_wrong_arguments_are_refused() -> None:
    tokens, options = example(2, 5), step_2(2)
    levels = {"levels": torch.tensor([1, 1]), "weights": torch.ones(2)}
    draw, ids = options["draw"], options["sample_ids"]

    def mask(tokens: Tensor, ids: Any, **options: Any) -> None:
        triton_mask_tokens.mask_tokens(tokens, ids, seed=1, mask_token_id=MASK_ID, **options)

    for wrong in ({}, {"draw": draw, **levels}, {"levels": levels["levels"]}, {"weights": levels["weights"]}):
        with pytest.raises(ValueError, match="either draw, or levels and weights"):
            mask(tokens, ids, **wrong)
    with pytest.raises(ValueError, match="levels and weights where it is given a complement"):
        mask(tokens, ids, draw=draw, complement=torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="too long"):
        mask(torch.zeros(1, 1, dtype=torch.int64).expand(1, 2**22), ids[:1], **levels)
    with pytest.raises(ValueError, match="too many"):
        mask(torch.zeros(1, 1, dtype=torch.int64).expand(2**10, 2**21), ids, **levels)
    with pytest.raises(ValueError, match="too many"):
        mask(tokens, ids, capacity=2**31, **levels)
    with pytest.raises(ValueError, match="not all in the global batch of step 2"):
        mask(tokens, ids + 7, draw=draw)
    with pytest.raises(ValueError, match="unknown noise level mode"):
        mask(tokens, ids, draw=NoiseDraw("other", 2, 8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eps must be"):
        mask(tokens, ids, masking="bernoulli", draw=NoiseDraw("iid", 2, 8, eps=0.25))
