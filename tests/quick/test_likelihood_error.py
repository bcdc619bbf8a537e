"""The example that compares likelihood estimators has the right truth, and its rounding is what it is said to be."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "likelihood_error.py"))
LENGTH = 4


def test_a_constant_cost_is_the_bound_of_every_estimator() -> None:
    """Where every masked token costs 2 nats, L/k times k of them are 2 L, whatever the mask."""
    table = 2.0 * EXAMPLE["every_mask"](LENGTH).sum(1)
    assert EXAMPLE["bound"](table, LENGTH) == pytest.approx(-2.0 * LENGTH)
    assert EXAMPLE["planned"](table, LENGTH, "exact_count", 64, 0) == pytest.approx(-2.0 * LENGTH)
    assert EXAMPLE["rounded"](table, LENGTH, 64, np.random.default_rng(0)) == pytest.approx(-2.0 * LENGTH)
    assert EXAMPLE["planned"](table, LENGTH, "one_over_t", 64, 0) != pytest.approx(-2.0 * LENGTH, rel=1e-6)


def test_rounding_half_to_even_makes_even_counts_more_likely() -> None:
    counts = np.concatenate([EXAMPLE["rounded_counts"](8, 128, start) for start in range(1, 9)])
    assert counts.min() == 1 and counts.max() == 8
    assert np.mean(counts % 2 == 0) == pytest.approx(17 / 32)


def test_ours_has_the_bound_in_the_mean_and_rounding_has_not() -> None:
    table, generator = EXAMPLE["random_table"](LENGTH, 0), np.random.default_rng(1)
    truth = EXAMPLE["bound"](table, LENGTH)
    ours = np.array([EXAMPLE["planned"](table, LENGTH, "exact_count", 128, i) for i in range(400)])
    rounded = np.array([EXAMPLE["rounded"](table, LENGTH, 128, generator) for _ in range(400)])
    assert abs(ours.mean() - truth) < 3 * ours.std() / 20 < abs(rounded.mean() - truth)
