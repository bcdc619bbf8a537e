"""Which rank gets which samples of a global batch."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from dlm_kernels.noise_levels import draw, linear_count
from megatron_dlm.training.batches import first_position

BATCH, SEQ, STEPS = 1024, 4096, 20


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_sample_is_dealt_out_once_and_pairs_stay_on_their_rank(size: int) -> None:
    for ranks, count in product((1, 2, 3, 8), (1, 2, 3, 4, 7)):
        owner = np.full(ranks * count * size, -1)
        for rank, index in product(range(ranks), range(count)):
            first = first_position(index, count, rank, ranks, size)
            assert (owner[first : first + size] == -1).all()
            owner[first : first + size] = rank
        assert (owner >= 0).all()
        whole = ranks * size * (count - count % 2 if size % 2 else count)
        assert (owner[:whole:2] == owner[1:whole:2]).all()


@pytest.mark.parametrize(("ranks", "before"), [(16, 0.566), (64, 0.665), (256, 0.871), (512, 0.970)])
def test_the_slowest_rank_scores_half_of_its_tokens(ranks: int, before: float) -> None:
    """With one row a micro-batch. Before is what ranks that take turns by the row have."""
    count = BATCH // ranks
    places = np.array([[first_position(i, count, rank, ranks, 1) for i in range(count)] for rank in range(ranks)])
    in_turns = np.arange(BATCH).reshape(count, ranks).T
    worst: dict[str, list[float]] = {"pairs": [], "in turns": []}
    for step in range(STEPS):
        ids = np.arange(BATCH) + step * BATCH
        drawn = draw(ids, "stratified_antithetic", seed=1, step=step, global_batch_size=BATCH)
        masked = linear_count(drawn, np.full(BATCH, SEQ)) / SEQ
        for name, rows in (("pairs", places), ("in turns", in_turns)):
            worst[name].append(masked[rows].mean(axis=1).max())
    now, then = (float(np.mean(worst[name])) for name in ("pairs", "in turns"))
    print(f"SHARE DP{ranks}, {count} micro-batches: slowest rank masks {then:.3f} in turns, {now:.4f} in pairs")
    assert now == pytest.approx(0.5, abs=1 / SEQ)
    assert then == pytest.approx(before, abs=0.02)
