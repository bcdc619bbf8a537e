"""What other systems compute, typed again from their code as a few lines each, against ours on the same masks (fp64).

Where a system is not an estimator of the ELBO, or divides by something else, the test has the difference.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlm_kernels import noise_levels
from dlm_kernels.reference import cross_entropy, mask_tokens
from megatron_dlm.config.tree import DiffusionConfig
from megatron_dlm.diffusion.objective import MaskedDiffusion
from megatron_dlm.diffusion.schedule import elbo_weight, levels_and_weights, mask_probability
from megatron_dlm.diffusion.weighting import cart_weights
from megatron_dlm.shipped.sampler_plan import Vocabulary
from tests.enumeration import SEQ as TINY_SEQ
from tests.enumeration import TinyPredictor

BATCH, SEQ, VOCAB, MASK, SEED = 6, 48, 31, 30, 5
EPS = 1e-3
TIMES = np.linspace(1e-3, 1 - 1e-3, 200)
# Our weights are fp32, our mask probabilities multiples of 2**-32.
CLOSE = {"rtol": 3e-7, "atol": 0.0}


def draw(length: int = SEQ, **options: Any) -> tuple[Tensor, Tensor, float, np.ndarray]:
    """Our masks [batch, seq] and clean tokens of step 0, our loss, and the levels u [batch]; all rows cut to length."""
    generator = torch.Generator().manual_seed(3)
    clean = torch.randint(0, MASK, (BATCH, SEQ), generator=generator)
    settings = DiffusionConfig(random_length_probability=0.0, **options)
    objective = MaskedDiffusion(settings, seed=SEED, vocabulary=Vocabulary(MASK, 29), sequence_length=SEQ)
    if length < SEQ:
        objective.lengths = lambda *_: torch.full((BATCH,), length)  # type: ignore[method-assign]
    ids = np.arange(BATCH)
    batch = objective.batch(clean, ids, step=0, global_batch_size=BATCH)
    total, _, _ = cross_entropy(logits().flatten(0, 1)[batch.rows], batch.targets, batch.weights)
    u_levels = noise_levels.draw(ids, settings.noise_levels, seed=SEED, step=0, global_batch_size=BATCH)
    return batch.inputs == MASK, clean, float(total / batch.divisor), (u_levels + 0.5) / 2**32


def logits() -> Tensor:
    """[batch, seq, vocab] fp64; [MASK] is impossible, as in MDLM."""
    values = torch.randn(BATCH, SEQ, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    values[..., MASK] = -math.inf
    return values


def token_losses(clean: Tensor) -> Tensor:
    """Cross-entropy [batch, seq] of the clean tokens."""
    return F.cross_entropy(logits().transpose(1, 2), clean, reduction="none")


@pytest.mark.parametrize("length", [SEQ, 17], ids=["whole", "random length of the whole batch"])
def test_llada_and_smdm(length: int) -> None:
    """Their random length cuts the tensor; ours makes the rest of it not eligible."""
    masked, clean, ours, u = draw(length, masking="bernoulli", noise_levels="iid")
    assert not masked[:, length:].any()
    masked, losses = masked[:, :length], token_losses(clean)[:, :length]
    p = torch.from_numpy((1 - EPS) * u + EPS)[:, None].expand(BATCH, length)
    theirs = (losses[masked] / p[masked]).sum() / (BATCH * length)
    np.testing.assert_allclose(ours, float(theirs), **CLOSE)


def test_diffusion_beats_autoregressive() -> None:
    """Their released code: p with its floor in the denominator, over all tokens of the batch."""
    masked, clean, ours, u = draw(masking="bernoulli", noise_levels="iid")
    p_mask = EPS + (1 - EPS) * torch.from_numpy(u)
    theirs = (token_losses(clean) * masked / p_mask[:, None]).sum(1).mean() / SEQ
    np.testing.assert_allclose(ours, float(theirs), **CLOSE)


def test_llada_fine_tuning_divides_each_row_by_its_answer() -> None:
    """With answers of one length it is our loss; else each row has the same weight, where we weigh each token so."""
    clean = draw()[1]
    entropy, ids = token_losses(clean), np.arange(BATCH)
    for answers in (torch.full((BATCH,), 20), torch.tensor([20, 5, 48, 33, 11, 40])):
        eligible = torch.arange(SEQ) >= (SEQ - answers)[:, None]
        u_levels = noise_levels.draw(ids, "iid", seed=SEED, step=0, global_batch_size=BATCH)
        settings = DiffusionConfig(masking="bernoulli")
        thresholds, weights = levels_and_weights(settings, u_levels, answers.numpy())
        result = mask_tokens(
            clean,
            ids,
            seed=SEED,
            mask_token_id=MASK,
            masking="bernoulli",
            levels=torch.from_numpy(thresholds),
            weights=torch.from_numpy(weights).float(),
            eligible=eligible,
        )
        masked = result.tokens == MASK
        assert not (masked & ~eligible).any(), "the prompt is never noised"
        p = torch.from_numpy((1 - EPS) * (u_levels + 0.5) / 2**32 + EPS)[:, None].expand(BATCH, SEQ)
        answer_lengths = answers[:, None].expand(BATCH, SEQ)
        theirs = (entropy[masked] / p[masked] / answer_lengths[masked]).sum() / BATCH
        rows = result.rows.long()
        ours = torch.zeros(BATCH, dtype=torch.float64)
        ours.index_add_(0, rows // SEQ, entropy.view(-1)[rows] * result.weights)
        np.testing.assert_allclose(float((ours / answers).mean()), float(theirs), **CLOSE)
        same = float(ours.sum() / answers.sum()) == pytest.approx(float(theirs), rel=3e-7)
        assert same == (len(answers.unique()) == 1)


def test_megadlms_weights_are_ours_and_its_empty_masks_bias_it() -> None:
    """t ~ U(0, 1), Bernoulli(t), one token where none was masked, L / k: one masked token is twice too likely."""
    masked, clean, ours, _ = draw(noise_levels="iid")
    k = masked.sum(1, keepdim=True).expand(BATCH, SEQ)
    theirs = (token_losses(clean)[masked] * (SEQ / k[masked])).sum() / (BATCH * SEQ)
    np.testing.assert_allclose(ours, float(theirs), **CLOSE)

    predictor, t = TinyPredictor(), (np.arange(4000) + 0.5) / 4000
    by_count = predictor.mean_by_count()
    count_share = [(math.comb(TINY_SEQ, k) * t**k * (1 - t) ** (TINY_SEQ - k)).mean() for k in range(TINY_SEQ + 1)]
    expected = count_share[0] * TINY_SEQ * by_count[1]  # k = 0 -> one random token
    expected += sum(count_share[k] * TINY_SEQ / k * by_count[k] for k in range(1, TINY_SEQ + 1))
    exact = predictor.negative_elbo()
    bias = (TINY_SEQ * by_count[1] - exact) / (TINY_SEQ + 1)
    assert expected - exact == pytest.approx(bias, rel=1e-5) and abs(bias) > 0.02 * exact

    def bias_per_token(length: int) -> float:
        """Of a model whose loss at k masks is 6 k / L: it comes out too low by about 3 / L."""
        k = np.arange(1, length + 1)
        losses, share = 6 * k / length, np.full(length, 1 / (length + 1))
        share[0] *= 2
        return float((share * losses).sum() - losses.mean())

    for length in (64, 256, 1024):
        assert bias_per_token(length) * length == pytest.approx(-3, rel=0.05)


def test_mdlm_is_llada_times_one_minus_eps_and_its_antithetic_times_are_our_strata() -> None:
    masked, clean, ours, u = draw(masking="bernoulli", noise_levels="stratified")
    assert sorted((u * BATCH).astype(int).tolist()) == list(range(BATCH))  # (U_i / n + i / n) % 1, in another order
    t = torch.from_numpy(((1 - EPS) * u + EPS) / (1 - EPS))  # their time with the mask probability that was ours
    sigma = -torch.log1p(-(1 - EPS) * t)
    rate = (1 - EPS) / (1 - (1 - EPS) * t)
    np.testing.assert_allclose(-torch.expm1(-sigma), (1 - EPS) * u + EPS, rtol=1e-12)
    weight = rate / torch.expm1(sigma)
    np.testing.assert_allclose(weight, 1 / t, rtol=1e-9)
    theirs = (token_losses(clean) * masked * weight[:, None]).sum() / (BATCH * SEQ)
    np.testing.assert_allclose(float(theirs), (1 - EPS) * ours, **CLOSE)


def test_cosine_of_mdlm() -> None:
    settings, t = DiffusionConfig(schedule="cosine_mdlm", eps=EPS), TIMES
    survival = EPS + (1 - EPS) * np.cos(np.pi * t / 2)
    sigma = -np.log(survival)
    weight = np.pi / 2 * (1 - EPS) * np.sin(np.pi * t / 2) / survival / np.expm1(sigma)
    np.testing.assert_allclose(mask_probability(settings, t), 1 - survival, rtol=1e-9)
    np.testing.assert_allclose(mask_probability(settings, t), (1 - EPS) * (1 - np.cos(np.pi * t / 2)), rtol=1e-9)
    np.testing.assert_allclose(elbo_weight(settings, t), weight, rtol=1e-9)


def test_cosine_of_dllm_and_duo() -> None:
    settings, t = DiffusionConfig(schedule="cosine"), TIMES
    alpha = 1 - np.cos(np.pi / 2 * (1 - t))
    slope = -np.pi / 2 * np.sin(np.pi / 2 * (1 - t))
    np.testing.assert_allclose(mask_probability(settings, t), 1 - alpha, rtol=1e-12)
    np.testing.assert_allclose(elbo_weight(settings, t), -slope / (1 - alpha), rtol=1e-9)


def test_geometric_of_sedd() -> None:
    settings, t = DiffusionConfig(schedule="geometric"), TIMES
    sigma = 1e-4 ** (1 - t) * 20**t
    np.testing.assert_allclose(mask_probability(settings, t), 1 - np.exp(-sigma), rtol=1e-9)
    np.testing.assert_allclose(elbo_weight(settings, t), sigma * np.log(20 / 1e-4) / np.expm1(sigma), rtol=1e-9)


def test_cosine_of_bd3lm_has_half_the_weight_near_zero() -> None:
    """Its mask probability has eps as its floor, and its weight has eps in the denominator once more."""
    t = np.linspace(0, 1, 100_001)[1:]
    move_chance = 1 - (1 - EPS) * np.cos(np.pi * t / 2)
    slope = (1 - EPS) * np.sin(np.pi * t / 2) * np.pi / 2
    scaling = slope / (move_chance + EPS)
    exact = slope / move_chance
    np.testing.assert_allclose(scaling / exact, move_chance / (move_chance + EPS), rtol=1e-12)
    assert scaling[0] / exact[0] == pytest.approx(0.5, abs=1e-6)
    assert scaling[-1] / exact[-1] == pytest.approx(1 / (1 + EPS), rel=1e-6)
    # Both schedules have the same slope, and ours has the mask probability without the floor.
    settings = DiffusionConfig(schedule="cosine_mdlm", eps=EPS)
    np.testing.assert_allclose(mask_probability(settings, t), move_chance - EPS, atol=1e-12)
    np.testing.assert_allclose(elbo_weight(settings, t) * mask_probability(settings, t), slope, rtol=1e-9)
    predictor = TinyPredictor()
    by_count = predictor.mean_by_count()
    expected = sum(
        (scaling * math.comb(TINY_SEQ, k) * move_chance**k * (1 - move_chance) ** (TINY_SEQ - k)).mean() * by_count[k]
        for k in range(TINY_SEQ + 1)
    )
    assert -0.05 < expected / predictor.negative_elbo() - 1 < -0.003, "below the bound that it is taken for"


def test_cart_of_dream_with_its_shifted_logits() -> None:
    masked, clean, _, _ = draw()
    shifted = torch.cat([logits()[:, :1], logits()[:, :-1]], dim=1)
    entropy = F.cross_entropy(shifted.transpose(1, 2), clean, reduction="none")
    # context_adaptive_reweight: a symmetric geometric matrix without its diagonal, times what is not masked.
    distance = torch.arange(SEQ)[:, None] - torch.arange(SEQ)[None, :]
    matrix = (math.log(0.3) + (distance.abs() - 1) * math.log(1 - 0.3)).exp().double() * 0.5
    matrix.masked_fill_(distance == 0, 0)
    weight = (~masked).double() @ matrix
    theirs = (entropy * weight)[masked].sum() / (BATCH * SEQ)
    ours = cart_weights(~masked)[masked]
    np.testing.assert_allclose(float((entropy[masked] * ours).sum() / (BATCH * SEQ)), float(theirs), rtol=1e-7)
