"""A training run on the Triton kernels is the run on their plain-torch twins, within the rounding of fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import megatron_dlm.training.setup  # noqa: F401  (imported once, in the parent of the forked ranks)
from tests.ranks import run_ranks
from tests.runs import run_cases, tiny_config

SMALL = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48}
CASES: dict[str, dict[str, Any]] = {
    "masked diffusion, tied": {"model": {**SMALL, "tie_embeddings": True}},
    "complementary, cart": {"diffusion": {"complementary": True, "weighting": "cart"}},
    "autoregressive": {"model": {**SMALL, "objective": "autoregressive"}},
}


def test_five_steps_at_tp2_with_sequence_parallelism(tiny_data: Path, tmp_path: Path) -> None:
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    training = {"steps": 20, "micro_batch_size": 2, "global_batch_size": 4}

    def configs(implementation: str) -> list[Any]:
        return [
            tiny_config(
                tiny_data,
                parallel=parallel,
                train=training,
                evaluate={"interval": 1000, "sequences": 2},
                kernels={"implementation": implementation, "chunk_rows": 32},
                data={"sequence_length": 16},  # the interpreter takes its time for each token
                **{"model": SMALL, **case},
            )
            for case in CASES.values()
        ]

    ours = run_ranks(run_cases, 2, tmp_path, configs("triton"), 5)
    twins = run_ranks(run_cases, 2, tmp_path, configs("torch"), 5)
    for name, here, twin in zip(CASES, ours, twins, strict=True):
        worst = max(abs(a - b) / b for a, b in zip(here.losses, twin.losses, strict=True))
        print(f"TRITON {name:36} loss {worst:.1e}")
        assert here.noised == twin.noised, name
        assert worst < 1e-6, name
        assert here.grad_norms == pytest.approx(twin.grad_norms, rel=1e-5), name
        assert here.nelbo == pytest.approx(twin.nelbo, rel=1e-6), name
