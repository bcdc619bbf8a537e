"""A tiny crossover, trained: stopped, killed and continued it is the one left alone; arms are added and never mixed."""

from __future__ import annotations

import copy
import fcntl
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml

from megatron_dlm.cli import main
from megatron_dlm.crossover.arms import arm_environment
from megatron_dlm.crossover.grid import load_crossover
from megatron_dlm.data.tokenizer import load_tokenizer
from tests.runs import TINY

STEPS = 90
DLM, AR = "base-1500tokens-dlm-seed7", "base-1500tokens-ar-seed7"
FORK = multiprocessing.get_context("fork")


class Grid:
    """A crossover of one pair in a folder."""

    def __init__(self, folder: Path, data: Path) -> None:
        base = copy.deepcopy(TINY)
        del base["run"]
        base["model"] |= {"num_layers": 2, "hidden_size": 32}
        base["data"] |= {"train": [{"path": str(data / "train")}], "valid": [{"path": str(data / "valid")}]}
        base["train"] |= {"steps": STEPS, "micro_batch_size": 8}
        base["evaluate"] = {"interval": 10, "sequences": 8}
        base["checkpoint"] = {"interval": 8, "keep": 1}
        self.tree: dict[str, Any] = {"base": base, "grid": {"unique_tokens": [1500], "seeds": [7]}, "arms_at_once": 2}
        self.output, self.config = folder / "out", folder / "grid.yaml"

    def arguments(self, *options: str) -> list[str]:
        self.config.write_text(yaml.safe_dump(self.tree))
        return ["crossover", "--config", str(self.config), "--output", str(self.output), *options]

    def run(self, *options: str) -> int:
        return main(self.arguments(*options))

    def start(self) -> BaseProcess:
        """Run in a process of its own, which can be killed."""
        process = FORK.Process(target=_run, args=(self.arguments(), self.output.parent / "log"))
        process.start()
        return process

    def log(self) -> str:
        return (self.output.parent / "log").read_text()

    def steps(self, arm: str) -> list[tuple[int, float]]:
        path = self.output / arm / "metrics.jsonl"
        whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
        return [(r["step"], r["loss"]) for r in map(json.loads, whole) if "loss" in r]

    def done(self) -> list[int]:
        """Steps of both arms."""
        return [len(self.steps(arm)) for arm in (DLM, AR)]

    def starts(self, arm: str) -> int:
        """How often it was started."""
        return (self.output / arm / "train.log").read_text().count("versions   megatron_dlm")

    def result(self) -> dict[str, Any]:
        return json.loads((self.output / "crossover.json").read_text())


def _run(arguments: list[str], log: Path) -> None:
    file = log.open("a", buffering=1)
    sys.stdout = sys.stderr = file
    raise SystemExit(main(arguments))


def wait_for(condition: Callable[[], Any], process: BaseProcess) -> None:
    until = time.monotonic() + 180
    while not condition():
        assert process.is_alive() and time.monotonic() < until
        time.sleep(0.005)


