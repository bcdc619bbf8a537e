"""Loss weights other than the ELBO's, and one loss and one gradient at every split of the global batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dlm_kernels.philox import Purpose
from dlm_kernels.reference import cross_entropy, linear_cross_entropy
from megatron_dlm.config.tree import DiffusionConfig
from megatron_dlm.diffusion.objective import Batch, MaskedDiffusion
from megatron_dlm.diffusion.weighting import CART_Q, cart_weights
from megatron_dlm.shipped.sampler_plan import Vocabulary

BATCH, SEQ, HIDDEN, MASK = 8, 24, 5, 40
OPTIONS: list[dict[str, Any]] = [
    {},
    {"masking": "bernoulli"},
    {"weighting": "none"},
    {"weighting": "none", "masking": "bernoulli"},
    {"weighting": "cart"},
    {"complementary": True},
    {"complementary": True, "weighting": "none", "schedule": "cosine"},
    {"complementary": True, "weighting": "cart", "noise_levels": "iid"},
]
SPLITS = [[8], [4, 4], [2, 2, 2, 2], [1] * 8, [5, 3], [1, 6, 1]]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(map(str, o.values())) or "default")


def batch(options: dict[str, Any], ids: np.ndarray, purpose: Purpose = Purpose.TRAIN) -> Batch:
    """The samples `ids` of step 3, or of the validation set; a third of the sequences are cut."""
    settings = DiffusionConfig(**{"random_length_probability": 0.3, **options})
    objective = MaskedDiffusion(settings, seed=5, vocabulary=Vocabulary(MASK, 39), sequence_length=SEQ)
    sequences = ids // 2 if settings.complementary and purpose is Purpose.TRAIN else ids
    tokens = torch.from_numpy((sequences[:, None] * 31 + np.arange(SEQ) * 7) % 39)
    return objective.batch(tokens, ids, step=3, global_batch_size=BATCH, purpose=purpose)


def train_ids() -> np.ndarray:
    return 3 * BATCH + np.arange(BATCH)


def explicit_cart(visible: Tensor) -> Tensor:
    """[batch, seq] fp64 with the whole [seq, seq] matrix."""
    distance = (torch.arange(visible.shape[1])[:, None] - torch.arange(visible.shape[1])).abs().double()
    matrix = torch.where(distance > 0, CART_Q / 2 * (1 - CART_Q) ** (distance - 1), 0.0)
    return visible.double() @ matrix


@pytest.mark.parametrize("seq", [1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_cart_is_the_product_with_the_explicit_matrix(seq: int, share: float) -> None:
    visible = torch.rand(3, seq, generator=torch.Generator().manual_seed(seq)) < share
    ours = cart_weights(visible)
    assert ours.dtype == torch.float64 and ours.shape == (3, seq)
    torch.testing.assert_close(ours, explicit_cart(visible), rtol=0, atol=1e-9)


def test_cart_sees_eligible_and_unmasked_tokens_only() -> None:
    result = batch({"weighting": "cart"}, train_ids())
    assert result.lengths is not None and result.rows is not None
    eligible = torch.arange(SEQ) < result.lengths[:, None]
    masked = result.inputs == MASK
    expected = explicit_cart(eligible & ~masked)[masked]
    torch.testing.assert_close(result.weights, expected.float(), rtol=1e-6, atol=1e-9)
    assert int(result.divisor) == result.num_eligible == int(eligible.sum())


def test_no_weighting_is_the_mean_over_the_masked_tokens() -> None:
    for options in ({"weighting": "none"}, {"weighting": "none", "masking": "bernoulli"}):
        result = batch(options, train_ids())
        masked = int((result.inputs == MASK).sum())
        assert torch.equal(result.weights, torch.ones(masked)) and int(result.divisor) == masked
        assert result.num_eligible > masked, "the mask ratio is still of the eligible tokens"
        assert result.divisor.dtype == torch.int64 and result.divisor.shape == ()


@every_option
def test_validation_has_the_weights_of_the_elbo_and_no_complements(options: dict[str, Any]) -> None:
    ids = np.arange(5)  # odd, which complementary training refuses
    here = batch(options, ids[:3], Purpose.VALIDATION)
    kept = {key: value for key, value in options.items() if key not in ("weighting", "complementary")}
    plain = batch(kept, ids[:3], Purpose.VALIDATION)
    assert torch.equal(here.inputs, plain.inputs) and torch.equal(here.weights, plain.weights)
    assert int(here.divisor) == 3 * SEQ


def loss_and_gradient(options: dict[str, Any], split: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Global loss, and its gradients: of the hidden states [batch * seq, hidden], of the head [vocab, hidden]; fp64."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(BATCH * SEQ, HIDDEN, dtype=torch.float64, generator=generator).requires_grad_()
    head = torch.randn(MASK, HIDDEN, dtype=torch.float64, generator=generator).requires_grad_()
    total, divisor, start = torch.zeros((), dtype=torch.float64), 0, 0
    for size in split:
        part = batch(options, train_ids()[start : start + size])
        own = hidden[start * SEQ : (start + size) * SEQ]
        loss_sum, _, _ = linear_cross_entropy(own, head, part.rows, part.targets, part.weights)
        total, divisor, start = total + loss_sum, divisor + int(part.divisor), start + size
    (total / divisor).backward()
    assert hidden.grad is not None and head.grad is not None
    return total.detach() / divisor, hidden.grad, head.grad


@every_option
def test_loss_and_gradient_do_not_depend_on_the_split(options: dict[str, Any]) -> None:
    whole = loss_and_gradient(options, [BATCH])
    assert whole[0] > 0 and whole[1].norm() > 0
    for split in SPLITS:
        for mine, expected in zip(loss_and_gradient(options, split), whole, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)


@every_option
def test_gradient_is_exactly_zero_at_unmasked_positions(options: dict[str, Any]) -> None:
    result = batch(options, train_ids())
    masked = (result.inputs == MASK).view(-1)
    _, d_hidden, _ = loss_and_gradient(options, [BATCH])
    assert (d_hidden[~masked] == 0).all()
    weighted = torch.zeros(BATCH * SEQ).index_add_(0, result.rows, result.weights) != 0
    assert (d_hidden[weighted] != 0).any(1).all() and weighted.sum() > 0.4 * masked.sum()

    logits = torch.randn(BATCH * SEQ, MASK, dtype=torch.float64).requires_grad_()
    cross_entropy(logits[result.rows], result.targets, result.weights)[0].backward()
    assert logits.grad is not None and (logits.grad[~weighted] == 0).all()
    assert (logits.grad[weighted] != 0).any(1).all()
