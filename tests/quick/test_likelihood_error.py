"""The example that compares likelihood estimators has the right truth, and its rounding is what it is said to be."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_dlm.evaluation.likelihood import Request, loglikelihoods
from megatron_dlm.evaluation.progress import collect
from tests.questions import rigged

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "likelihood_error.py"))
LENGTH = 4


def test_a_constant_cost_is_the_bound_of_every_estimator() -> None:
    """Where every masked token costs 2 nats, L/k times k of them are 2 L, whatever the mask."""
    table = 2.0 * EXAMPLE["every_mask"](LENGTH).sum(1)
    assert EXAMPLE["bound"](table, LENGTH) == pytest.approx(-2.0 * LENGTH)
    assert EXAMPLE["planned"](table, LENGTH, "exact_count", 64, 0) == pytest.approx(-2.0 * LENGTH)
    assert EXAMPLE["rounded"](table, LENGTH, 64, np.random.default_rng(0)) == pytest.approx(-2.0 * LENGTH)
    assert EXAMPLE["planned"](table, LENGTH, "one_over_t", 64, 0) != pytest.approx(-2.0 * LENGTH, rel=1e-6)


def test_the_table_of_a_model_has_the_bound_that_evaluate_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(258, 258, generator=generator)

    def denoise(tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        return weights[tokens].cumsum(1).flatten(0, 1)[rows]

    model = rigged({})._replace(denoise=denoise)
    tokens = list(b"a text, and an answer")
    table = EXAMPLE["model_table"](model, tokens, LENGTH)
    request = Request(tokens[:-LENGTH], tokens[-LENGTH:], 0)
    (expected,) = collect(loglikelihoods(denoise, [request], vocabulary=model.vocabulary))
    assert expected.standard_error == 0 and table[0] == 0
    assert EXAMPLE["bound"](table, LENGTH) == pytest.approx(expected.value)


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
    assert abs(rounded.mean() - truth - EXAMPLE["rounding_bias"](table, LENGTH, 128)) < 3 * rounded.std() / 20
