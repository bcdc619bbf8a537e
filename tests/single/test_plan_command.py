"""`megatron-dlm plan` on the command line: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_dlm.cli import main
from megatron_dlm.rehearsal import search
from megatron_dlm.rehearsal.machines import MACHINES


@pytest.fixture
def config(tmp_path: Path) -> str:
    tree = {
        "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "ffn_hidden_size": 96},
        "data": {"train": [{"path": "x"}], "tokenizer": "byte", "sequence_length": 32},
        "train": {"steps": 100, "micro_batch_size": 2, "global_batch_size": 16, "precision": "bf16"},
        "optimizer": {"warmup_steps": 1, "decay_steps": 1},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def test_a_plan_is_printed_written_and_drawn(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = ["--json", str(tmp_path / "plan.json"), "--output", str(tmp_path / "plan.png")]
    layout = ["--", "--parallel.pipeline_model_parallel_size", "2"]
    assert main(["plan", "--config", config, "--gpus", "16", *outputs, *layout]) == 0
    printed = capsys.readouterr().out
    assert "layout     TP1-PP2-DP8 on 16 x h100 | 1 micro-batches a step" in printed and "100 steps in" in printed
    content = json.loads((tmp_path / "plan.json").read_text())
    assert len(content["memory_bytes"]) == len(content["micro_batch_seconds"]) == 2
    gathered = [c for c in content["collectives"] if (c["kind"], c["group"]) == ("reduce_scatter", "data")]
    assert gathered[0]["ranks"] == 8 and gathered[0]["nodes"] == 1 and gathered[0]["phase"] == "finalize"
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_a_search_ends_in_a_layout_to_copy(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_MICRO_BATCHES", (2,))
    command = ["plan", "--config", config, "--gpus", "2", "--search"]
    assert main([*command, "--json", str(tmp_path / "plan.json")]) == 0
    printed = capsys.readouterr().out
    best = printed.splitlines()[1]
    snippet = yaml.safe_load(printed[printed.index("parallel:") : printed.index("\n\nlayout")])
    assert f"TP{snippet['parallel']['tensor_model_parallel_size']} " in best
    tried = json.loads((tmp_path / "plan.json").read_text())["search"]
    assert {"TP1 PP1 micro-batch 2 recompute none", "TP2 PP1 micro-batch 2 recompute none"} <= {
        t["layout"] for t in tried
    }
    monkeypatch.setitem(MACHINES, "h100", MACHINES["h100"]._replace(memory=3.0001e9))
    assert main(command) == 2
    assert "no layout fits 2 x h100" in capsys.readouterr().err.splitlines()[-1]
    assert main(command[:-1]) == 1, "a layout that does not fit"
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "--gpus is 0"),
        (["--gpus", "3", "--", "--parallel.tensor_model_parallel_size", "2"], "3 processes are no whole number"),
        (["--gpus", "2", "--output", "plan.txt"], "--output plan.txt is no figure"),
        (["--gpus", "2", "--", "--model.hiden_size", "3"], "did you mean hidden_size"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    config: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config", config, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
