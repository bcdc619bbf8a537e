"""Samples during training: at any layout, in files and on the terminal, without a trace in the training."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_dlm.config.tree import Config
from megatron_dlm.errors import ConfigError
from megatron_dlm.parallel import topology as parallel
from tests.ranks import run_ranks
from tests.runs import tiny_config

# Not the empty prompt: without a token to lean on, all places are as good, and rounding decides.
PROMPTS = ["The ", "import"]
LAYOUTS = {
    "one process": {},
    "TP2+SP-PP2": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 2,
    },
    "PP2xVP2-DP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}


def config(data: Path, directory: Path, objective: str, layout: str, **evaluate: Any) -> Config:
    return tiny_config(
        data,
        run={"directory": str(directory)},
        model={"objective": objective},
        parallel=LAYOUTS[layout],
        train={"steps": 4, "log_interval": 2},
        optimizer={"warmup_steps": 1, "decay_steps": 1},
        evaluate={"interval": 2, "sequences": 4, "sample_tokens": 9, **evaluate},
    )


def train_all(configs: list[Config]) -> None:
    from megatron_dlm.evaluation.during_training import DuringTraining
    from megatron_dlm.training.setup import build
    from megatron_dlm.training.trainer import train

    for each in configs:
        assert train(build(each, parallel.initialize(each.parallel)), DuringTraining)


def read(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


@pytest.mark.parametrize("objective", ["masked_diffusion", "autoregressive"])
def test_samples_are_the_same_at_every_layout(objective: str, tiny_data: Path, tmp_path: Path, capfd: Any) -> None:
    folders = {layout: tmp_path / f"run{i}" for i, layout in enumerate(LAYOUTS)}
    runs = {name: config(tiny_data, folder, objective, name, prompts=PROMPTS) for name, folder in folders.items()}
    quiet = config(tiny_data, tmp_path / "quiet", objective, "one process")
    run_ranks(train_all, 1, tmp_path, [runs["one process"], quiet])
    run_ranks(train_all, 4, tmp_path, [runs["PP2xVP2-DP2"]])
    run_ranks(train_all, 4, tmp_path, [runs["TP2+SP-PP2"]])
    expected = read(folders["one process"], "samples.jsonl")
    assert [(record["step"], record["prompt"]) for record in expected] == [(s, p) for s in (2, 4) for p in PROMPTS]
    assert all(record["text"] for record in expected), "an untrained model does not end a document at once"
    for layout in LAYOUTS:
        assert read(folders[layout], "samples.jsonl") == expected, layout
    losses = [[r["loss"] for r in read(run, "metrics.jsonl") if "loss" in r] for run in tmp_path.glob("run0")]
    assert losses == [[r["loss"] for r in read(tmp_path / "quiet", "metrics.jsonl") if "loss" in r]]
    assert not (tmp_path / "quiet" / "samples.jsonl").exists()
    board = EventAccumulator(str(folders["one process"] / "tensorboard")).Reload()
    assert "samples/0/text_summary" in board.Tags()["tensors"]
    assert 'step 2/4 | sample 0: "The " -> ' in capfd.readouterr().out


def test_samples_need_no_held_out_data_and_stand_once(tiny_data: Path, tmp_path: Path) -> None:
    from megatron_dlm.training.reporter import Reporter

    each = config(tiny_data, tmp_path / "run", "masked_diffusion", "one process", prompts=["a", ""])
    each.data.valid = []
    run_ranks(train_all, 1, tmp_path, [each])
    assert [record["step"] for record in read(tmp_path / "run", "samples.jsonl")] == [2, 2, 4, 4]
    reporter = Reporter(each, active=True, steps=4, first_step=2)
    reporter.samples(2, [("a", "again")])
    reporter.samples(4, [("a", "b\x1b[2J")])
    reporter.close()
    found = [(record["step"], record["text"]) for record in read(tmp_path / "run", "samples.jsonl")]
    assert [step for step, _ in found] == [2, 2, 4] and found[2] == (4, "b\x1b[2J")
    assert "again" not in [text for _, text in found]


def test_shown_on_one_line_without_control_characters() -> None:
    from megatron_dlm.formatting import shown

    assert shown('say "h\u00e9"\n\x1b[2J\u009b\u202e') == r'"say \"h' + "\u00e9" + r'\"\n\u001b[2J\u009b\u202e"'


def test_samples_must_fit(tiny_data: Path, tmp_path: Path) -> None:
    from megatron_dlm.commands.train import check

    with pytest.raises(ConfigError, match=r"evaluate.prompts: 'The ' and .*_tokens \(30\) are 34 tokens, more than"):
        check(config(tiny_data, tmp_path, "masked_diffusion", "one process", prompts=["The "], sample_tokens=30), 1)
    with pytest.raises(ConfigError, match="evaluate.sample_tokens is 0"):
        check(config(tiny_data, tmp_path, "masked_diffusion", "one process", sample_tokens=0), 1)


def test_a_stream_that_cannot_show_a_sample_does_not_stop_training(tmp_path: Path, monkeypatch: Any) -> None:
    from megatron_dlm.training.reporter import Reporter

    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    reporter = Reporter(tiny_config(tmp_path, run={"directory": str(tmp_path)}), active=True, steps=4, first_step=0)
    reporter.samples(2, [("h\u00e9", "\ufffd")])
    reporter.close()
    stream.flush()
    assert rb'"h\xe9" -> "\ufffd"' in stream.buffer.getvalue()
    assert read(tmp_path, "samples.jsonl") == [{"step": 2, "prompt": "h\u00e9", "text": "\ufffd"}]
