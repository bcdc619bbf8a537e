"""Noise schedules and loss weights, against the published formulas and against enumeration."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dlm.config import DiffusionConfig
from megatron_dlm.diffusion.schedule import elbo_weight, levels_and_weights, mask_probability
from tests.enumeration import SEQ, TinyPredictor

SCHEDULES = ["linear", "cosine", "cosine_mdlm", "polynomial", "geometric"]
TIMES = np.linspace(1e-3, 1 - 1e-3, 200)
EPS = 1e-3


def config(**values: Any) -> DiffusionConfig:
    return DiffusionConfig(**values)


@pytest.mark.parametrize("name", SCHEDULES)
def test_weight_is_the_logarithmic_derivative_of_the_probability(name: str) -> None:
    t = torch.from_numpy(TIMES).requires_grad_()
    p = mask_probability(name, t)
    (slope,) = torch.autograd.grad(p.log().sum(), t)
    torch.testing.assert_close(elbo_weight(name, t).detach(), slope, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(mask_probability(name, TIMES), p.detach().numpy(), rtol=1e-13)
    np.testing.assert_allclose(elbo_weight(name, TIMES), slope.numpy(), rtol=1e-10, atol=1e-12)
    assert mask_probability(name, 0.25) == pytest.approx(float(mask_probability(name, np.array([0.25]))[0]), rel=1e-14)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_run_from_zero_to_one(name: str) -> None:
    p = mask_probability(name, np.linspace(0, 1, 100))
    assert (np.diff(p) > 0).all()
    assert 0 <= p[0] <= 1.01e-4 and 1 - 1.01e-3 <= p[-1] <= 1


def test_published_formulas() -> None:
    t = TIMES
    # MDLM, cosine: sigma is the total noise, and the loss weight is sigma' / expm1(sigma).
    survival = EPS + (1 - EPS) * np.cos(np.pi * t / 2)
    sigma = -np.log(survival)
    weight = np.pi / 2 * (1 - EPS) * np.sin(np.pi * t / 2) / survival / np.expm1(sigma)
    np.testing.assert_allclose(mask_probability("cosine_mdlm", t, EPS), 1 - survival, rtol=1e-9)
    np.testing.assert_allclose(elbo_weight("cosine_mdlm", t), weight, rtol=1e-9)
    # dllm and duo, cosine: alpha = 1 - cos(pi/2 (1 - t)), weight -alpha' / (1 - alpha).
    alpha = 1 - np.cos(np.pi / 2 * (1 - t))
    slope = -np.pi / 2 * np.sin(np.pi / 2 * (1 - t))
    np.testing.assert_allclose(mask_probability("cosine", t), 1 - alpha, rtol=1e-12)
    np.testing.assert_allclose(elbo_weight("cosine", t), -slope / (1 - alpha), rtol=1e-9)
    # SEDD, geometric.
    sigma = 1e-4 ** (1 - t) * 20**t
    np.testing.assert_allclose(mask_probability("geometric", t), 1 - np.exp(-sigma), rtol=1e-9)
    np.testing.assert_allclose(elbo_weight("geometric", t), sigma * np.log(2e5) / np.expm1(sigma), rtol=1e-9)


def test_bernoulli_linear_is_llada_and_smdm_and_mdlm_up_to_eps() -> None:
    u_levels = np.random.default_rng(0).integers(0, 2**32, 1000)
    u = (u_levels + 0.5) / 2**32
    thresholds, weights = levels_and_weights(config(masking="bernoulli", eps=EPS), u_levels, np.full(1000, 64))
    # LLaDA and SMDM: p = (1 - eps) t + eps and weight 1 / p.
    p = (1 - EPS) * u + EPS
    np.testing.assert_allclose(thresholds / 2**32, p, rtol=2.5e-7)
    np.testing.assert_allclose(weights, 1 / p, rtol=2.5e-7)
    # MDLM masks with (1 - eps) t' and weights with 1 / t', t' = (1 - eps) t + eps: (1 - eps) / p at equal p.
    mdlm_time = p / (1 - EPS)
    np.testing.assert_allclose(1 / mdlm_time, (1 - EPS) * weights, rtol=2.5e-7)


def test_exact_count_linear_is_the_count_form_of_llada() -> None:
    u_levels = np.random.default_rng(1).integers(0, 2**32, 1000)
    eligible = np.random.default_rng(2).integers(0, 100, 1000)
    counts, weights = levels_and_weights(config(), u_levels, eligible)
    assert ((counts >= (eligible > 0)) & (counts <= eligible)).all()
    np.testing.assert_allclose(weights * counts, eligible, rtol=1e-15)  # the weights of a sequence sum to L


@pytest.mark.parametrize("name", SCHEDULES)
def test_exact_count_estimates_the_elbo_without_bias(name: str) -> None:
    """Expectation over a fine grid of levels and over all subsets, against the integral of the Bernoulli form.

    The tolerance is what the schedule leaves out at its ends (eps for MDLM's cosine); with the weight L / k alone, or
    with -alpha' / (1 - alpha), the non-linear schedules are off by more than 2 %.
    """
    predictor = TinyPredictor()
    u_levels = np.arange(2**16) * 2**16 + 2**15
    counts, weights = levels_and_weights(config(schedule=name), u_levels, np.full(2**16, SEQ))
    assert counts.min() == 1 and counts.max() == SEQ
    by_count = predictor.mean_by_count()
    tolerance = {"linear": 1e-12, "cosine_mdlm": 2.5e-3, "geometric": 5e-4}.get(name, 1e-4)
    assert (weights * by_count[counts]).mean() == pytest.approx(predictor.negative_elbo(), rel=tolerance)
    if name != "linear":
        for biased in (SEQ / counts, elbo_weight(name, (u_levels + 0.5) / 2**32)):
            assert (biased * by_count[counts]).mean() != pytest.approx(predictor.negative_elbo(), rel=2e-2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_bernoulli_estimates_the_elbo(name: str) -> None:
    predictor = TinyPredictor()
    u_levels = np.arange(2**16) * 2**16 + 2**15
    thresholds, weights = levels_and_weights(
        config(schedule=name, masking="bernoulli", eps=1e-4), u_levels, np.full(2**16, SEQ)
    )
    assert thresholds.min() >= 0 and thresholds.max() <= 2**32
    p, by_count = thresholds / 2**32, predictor.mean_by_count()
    expected = sum(math.comb(SEQ, k) * p**k * (1 - p) ** (SEQ - k) * by_count[k] for k in range(SEQ + 1))
    assert (weights * expected).mean() == pytest.approx(predictor.negative_elbo(), rel=1e-3)


def test_bernoulli_keeps_the_time_above_eps() -> None:
    u_levels = np.array([0, 2**31, 2**32 - 1])
    t = 0.99 * (u_levels + 0.5) / 2**32 + 0.01
    thresholds, weights = levels_and_weights(
        config(schedule="cosine", masking="bernoulli", eps=0.01), u_levels, np.full(3, SEQ)
    )
    np.testing.assert_allclose(thresholds / 2**32, np.sin(np.pi / 2 * t), atol=2**-32)
    np.testing.assert_allclose(weights, elbo_weight("cosine", t), rtol=1e-12)


def test_sequences_without_eligible_tokens_are_left_alone() -> None:
    for name in SCHEDULES:
        counts, weights = levels_and_weights(config(schedule=name), np.array([0, 2**32 - 1]), np.array([0, 0]))
        assert counts.tolist() == [0, 0] and weights.tolist() == [0, 0]


def test_unknown_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown noise schedule"):
        mask_probability("sigmoid", 0.5)
    with pytest.raises(ValueError, match="unknown noise schedule"):
        elbo_weight("sigmoid", 0.5)
