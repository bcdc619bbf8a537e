"""Odd files in a run's folder, names that lead out of a checkpoint, weights that are no numbers, too little memory."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dlm import cli
from megatron_dlm.checkpoint import manifest
from megatron_dlm.checkpoint.stored import open_checkpoint
from megatron_dlm.checkpoint.whole_tensors import TensorInfo, WeightsReader, write_weights
from megatron_dlm.commands.train import check
from megatron_dlm.config.load import dump_yaml
from megatron_dlm.errors import ConfigError, DataError, TrainingError
from megatron_dlm.files import write_text
from megatron_dlm.generation.from_hugging_face import load_model
from megatron_dlm.hf.export import export
from megatron_dlm.training import setup
from megatron_dlm.training.reporter import Reporter
from tests.exports import config, make_checkpoint
from tests.runs import tiny_config


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints, of which ``latest`` names the newer."""
    for step in (1, 2):
        make_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-00000002\n")
    return tmp_path / "run"


def loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, loop], ids=["directory", "pipe", "loop"])
def test_odd_files_are_named_before_a_run_begins(make: Callable[[Path], Any], tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = tiny_config(tiny_data, run={"directory": str(run)})
    for name in ("metrics.jsonl", "config.yaml", "samples.jsonl", "status.json", "tensorboard", "checkpoints"):
        make(run / name)
        if make is Path.mkdir and name in ("tensorboard", "checkpoints"):
            continue
        with pytest.raises((ConfigError, DataError), match=f"run/{name}") as error:
            check(config, 1)
        assert "choose another run.directory" in str(error.value)
        (run / name).rmdir() if make is Path.mkdir else (run / name).unlink()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, loop], ids=["directory", "pipe", "loop"])
def test_odd_records_are_one_line_for_readers(
    make: Callable[[Path], Any], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(run / "metrics.jsonl")
    assert cli.main(["plot", str(run)]) == 2
    assert "cannot read " in (line := capsys.readouterr().err) and line.count("\n") == 1
    assert export(run, tmp_path / "out").parameters, "the model card does without"


@pytest.mark.parametrize(
    "damage",
    [
        Path.mkdir,
        os.mkfifo,
        loop,
        lambda path: path.write_text("../../elsewhere"),
        lambda path: path.write_bytes(b"\xff" * 10_000),
        lambda path: path.write_text("step-00000009"),
        lambda path: None,
    ],
    ids=["directory", "pipe", "loop", "outside", "noise", "gone", "missing"],
)
def test_a_damaged_latest_is_passed_over(
    damage: Callable[[Path], Any], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run / "checkpoints"
    (root / "latest").unlink()
    damage(root / "latest")
    assert open_checkpoint(run).directory.name == "step-00000002"
    (root / "step-00000002" / manifest.NAME).unlink()
    assert open_checkpoint(run).directory.name == "step-00000001"
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition("; ")[2] for line in lines] == [
        f"taking step-0000000{step}, the newest complete one" for step in (2, 1)
    ]
    (root / "step-00000001" / manifest.NAME).unlink()
    with pytest.raises(ConfigError, match="has no checkpoint|none beside it is complete"):
        open_checkpoint(run)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "linked", "folder/secret"])
def test_names_do_not_leave_the_checkpoint(name: str, run: Path) -> None:
    directory = run / "checkpoints" / "step-00000002"
    (directory.parent / "secret").write_text("x")
    (directory / "linked").symlink_to("../secret")
    (directory / "folder").symlink_to("..")
    listed = json.loads((directory / manifest.NAME).read_text())
    listed["files"][name] = {"size": 1, "sha256": manifest.record(directory.parent / "secret").sha256}
    (directory / manifest.NAME).write_text(json.dumps(listed))
    with pytest.raises(ConfigError, match="which is not one of its files"):
        open_checkpoint(run)
    index = pickle.loads((directory / ".metadata").read_bytes())
    for place in index.storage_data.values():
        place.relative_path = name
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ConfigError, match="which is not one of its files"):
        WeightsReader(directory)


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".status.json.partial").symlink_to("mine")
    write_text(tmp_path / "status.json", "new")
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "status.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "status.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(
    value: float, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, name = run / "checkpoints" / "step-00000002", "decoder.layers.1.mlp.linear_fc2.weight"
    reader = WeightsReader(directory)
    tensors = {key: reader.read(key) for key in reader.tensors}
    tensors[name][3, 4] = value
    for file in ("__0_0.distcp", ".metadata", manifest.NAME):
        (directory / file).unlink()
    infos = {key: TensorInfo(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    manifest.write(directory, write_weights(directory, infos, tensors.__getitem__))
    assert cli.main(["sample", "--checkpoint", str(run), "--prompt", "x", "--max-new-tokens", "2"]) == 1
    line = capsys.readouterr().err
    assert f"{name} has values that are not finite numbers; restore it" in line and line.count("\n") == 1
    export(run, tmp_path / "out")
    with pytest.raises(ConfigError, match="mlp.down_proj.weight of .*out has values that are not finite numbers"):
        load_model(str(tmp_path / "out"))


OUT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:128] data. DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("error", OUT, ids=["GPU", "CPU"])
@pytest.mark.parametrize("place", ["build_model", "Optimizer"])
def test_out_of_memory_while_building_is_one_line(
    place: str, error: Exception, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def fail(*args: Any, **keywords: Any) -> None:
        raise error

    monkeypatch.setattr(setup, place, fail)
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(tiny_config(tiny_data, run={"directory": str(tmp_path / "run")})))
    assert cli.main(["train", "--config", str(file)]) == 2
    line = capfd.readouterr().err
    assert "out of memory while the model and its optimizer were built, at layout TP1-PP1-DP1: raise" in line
    assert line.count("\n") == 1


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*unused: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    settings = config()
    settings.run.directory = str(tmp_path / "run")
    reporter = Reporter(settings, active=True, steps=2000, first_step=0)
    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(TrainingError, match="cannot write .*run/tensorboard: No space left on device; make room"):
        for step in range(2000):
            reporter._write({"step": step, "loss": 1.0})
    monkeypatch.undo()
    assert capfd.readouterr().err == "", "the traceback of TensorBoard's thread is not shown"
