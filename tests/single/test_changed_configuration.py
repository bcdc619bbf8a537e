"""A run that goes on with another configuration says so, records it, and keeps its curves apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.config.differences import differences
from megatron_dlm.config.load import read_stored
from megatron_dlm.config.tree import Config
from megatron_dlm.crossover.curves import Arm, read_run
from megatron_dlm.figures.runs import read_runs
from megatron_dlm.parallel.topology import initialize
from megatron_dlm.run_folder import RunFolder
from megatron_dlm.training.setup import build
from megatron_dlm.training.trainer import train
from tests.runs import TINY, tiny_config


def run(data: Path, folder: Path, steps: int, /, **sections: dict[str, Any]) -> Config:
    sections = {
        "run": {"directory": str(folder), "seed": 7},
        "model": {**TINY["model"], "num_layers": 1},
        "evaluate": {"interval": 2, "sequences": 4},
        **sections,
        "train": {**TINY["train"], "steps": steps, "global_batch_size": 4, **sections.get("train", {})},
    }
    config = tiny_config(data, **sections)
    assert train(build(config, initialize(config.parallel)))
    return config


def changes(folder: RunFolder) -> list[tuple[int, dict[str, Any]]]:
    records = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return [(record["step"], record["changes"]) for record in records if record.get("kind") == "configuration"]


def test_changes_are_said_recorded_and_kept(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    first = run(tiny_data, folder.path, 4)
    assert "changed" not in capsys.readouterr().out and not changes(folder)
    lower = {"optimizer": {**TINY["optimizer"], "lr": 5e-4}}
    run(tiny_data, folder.path, 4, **lower)  # makes no step, so what it says of the steps after 4 is replaced
    train_data, valid_data = ([{"path": str(tiny_data / name), "weight": 1.0}] for name in ("train", "valid"))
    other = {
        "optimizer": {**TINY["optimizer"], "lr": 2e-3},
        "train": {"precision": "bf16"},
        "data": {**TINY["data"], "train": train_data, "valid": train_data},
    }
    capsys.readouterr()
    second = run(tiny_data, folder.path, 8, **other)
    expected = {
        "train.steps": (4, 8),
        "train.precision": ("fp32", "bf16"),
        "optimizer.lr": (1e-3, 2e-3),
        "data.valid": (valid_data, train_data),
    }
    said = {line for line in capsys.readouterr().out.splitlines() if line.startswith("changed")}
    assert said == {f"changed    {k}: {json.dumps(a)} -> {json.dumps(b)}" for k, (a, b) in expected.items()}
    recorded = [(4, {key: {"before": a, "after": b} for key, (a, b) in expected.items()})]
    assert changes(folder) == recorded
    kept = folder.path / "config.step-00000004.yaml"
    assert read_stored(kept) == first and read_stored(folder.config) == second

    run(tiny_data, folder.path, 10, **{**other, "train": {"precision": "bf16"}})
    assert [step for step, _ in changes(folder)] == [4, 8] and changes(folder)[0] == recorded[0]
    assert "changed    train.steps: 8 -> 10\n" in capsys.readouterr().out

    records = folder.records()
    assert [record["step"] for record in records.steps] == list(range(1, 11))
    old, new = records.curves()
    assert [r["step"] for r in old] == [2, 4] and {r["valid_data"][:6] for r in old} == {"valid-"}
    # What is evaluated on the way in is of the new data, though step 4 had been evaluated before.
    assert [r["step"] for r in new] == [4, 6, 8, 10] and {r["valid_data"][:6] for r in new} == {"train-"}
    assert records.curve == new
    assert read_runs([folder.path], "steps")[0][0].curves == [old, new]
    loss = read_run(Arm("tiny", 1, "masked_diffusion", 7), folder).loss
    assert loss.values.tolist() == [record["valid_nelbo"] for record in new]


def test_differences_are_by_key_and_plain() -> None:
    before, after = (
        tiny_config(Path("data"), model={"transformer_config": values}) for values in ({"a": 1}, {"a": 1, "b": [2]})
    )
    assert differences(before, before) == []
    assert [tuple(change) for change in differences(before, after)] == [("model.transformer_config.b", None, [2])]
