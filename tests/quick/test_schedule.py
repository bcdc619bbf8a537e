"""Noise schedules and loss weights, against their definitions and against enumeration of every mask."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dlm.config.tree import DiffusionConfig
from megatron_dlm.diffusion.schedule import (
    elbo_weight,
    levels_and_weights,
    mask_probability,
    pair_levels_and_weights,
)
from tests.enumeration import SEQ, TinyPredictor

SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "linear"},
    {"schedule": "cosine"},
    {"schedule": "cosine_mdlm"},
    {"schedule": "polynomial"},
    {"schedule": "polynomial", "polynomial_exponent": 1.5},
    {"schedule": "geometric"},
    {"schedule": "geometric", "sigma_min": 1e-3, "sigma_max": 1000.0},
]
# What a schedule leaves out at its ends (eps for MDLM's cosine), and the error of the grid of levels.
TOLERANCE = {"linear": 1e-12, "cosine_mdlm": 2.5e-3, "geometric": 5e-4}
TIMES = np.linspace(1e-3, 1 - 1e-3, 200)
GRID = np.arange(2**16) * 2**16 + 2**15

every_schedule = pytest.mark.parametrize("options", SCHEDULES, ids=lambda o: " ".join(map(str, o.values())))


def config(**values: Any) -> DiffusionConfig:
    return DiffusionConfig(**values)


def tolerance(options: dict[str, Any]) -> float:
    return options.get("sigma_min", 0.0) * 3 or TOLERANCE.get(options["schedule"], 1e-4)


@every_schedule
def test_weight_is_the_logarithmic_derivative_of_the_probability(options: dict[str, Any]) -> None:
    settings = config(**options)
    t = torch.from_numpy(TIMES).requires_grad_()
    p = mask_probability(settings, t)
    (slope,) = torch.autograd.grad(p.log().sum(), t)
    torch.testing.assert_close(elbo_weight(settings, t).detach(), slope, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(mask_probability(settings, TIMES), p.detach().numpy(), rtol=1e-13)
    np.testing.assert_allclose(elbo_weight(settings, TIMES), slope.numpy(), rtol=1e-10, atol=1e-12)
    one = float(mask_probability(settings, np.array([0.25]))[0])
    assert mask_probability(settings, 0.25) == pytest.approx(one, rel=1e-14)


@every_schedule
def test_schedules_run_from_zero_to_one(options: dict[str, Any]) -> None:
    p = mask_probability(config(**options), np.linspace(0, 1, 100))
    assert (np.diff(p) >= 0).all() and (np.diff(p)[:70] > 0).all()
    assert 0 <= p[0] <= 1.01 * options.get("sigma_min", 1e-4) and 1 - 1.01e-3 <= p[-1] <= 1


def test_parameters_change_the_schedules_they_belong_to() -> None:
    assert mask_probability(config(schedule="polynomial", polynomial_exponent=3.0), 0.5) == 0.125
    assert mask_probability(config(schedule="geometric", sigma_min=0.01, sigma_max=4.0), 0.5) == pytest.approx(
        -math.expm1(-0.2)
    )


def test_exact_count_linear_is_the_count_form_of_llada() -> None:
    u_levels = np.random.default_rng(1).integers(0, 2**32, 1000)
    eligible = np.random.default_rng(2).integers(0, 100, 1000)
    counts, weights = levels_and_weights(config(), u_levels, eligible)
    assert ((counts >= (eligible > 0)) & (counts <= eligible)).all()
    np.testing.assert_allclose(weights * counts, eligible, rtol=1e-15)  # the weights of a sequence sum to L


@every_schedule
def test_exact_count_estimates_the_elbo_without_bias(options: dict[str, Any]) -> None:
    """Expectation over a fine grid of levels and over all subsets, against the integral of the Bernoulli form.

    With the weight L / k alone, or with -alpha' / (1 - alpha), the non-linear schedules are off by more than 2 %.
    """
    predictor, settings = TinyPredictor(), config(**options)
    counts, weights = levels_and_weights(settings, GRID, np.full(2**16, SEQ))
    assert counts.min() == 1 and counts.max() == SEQ
    by_count = predictor.mean_by_count()
    assert (weights * by_count[counts]).mean() == pytest.approx(predictor.negative_elbo(), rel=tolerance(options))
    if options["schedule"] != "linear":
        for biased in (SEQ / counts, elbo_weight(settings, (GRID + 0.5) / 2**32)):
            assert (biased * by_count[counts]).mean() != pytest.approx(predictor.negative_elbo(), rel=2e-2)


@every_schedule
def test_bernoulli_estimates_the_elbo(options: dict[str, Any]) -> None:
    predictor = TinyPredictor()
    settings = config(masking="bernoulli", **{"eps": 1e-4, **options})
    thresholds, weights = levels_and_weights(settings, GRID, np.full(2**16, SEQ))
    assert thresholds.min() >= 0 and thresholds.max() <= 2**32
    p, by_count = thresholds / 2**32, predictor.mean_by_count()
    expected = sum(math.comb(SEQ, k) * p**k * (1 - p) ** (SEQ - k) * by_count[k] for k in range(SEQ + 1))
    assert (weights * expected).mean() == pytest.approx(predictor.negative_elbo(), rel=max(1e-3, tolerance(options)))


@every_schedule
def test_each_row_of_complementary_pairs_estimates_the_elbo_without_bias(options: dict[str, Any]) -> None:
    predictor, eligible, by_row = TinyPredictor(), np.full(2**16, SEQ), []
    for second in (False, True):
        counts, weights = pair_levels_and_weights(config(**options), GRID, eligible, np.full(2**16, second))
        assert counts.min() == 0 and counts.max() == SEQ
        masked = SEQ - counts if second else counts
        assert np.isfinite(weights).all() and (weights[masked == 0] == 0).all()
        by_row.append((weights * predictor.mean_by_count()[masked]).mean())
    # Half of the grid cells at a jump of k are on the wrong side of it.
    expected = pytest.approx(predictor.negative_elbo(), rel=max(tolerance(options), 5e-5))
    assert by_row[0] == expected and by_row[1] == expected


@pytest.mark.parametrize("second", [False, True])
def test_complements_with_counts_from_one_would_be_biased(second: bool) -> None:
    """k uniform on 1..L with the weights L / k and L / (L - k): right for the first row, not for the second."""
    predictor = TinyPredictor()
    counts = np.arange(1, SEQ + 1)
    masked = SEQ - counts if second else counts
    mean = (SEQ / np.maximum(masked, 1) * predictor.mean_by_count()[masked]).mean()
    assert (mean == pytest.approx(predictor.negative_elbo(), rel=1e-12)) is not second
    assert not second or abs(mean / predictor.negative_elbo() - 1) > 0.1


@every_schedule
@pytest.mark.parametrize("mode", ["exact_count", "bernoulli", "first", "second"])
def test_weights_integrate_to_one(options: dict[str, Any], mode: str) -> None:
    """E[weight * masked share] = 1, so that a cross-entropy that does not depend on the mask comes out as it is."""
    eligible = 64
    counts = np.full(2**16, eligible)
    if mode in ("first", "second"):
        settings, complement = config(**options), np.full(2**16, mode == "second")
        masked, weights = pair_levels_and_weights(settings, GRID, counts, complement)
        share = np.where(complement, eligible - masked, masked) / eligible
    else:
        settings = config(masking=mode, **{"eps": 1e-6, **options})
        levels, weights = levels_and_weights(settings, GRID, counts)
        share = levels / (eligible if mode == "exact_count" else 2**32)
    assert (weights * share).mean() == pytest.approx(1.0, rel=max(1e-3, 1.1 * tolerance(options)))


def test_bernoulli_keeps_the_time_above_eps() -> None:
    u_levels = np.array([0, 2**31, 2**32 - 1])
    t = 0.99 * (u_levels + 0.5) / 2**32 + 0.01
    settings = config(schedule="cosine", masking="bernoulli", eps=0.01)
    thresholds, weights = levels_and_weights(settings, u_levels, np.full(3, SEQ))
    np.testing.assert_allclose(thresholds / 2**32, np.sin(np.pi / 2 * t), atol=2**-32)
    np.testing.assert_allclose(weights, elbo_weight(settings, t), rtol=1e-12)


@every_schedule
def test_sequences_without_eligible_tokens_are_left_alone(options: dict[str, Any]) -> None:
    edges, nothing = np.array([0, 2**32 - 1]), np.array([0, 0])
    counts, weights = levels_and_weights(config(**options), edges, nothing)
    assert counts.tolist() == [0, 0] and weights.tolist() == [0, 0]
    counts, weights = pair_levels_and_weights(config(**options), edges, nothing, np.array([False, True]))
    assert counts.tolist() == [0, 0] and weights.tolist() == [0, 0]


def test_unknown_schedules_are_refused() -> None:
    for function in (mask_probability, elbo_weight):
        with pytest.raises(ValueError, match="unknown noise schedule"):
            function(config(schedule="sigmoid"), 0.5)
