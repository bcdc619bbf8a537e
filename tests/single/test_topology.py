"""Names of layouts, and dropout streams that never meet."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dlm.config.tree import ParallelConfig
from megatron_dlm.parallel import topology as parallel


def test_a_layout_prints_as_its_sizes() -> None:
    one = parallel.initialize(ParallelConfig())
    assert str(one) == "TP1-PP1-DP1"
    wide = replace(one, tensor_size=2, pipeline_size=4, virtual_size=2, data_size=8, sequence_parallel=True)
    assert str(wide) == "TP2+SP-PP4xVP2-DP8"


def test_dropout_streams_differ_between_steps_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron adds the tensor rank to the seed, so the seeds of other places and steps must not be neighbours."""
    one, seeds = parallel.initialize(ParallelConfig()), []
    monkeypatch.setattr(parallel, "model_parallel_cuda_manual_seed", lambda seed, **_: seeds.append(seed))
    for step in range(20):
        for pipeline_rank in range(4):
            for data_rank in range(8):
                here = replace(one, pipeline_size=4, data_size=8, pipeline_rank=pipeline_rank, data_rank=data_rank)
                here.seed_dropout(7, step)
    streams = {seed + tensor_rank for seed in seeds for tensor_rank in range(8)}
    assert len(streams) == len(seeds) * 8
    assert min(seeds) >= 0 and max(seeds) < 2**31
    first = list(seeds)
    seeds.clear()
    one.seed_dropout(8, 0)
    assert seeds[0] not in first