def arms_of(process: BaseProcess) -> list[psutil.Process]:
    assert process.pid is not None
    return psutil.Process(process.pid).children()


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """A forked process that uses a pool of threads which its parent has made hangs."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Grid:
    """A crossover that nothing has disturbed."""
    grid = Grid(tmp_path_factory.mktemp("whole"), tiny_data)
    assert grid.run() == 0
    return grid


def test_a_pair_is_trained_and_reported(whole: Grid, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(path.name for path in whole.output.iterdir() if not path.name.startswith(".")) == [
        AR,
        DLM,
        "crossover-flops.png",
        "crossover.json",
        "crossover.md",
        "crossover.png",
    ]
    for arm in (DLM, AR):
        assert [step for step, _ in whole.steps(arm)] == list(range(1, STEPS + 1))
    (cell,) = whole.result()["cells"]
    assert {arm["name"] for arm in cell["arms"]} == {DLM, AR}
    curves = [arm["curves"]["loss"] for arm in cell["arms"]]
    assert curves[0]["epochs"] == curves[1]["epochs"] and len(curves[0]["epochs"]) == STEPS // 10
    assert curves[0]["values"] != curves[1]["values"]
    (comparison,) = cell["comparisons"]
    assert comparison["by_seed"]["7"]["last_epoch"] == curves[0]["epochs"][-1]
    # Finished arms are not trained again, and --report and a second run say the same.
    before = (whole.output / "crossover.json").read_bytes()
    for options in ([], ["--report"]):
        assert whole.run(*options) == 0
        assert (whole.output / "crossover.json").read_bytes() == before
    assert "2 finished before" in capsys.readouterr().out
    assert whole.starts(DLM) == whole.starts(AR) == 1


def test_pairs_read_the_same_sequences(whole: Grid) -> None:
    from megatron_dlm.training.setup import open_data

    dlm, ar = load_crossover(str(whole.config)).arms.values()
    tokens = [open_data(c, load_tokenizer("byte"))[0].sequences(np.arange(100)) for c in (dlm, ar)]
    assert (tokens[0] == tokens[1]).all()


def test_stopped_and_killed_it_is_the_one_that_was_left_alone(
    whole: Grid, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = Grid(tmp_path, tiny_data)
    # Stopped with a signal: every arm saves.
    process = grid.start()
    wait_for(lambda: min(grid.done()) >= 4, process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    assert process.exitcode == 75
    assert "stopped: everything is saved, and the same command goes on" in grid.log()
    for arm in (DLM, AR):
        assert json.loads((grid.output / arm / "status.json").read_text())["exit_code"] == 75
        root = grid.output / arm / "checkpoints"
        assert int((root / "latest").read_text().strip().removeprefix("step-")) == len(grid.steps(arm)) < STEPS
    # Killed: the arms notice, and save too.
    stopped_at = max(grid.done())
    process = grid.start()
    wait_for(lambda: min(grid.done()) >= stopped_at + 4, process)
    arms = arms_of(process)
    for arm_process in arms:
        arm_process.suspend()
    process.kill()
    process.join()
    assert grid.run() == 2, "nobody else begins while they save"
    assert "another run is using" in capsys.readouterr().err
    for arm_process in arms:
        arm_process.resume()
    _, alive = psutil.wait_procs(arms, timeout=120)
    assert len(arms) == 2 and not alive, "arms do not outlive their crossover"
    for arm in (DLM, AR):
        assert json.loads((grid.output / arm / "status.json").read_text())["exit_code"] == 75
    assert max(grid.done()) < STEPS and not (grid.output / "crossover.json").exists()
    # One arm is killed: it fails alone.
    grid.tree["arms_at_once"] = 1
    killed_at = len(grid.steps(DLM))
    process = grid.start()
    wait_for(lambda: len(grid.steps(DLM)) >= killed_at + 4, process)
    (arm_process,) = arms_of(process)
    arm_process.kill()
    process.join(120)
    assert process.exitcode == 1
    assert f"failed   {DLM} after " in grid.log() and "killed by SIGKILL" in grid.log()
    assert f"finished {AR} after" in grid.log() and f"the same command tries them again: {DLM}" in grid.log()
    assert grid.result()["unfinished"] == [DLM], "what is there is reported"
    # And once more.
    assert grid.run() == 0
    for arm in (DLM, AR):
        assert grid.steps(arm) == whole.steps(arm)
        assert "resume     " in (grid.output / arm / "train.log").read_text()
    assert (grid.starts(DLM), grid.starts(AR)) == (4, 3), "what was finished is not started again"
    assert grid.result()["cells"] == whole.result()["cells"]


def test_a_second_signal_ends_the_arms_at_once(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid(tmp_path, tiny_data)
    pace, python = tmp_path / "pace", tmp_path / "python"
    pace.write_text("3")  # the step after has no end
    python.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" -m tests.paced_command "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PACE", str(pace))
    monkeypatch.setattr(sys, "executable", str(python))
    process = grid.start()
    wait_for(lambda: min(grid.done()) == 3, process)
    arms = arms_of(process)
    assert process.pid is not None and len(arms) == 2
    until = time.monotonic() + 180
    signals = 0
    while process.is_alive():  # two that come before an arm has looked are one to it
        assert time.monotonic() < until
        os.kill(process.pid, signal.SIGINT)
        signals += 1
        process.join(2)
    assert signals > 1 and process.exitcode == 1 and not any(arm.is_running() for arm in arms)
    for arm in (DLM, AR):
        assert f"failed   {arm} after " in grid.log()
        assert not (grid.output / arm / "checkpoints" / "latest").exists()
    assert grid.log().count("stopped by a second signal before a checkpoint was saved") == 2


def test_an_arm_gets_its_share_of_the_machine(whole: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    config = next(iter(load_crossover(str(whole.config)).arms.values()))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert arm_environment(config, 0, 2)["OMP_NUM_THREADS"] == "3", "what is given stays"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert arm_environment(config, 0, 2)["OMP_NUM_THREADS"] == "4"
    config.parallel.data_parallel_size = 2
    assert "OMP_NUM_THREADS" not in arm_environment(config, 0, 2), "the workers of one arm share as those of any run"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [arm_environment(config, slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0,1", "2,3", "0,1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert arm_environment(config, 1, 2)["CUDA_VISIBLE_DEVICES"] == "6,7", "as they are called outside"


def test_a_larger_grid_adds_arms_and_other_contents_are_refused(
    whole: Grid, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    original = copy.deepcopy(whole.tree)
    try:
        whole.tree["grid"]["autoregressive"] = {"input_mask_ratio": [0.0, 0.5]}
        assert whole.run("--plan") == 0
        planned = capsys.readouterr().out.splitlines()
        masked = "base-1500tokens-ar-mask0.5-seed7"
        assert [line.startswith("# finished: ") for line in planned] == [True, True, False]
        assert planned[2] == f"megatron-dlm train --config {whole.output / masked / 'train.yaml'}"
        assert not (whole.output / masked / "metrics.jsonl").exists()
        assert whole.run("--report") == 0 and whole.result()["unfinished"] == [masked]
        assert whole.run() == 0
        assert {c["variant"] for c in whole.result()["cells"][0]["comparisons"]} == {"AR", "AR mask0.5"}
        assert whole.starts(DLM) == whole.starts(AR) == whole.starts(masked) == 1
        capsys.readouterr()
        whole.tree["base"]["optimizer"]["lr"] = 5e-4
        assert whole.run() == 2
        error = capsys.readouterr().err
        assert f"{DLM} was trained with optimizer.lr 0.001, not 0.0005" in error and error.count("\n") == 1
        # Other data under the same name.
        whole.tree = copy.deepcopy(original)
        whole.tree["base"]["data"]["valid"] = whole.tree["base"]["data"]["train"]
        assert whole.run() == 2
        assert "was trained with other data.valid than there are now" in capsys.readouterr().err
    finally:
        whole.tree = original


def test_a_crossover_that_is_running_is_left_alone(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = Grid(tmp_path, tiny_data)
    grid.output.mkdir()
    with open(grid.output / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert grid.run() == 2
    assert "another run is using" in capsys.readouterr().err
    assert [path.name for path in grid.output.iterdir()] == [".lock"]
