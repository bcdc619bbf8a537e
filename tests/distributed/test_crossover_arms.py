"""A tiny crossover, trained: stopped, killed and continued it is the one left alone; arms are added and never mixed.

The arms of those that are disturbed wait for the test (tests/paced_command.py), so nothing depends on moments.
"""

from __future__ import annotations

import copy
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml

from megatron_dlm.cli import main
from megatron_dlm.crossover import arms
from megatron_dlm.crossover.arms import arm_environment
from megatron_dlm.crossover.grid import load_crossover
from megatron_dlm.data.tokenizer import load_tokenizer
from megatron_dlm.run_folder import RunFolder, Status
from tests.runs import TINY

ROOT = Path(__file__).parents[2]
STEPS = 30
DLM, AR = "base-1500tokens-dlm-seed7", "base-1500tokens-ar-seed7"
ARMS = {"dlm": DLM, "ar": AR, "masked": "base-1500tokens-ar-mask0.5-seed7"}
STOPPING = "stopping after this step, and saving"


class Grid:
    """A crossover of one pair in a folder."""

    def __init__(self, folder: Path, data: Path) -> None:
        base = copy.deepcopy(TINY)
        del base["run"]
        base["model"] |= {"num_layers": 2, "hidden_size": 32}
        base["data"] |= {"train": [{"path": str(data / "train")}], "valid": [{"path": str(data / "valid")}]}
        base["train"] |= {"steps": STEPS, "micro_batch_size": 8}
        base["evaluate"] = {"interval": 5, "sequences": 8}
        base["checkpoint"] = {"interval": 4, "keep": 1}
        self.tree: dict[str, Any] = {"base": base, "grid": {"unique_tokens": [1500], "seeds": [7]}, "arms_at_once": 2}
        self.output, self.config, self.pace = folder / "out", folder / "grid.yaml", folder / "pace"

    def arguments(self, *options: str) -> list[str]:
        self.config.write_text(yaml.safe_dump(self.tree))
        return ["crossover", "--config", str(self.config), "--output", str(self.output), *options]

    def run(self, *options: str) -> int:
        return main(self.arguments(*options))

    def start(self, **steps: int) -> subprocess.Popen[bytes]:
        """Start it in a process of its own; return when each arm of ``steps`` waits with so many on record."""
        self.allow(**{"dlm": STEPS, "ar": STEPS, **steps})
        with (self.output.parent / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.paced_command", *self.arguments()],
                cwd=ROOT,
                env={**os.environ, "PACE": str(self.pace)},
                stdout=log,
                stderr=log,
            )
        for name, count in steps.items():
            wait_for(lambda name=name, count=count: len(self.steps(name)) >= count, process)
        return process

    def allow(self, **steps: int) -> None:
        """Let these arms go on to these steps."""
        self.pace.mkdir(exist_ok=True)
        for name, count in steps.items():
            (self.pace / "new").write_text(str(count))
            (self.pace / "new").rename(self.pace / ARMS[name])

    def log(self) -> str:
        return (self.output.parent / "log").read_text()

    def arm_log(self, arm: str) -> str:
        return (self.output / ARMS[arm] / "train.log").read_text()

    def steps(self, arm: str) -> list[tuple[int, float]]:
        path = self.output / ARMS[arm] / "metrics.jsonl"
        whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
        return [(r["step"], r["loss"]) for r in map(json.loads, whole) if "loss" in r]

    def saved_step(self, arm: str) -> int:
        latest = self.output / ARMS[arm] / "checkpoints" / "latest"
        return int(latest.read_text().strip().removeprefix("step-"))

    def starts(self, arm: str) -> int:
        """How often it was started."""
        return self.arm_log(arm).count("versions   megatron_dlm")

    def result(self) -> dict[str, Any]:
        return json.loads((self.output / "crossover.json").read_text())


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes]) -> None:
    """Return when it holds, which it must before the process ends."""
    while not condition():
        assert process.poll() is None or condition()
        time.sleep(0.01)


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
    for arm in ("dlm", "ar"):
        assert [step for step, _ in whole.steps(arm)] == list(range(1, STEPS + 1))
    (cell,) = whole.result()["cells"]
    assert {arm["name"] for arm in cell["arms"]} == {DLM, AR}
    curves = [arm["curves"]["loss"] for arm in cell["arms"]]
    assert curves[0]["epochs"] == curves[1]["epochs"] and len(curves[0]["epochs"]) == STEPS // 5
    assert curves[0]["values"] != curves[1]["values"]
    (comparison,) = cell["comparisons"]
    assert comparison["by_seed"]["7"]["last_epoch"] == curves[0]["epochs"][-1]
    # Finished arms are not trained again, and --report and a second run say the same.
    before = (whole.output / "crossover.json").read_bytes()
    for options in ([], ["--report"]):
        assert whole.run(*options) == 0
        assert (whole.output / "crossover.json").read_bytes() == before
    assert "2 finished before" in capsys.readouterr().out
    assert whole.starts("dlm") == whole.starts("ar") == 1


