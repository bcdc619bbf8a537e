"""Which checkpoint a run continues from, what is refused, and what a save leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import megatron_dlm.training.checkpoint as checkpoint
from megatron_dlm.config import Config, ConfigError
from megatron_dlm.data.tokenizer import load_tokenizer
from megatron_dlm.training.setup import open_data
from tests.ranks import run_ranks
from tests.resuming import continue_run
from tests.runs import tiny_config


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Any:
    def make(**sections: dict[str, Any]) -> Config:
        return tiny_config(tiny_data, run={"directory": str(tmp_path / "run"), "seed": 7}, **sections)

    return make


def test_checkpoints_are_complete_pruned_and_guarded(config: Any, tmp_path: Path) -> None:
    settings = config(checkpoint={"keep": 2})
    for last in (1, 2, 3):
        run_ranks(continue_run, 1, tmp_path, settings, last - 1, last, last)
    root = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000002", "step-00000003"]
    assert (root / "latest").read_text().strip() == "step-00000003"
    info = json.loads((root / "step-00000003" / "checkpoint.json").read_text())
    assert (info["step"], info["consumed_samples"]) == (3, 48)
    assert (root / "step-00000003" / "config.yaml").exists()

    tokenizer = load_tokenizer("byte")

    def resumable(settings: Config, steps: int = 20) -> Path | None:
        data, _ = open_data(settings, tokenizer)
        return checkpoint.resumable(settings, tokenizer, data, steps=steps)

    with pytest.raises(ConfigError, match="step-00000003 is beyond the 2 steps of this run"):
        resumable(settings, steps=2)
    (root / "latest").write_text("step-00000009\n")  # a pointer to nothing: the newest complete one is taken
    assert resumable(settings).name == "step-00000003"
    (root / "step-00000003" / "checkpoint.json").unlink()  # incomplete: never loaded
    assert resumable(settings).name == "step-00000002"
    for section, values, message in (
        ("model", {"hidden_size": 32}, "model.hidden_size is 32 but was 64"),
        ("train", {"steps": 20, "global_batch_size": 32}, "train.global_batch_size is 32 but was 16"),
        ("checkpoint", {"resume": "never"}, "checkpoint.resume is never"),
        ("data", {"sequence_length": 16}, "data.sequence_length is 16 but was 32"),
    ):
        with pytest.raises(ConfigError, match=message):
            resumable(config(**{section: values}))


def test_going_back_to_an_older_checkpoint_gives_up_the_newer_ones(config: Any, tmp_path: Path) -> None:
    settings = config(checkpoint={"keep": 2})
    for last in (1, 2):
        run_ranks(continue_run, 1, tmp_path, settings, last - 1, last, last)
    root = tmp_path / "run" / "checkpoints"
    (root / "step-00000002").rename(root / "step-00000005")  # what training went on to before it was called back
    (root / "latest").write_text("step-00000001\n")
    run_ranks(continue_run, 1, tmp_path, settings, 1, 3, 3)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000001", "step-00000003"]
    assert (root / "latest").read_text().strip() == "step-00000003"
