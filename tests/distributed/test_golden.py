"""Fifty steps of each objective give the loss curves that are on record.

A change that should not change the mathematics must leave them alone. After one that should, write them again and say
why in the commit: ``python -m tests.distributed.test_golden``.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

import megatron_dlm.training.setup  # noqa: F401  (imported once, in the parent of the forked ranks)
from megatron_dlm.preparation.prepare import PrepareOptions, prepare
from tests.ranks import run_ranks
from tests.runs import run_cases, tiny_config

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
STEPS = 50
OBJECTIVES = ["masked_diffusion", "autoregressive"]


def curve(objective: str, folder: Path) -> dict[str, list[float]]:
    """Losses and gradient norms of the tiny run on the licence text, which no Python version changes."""
    options = PrepareOptions(output=folder / "data", inputs=[ROOT / "LICENSE"], tokenizer="byte")
    prepare(options)
    train = [{"path": str(folder / "data" / "train")}]
    data = {"train": train, "valid": train, "tokenizer": "byte", "sequence_length": 32}
    training = {"steps": STEPS, "micro_batch_size": 4, "global_batch_size": 16}
    config = tiny_config(folder, model={"objective": objective}, data=data, train=training)
    (trace,) = run_ranks(run_cases, 1, folder, [config], STEPS)
    return {"loss": trace.losses, "grad_norm": trace.grad_norms}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_curve_is_the_one_on_record(objective: str, tmp_path: Path) -> None:
    recorded = json.loads((GOLDEN / f"{objective}.json").read_text())
    here = curve(objective, tmp_path)
    assert len(recorded["loss"]) == STEPS and recorded["loss"][-1] < recorded["loss"][0] - 1
    assert here["loss"] == pytest.approx(recorded["loss"], rel=1e-5)
    assert here["grad_norm"] == pytest.approx(recorded["grad_norm"], rel=1e-3)  # CPUs round differently


if __name__ == "__main__":
    for name in OBJECTIVES:
        with tempfile.TemporaryDirectory() as scratch:
            (GOLDEN / f"{name}.json").write_text(json.dumps(curve(name, Path(scratch)), indent=0) + "\n")
