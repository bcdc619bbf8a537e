"""Noise levels: antithetic, stratified, uniform for every row, and the linear schedule in integers."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from dlm_kernels import noise_levels
from dlm_kernels.noise_levels import draw, linear_count, linear_threshold
from dlm_kernels.philox import MASK32, Purpose, Stream
from dlm_kernels.types import NoiseMode

MODES = get_args(NoiseMode)


def levels(mode: NoiseMode, step: int, size: int, seed: int = 3) -> np.ndarray:
    """The levels of one whole global batch, [size]."""
    return draw(np.arange(size) + step * size, mode, seed=seed, step=step, global_batch_size=size)


@pytest.mark.parametrize("mode", ["stratified_antithetic", "antithetic"])
@pytest.mark.parametrize("size", [2, 6, 32])
def test_neighbours_are_complements(mode: NoiseMode, size: int) -> None:
    for step in range(5):
        drawn = levels(mode, step, size)
        assert (drawn[::2] ^ drawn[1::2] == MASK32).all()
        for eligible in (1, 7, 256, 4095):
            counts = linear_count(drawn, np.full(size, eligible))
            assert (counts[::2] + counts[1::2] == eligible + 1).all()


@pytest.mark.parametrize("mode", ["stratified_antithetic", "stratified"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 32])
def test_every_stratum_is_visited_once(mode: NoiseMode, size: int) -> None:
    orders = set()
    for step in range(8):
        strata = (levels(mode, step, size) * size) >> 32
        assert sorted(strata.tolist()) == list(range(size))
        orders.add(tuple(strata))
    assert len(orders) > 4 or size < 4


@pytest.mark.parametrize("size", [3, 7])
def test_odd_batches_pair_all_rows_but_a_rotating_one(size: int) -> None:
    single = []
    for step in range(40):
        drawn = levels("stratified_antithetic", step, size)
        alone = [i for i in range(size) if (drawn ^ MASK32)[i] not in drawn]
        assert len(alone) == 1
        assert (drawn[alone[0]] * size) >> 32 == size // 2
        single.append(alone[0])
    assert set(single) == set(range(size))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [5, 6])
def test_every_row_is_uniform_and_alternating_difficulty_is_unbiased(mode: NoiseMode, size: int) -> None:
    """A batch whose even rows are easy must not see its hard rows at particular noise levels (5 sigma)."""
    eligible, steps = 8, 800
    counts = np.stack([linear_count(levels(mode, s, size), np.full(size, eligible)) for s in range(steps)])
    for row in range(size):
        observed = np.bincount(counts[:, row], minlength=eligible + 1)
        assert observed[0] == 0
        chi_square = ((observed[1:] - steps / eligible) ** 2).sum() * eligible / steps
        assert chi_square < eligible - 1 + 5 * np.sqrt(2 * (eligible - 1))
    for difficulty in (np.arange(size) % 2, 1 - np.arange(size) % 2):
        per_step = (difficulty * counts / eligible).sum(1) / difficulty.sum()
        true = (eligible + 1) / (2 * eligible)
        assert abs(per_step.mean() - true) < 5 * max(per_step.std(), 1e-9) / np.sqrt(steps) + 1e-12


@pytest.mark.parametrize("keyed", [True, False])
def test_without_permutation_and_flip_an_alternating_set_would_be_biased(
    keyed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even rows cost nothing, odd rows the square of their level: the mean over them must be 1/3."""
    if not keyed:
        bits = noise_levels.random_bits
        monkeypatch.setattr(noise_levels, "permute", lambda index, *_: index)
        monkeypatch.setattr(
            noise_levels, "random_bits", lambda seed, stream, *rest: bits(seed, stream, *rest) * (stream != Stream.FLIP)
        )
    loss = np.array([((levels("stratified_antithetic", s, 8)[1::2] / 2**32) ** 2).mean() for s in range(400)])
    error = loss.std() / np.sqrt(len(loss))
    assert bool(abs(loss.mean() - 1 / 3) < 5 * error) is keyed
    assert keyed or abs(loss.mean() * 3 - 1) > 0.1


def test_stratification_reduces_the_variance_of_the_mean_level() -> None:
    spread = {mode: np.std([levels(mode, s, 16).mean() for s in range(100)]) for mode in MODES}
    assert spread["stratified"] < 0.3 * spread["iid"]
    assert spread["stratified_antithetic"] == 0 and spread["antithetic"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_any_subset_gives_the_same_levels_in_every_representation(mode: NoiseMode) -> None:
    for size in (6, 7):
        whole = levels(mode, 4, size)
        assert whole.dtype == np.int64 and whole.min() >= 0 and whole.max() <= MASK32
        ids = np.arange(size) + 4 * size
        arguments = {"seed": 3, "step": 4, "global_batch_size": size}
        np.testing.assert_array_equal(draw(ids[[5, 1, 2]], mode, **arguments), whole[[5, 1, 2]])
        np.testing.assert_array_equal(draw(torch.from_numpy(ids), mode, **arguments).numpy(), whole)
        assert [draw(int(i), mode, **arguments) for i in ids] == whole.tolist()
        assert draw(ids[:0], mode, **arguments).shape == (0,)


def test_step_seed_and_purpose_change_the_levels() -> None:
    reference = levels("iid", 0, 8)
    assert not (levels("iid", 1, 8) == reference).any()
    assert not (levels("iid", 0, 8, seed=4) == reference).any()
    validation = draw(np.arange(8), "iid", seed=3, step=0, global_batch_size=8, purpose=Purpose.VALIDATION)
    assert not (validation == reference).any()


def test_samples_of_another_step_are_refused() -> None:
    for ids in (np.array([7, 8]), np.array([16]), torch.tensor([7])):
        with pytest.raises(ValueError, match="not all in the global batch of step 1"):
            draw(ids, "iid", seed=0, step=1, global_batch_size=8)
    with pytest.raises(ValueError, match="unknown noise level mode"):
        draw(0, "sobol", seed=0, step=0, global_batch_size=8)  # type: ignore[arg-type]


def test_counts_are_floor_of_u_times_length_plus_one() -> None:
    edge = np.array([0, 1, 2**31 - 1, 2**31, MASK32 - 1, MASK32])
    for eligible in (0, 1, 2, 3, 1000, 2**22 - 1):
        exact = [0 if eligible == 0 else (2 * u + 1) * eligible // 2**33 + 1 for u in edge.tolist()]
        assert linear_count(edge, np.full(6, eligible)).tolist() == exact
        assert max(exact) == eligible


@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.2499])
def test_thresholds_are_rounded_probabilities(eps: float) -> None:
    edge = np.array([0, 1, 12345678, 2**31, MASK32 - 1, MASK32])
    expected = ((1 - eps) * (edge + 0.5) / 2**32 + eps) * 2**32
    thresholds = linear_threshold(edge, eps)
    assert np.abs(thresholds - expected).max() <= 1
    assert thresholds.min() >= 1 and thresholds.max() <= 2**32
    np.testing.assert_array_equal(thresholds, linear_threshold(torch.from_numpy(edge), eps).numpy())


@pytest.mark.parametrize("eps", [-1e-9, 0.25])
def test_thresholds_refuse_eps_out_of_range(eps: float) -> None:
    with pytest.raises(ValueError, match="eps"):
        linear_threshold(0, eps)