def test_pairs_read_the_same_sequences(whole: Grid) -> None:
    from megatron_dlm.training.setup import open_data

    dlm, ar = load_crossover(str(whole.config)).arms.values()
    tokens = [open_data(c, load_tokenizer("byte"))[0].sequences(np.arange(100)) for c in (dlm, ar)]
    assert (tokens[0] == tokens[1]).all()


@pytest.mark.time_limit(1800)  # starts four crossovers, one after the other
def test_stopped_and_killed_it_is_the_one_that_was_left_alone(
    whole: Grid, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = Grid(tmp_path, tiny_data)
    # Stopped with a signal: every arm saves.
    process = grid.start(dlm=5, ar=5)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: STOPPING in grid.arm_log("dlm") and STOPPING in grid.arm_log("ar"), process)
    grid.allow(dlm=STEPS, ar=STEPS)
    assert process.wait() == 75
    assert "stopped: everything is saved, and the same command goes on" in grid.log()
    for arm in ("dlm", "ar"):
        assert json.loads((grid.output / ARMS[arm] / "status.json").read_text())["exit_code"] == 75
        assert grid.saved_step(arm) == len(grid.steps(arm)) in (6, 7)
    # One arm is killed: it fails alone, and what is there is reported.
    process = grid.start(dlm=9, ar=9)
    processes = psutil.Process(process.pid).children()
    assert len(processes) == 2
    next(arm for arm in processes if str(grid.output / DLM / "train.yaml") in arm.cmdline()).kill()
    wait_for(lambda: f"failed   {DLM} after " in grid.log(), process)
    assert len(grid.steps("ar")) == 9, "the other one is not disturbed"
    grid.allow(ar=STEPS)
    assert process.wait() == 1
    assert "killed by SIGKILL" in grid.log() and f"finished {AR} after" in grid.log()
    assert f"the same command tries them again: {DLM}" in grid.log()
    assert grid.result()["unfinished"] == [DLM]
    # The crossover is killed: its arm notices, and saves too.
    process = grid.start(dlm=13)
    (arm_process,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    while grid.arm_log("dlm").count(STOPPING) < 2:
        assert arm_process.is_running()
        time.sleep(0.01)
    assert grid.run() == 2, "nobody else begins before it has saved"
    assert "another run is using" in capsys.readouterr().err
    grid.allow(dlm=STEPS)
    psutil.wait_procs([arm_process])
    assert grid.saved_step("dlm") == len(grid.steps("dlm")) in (14, 15)
    # And once more, to the end.
    assert grid.run() == 0
    for arm in ("dlm", "ar"):
        assert grid.steps(arm) == whole.steps(arm)
        assert "resume     " in grid.arm_log(arm)
    assert (grid.starts("dlm"), grid.starts("ar")) == (4, 2), "what was finished is not started again"
    assert grid.result()["cells"] == whole.result()["cells"]


def test_a_second_signal_ends_the_arms_at_once(tiny_data: Path, tmp_path: Path) -> None:
    grid = Grid(tmp_path, tiny_data)
    process = grid.start(dlm=3, ar=3)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: STOPPING in grid.arm_log("dlm") and STOPPING in grid.arm_log("ar"), process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 1  # both in the middle of a step that has no end
    for arm in (DLM, AR):
        assert f"failed   {arm} after " in grid.log()
        assert not (grid.output / arm / "checkpoints" / "latest").exists()
    assert grid.log().count("stopped by a second signal before a checkpoint was saved") == 2


def test_an_arm_that_cannot_say_why_it_ended(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid(tmp_path, tiny_data)
    RunFolder(grid.output / DLM).path.mkdir(parents=True)
    RunFolder(grid.output / DLM).write_status(Status(75, "stopped at an earlier start"))
    for command, reason in (("kill -KILL $$", "killed by SIGKILL"), ("exit 3", "exit code 3")):
        monkeypatch.setattr(arms, "COMMAND", ("/bin/sh", "-c", command))
        assert grid.run() == 1
        printed = capsys.readouterr().out
        for arm in (DLM, AR):
            assert f"failed   {arm} after " in printed and f": {reason} (see {grid.output / arm}/train.log)" in printed


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
        masked = ARMS["masked"]
        assert [line.startswith("# finished: ") for line in planned] == [True, True, False]
        assert planned[2] == f"megatron-dlm train --config {whole.output / masked / 'train.yaml'}"
        assert not (whole.output / masked / "metrics.jsonl").exists()
        assert whole.run("--report") == 0 and whole.result()["unfinished"] == [masked]
        assert whole.run() == 0
        assert {c["variant"] for c in whole.result()["cells"][0]["comparisons"]} == {"AR", "AR mask0.5"}
        assert whole.starts("dlm") == whole.starts("ar") == whole.starts("masked") == 1
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
