"""`megatron-dlm train` on two processes and a stop signal: what is saved, how it ends, and that nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from megatron_dlm.cli import main
from tests.runs import TINY

ROOT = Path(__file__).parents[2]
STEPS = 40
# What a step says about itself and not about the machine.
TRAJECTORY = "step loss grad_norm lr epoch skipped accuracy loss_by_mask_ratio training_flops".split()


class Run:
    """A run directory, and the command that starts and continues its run, as far as the test allows."""

    def __init__(self, folder: Path, data: Path, *, checkpoint_interval: int = 1000) -> None:
        self.directory = folder / "run"
        self.pace = folder / "pace"
        tree: dict[str, Any] = {name: dict(values) for name, values in TINY.items()}
        tree["run"]["directory"] = str(self.directory)
        tree["data"] |= {"train": [{"path": str(data / "train")}], "valid": [{"path": str(data / "valid")}]}
        tree["train"] |= {"steps": STEPS, "log_interval": 20}
        tree["evaluate"] = {"interval": 20, "sequences": 8}
        tree["checkpoint"] = {"interval": checkpoint_interval}
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(tree))

    def allow(self, steps: int) -> None:
        """Let the run go on to this step, at which it waits."""
        self.pace.with_suffix(".new").write_text(str(steps))
        self.pace.with_suffix(".new").rename(self.pace)

    def start(self, steps: int, *options: str) -> subprocess.Popen[str]:
        """Start the command on two processes, and return when it waits with ``steps`` steps on record."""
        self.allow(steps)
        command = [sys.executable, "-m", "tests.paced_command", "train", "--config", str(self.config)]
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        process = subprocess.Popen(
            [*command, "--parallel.data_parallel_size", "2", *options],
            cwd=ROOT,
            env={**environment, "PACE": str(self.pace)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while len(self.steps()) < steps:
            assert process.poll() is None or len(self.steps()) >= steps, process.communicate()
            time.sleep(0.01)
        return process

    def signal(self, process: subprocess.Popen[str], number: signal.Signals) -> None:
        """Ask the run to stop, and return when it has said that it will."""
        process.send_signal(number)
        assert process.stderr is not None
        while "stopping after this step, and saving" not in (line := process.stderr.readline()):
            assert line and "Traceback" not in line, process.communicate()

    def steps(self) -> list[dict[str, Any]]:
        path = self.directory / "metrics.jsonl"
        whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
        return [{key: r[key] for key in TRAJECTORY} for r in map(json.loads, whole) if "loss" in r]

    def evaluations(self) -> list[tuple[int, float]]:
        records = map(json.loads, (self.directory / "metrics.jsonl").read_text().splitlines())
        return [(r["step"], r["valid_nelbo"]) for r in records if "valid_nelbo" in r]

    def saved_step(self) -> int:
        root = self.directory / "checkpoints"
        latest = root / (root / "latest").read_text().strip()
        return int(json.loads((latest / "checkpoint.json").read_text())["step"])

    def status(self) -> dict[str, Any]:
        return json.loads((self.directory / "status.json").read_text())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Run:
    run = Run(tmp_path_factory.mktemp("uninterrupted"), tiny_data)
    process = run.start(STEPS)
    _, error = process.communicate()
    assert process.returncode == 0, error
    return run


def test_a_run_stopped_twice_is_the_run_that_was_not(uninterrupted: Run, tiny_data: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, tiny_data)
    stopped_at = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        process = run.start(stopped_at + 5)
        run.signal(process, number)
        run.allow(STEPS)
        output, error = process.communicate()
        assert process.returncode == 75, error
        assert "Traceback" not in error
        assert f"stopped    at step {run.saved_step()}/{STEPS}" in output
        assert "the same command continues the run" in output
        assert run.status() == {"exit_code": 75, "reason": "stopped by a signal; a checkpoint is saved"}
        # Every rank has saved this step, and none has trained beyond it: the whole of it is loaded below. A rank that
        # was waiting for its step tells the others in the next one.
        assert stopped_at + 6 <= run.saved_step() == len(run.steps()) <= stopped_at + 7
        stopped_at = run.saved_step()
    process = run.start(STEPS)
    output, error = process.communicate()
    assert process.returncode == 0, error
    assert f"step-{stopped_at:08d}" in output and f"finished   at step {STEPS}/{STEPS}" in output
    assert run.steps() == uninterrupted.steps() and len(run.steps()) == STEPS
    assert run.evaluations() == uninterrupted.evaluations() and len(run.evaluations()) == 2


def test_a_rank_that_hangs_is_found_and_named(tiny_data: Path, tmp_path: Path) -> None:
    """Stopped by SIGSTOP: it does not answer, keeps its connections, and takes no other signal."""
    run = Run(tmp_path, tiny_data)
    process = run.start(6, "--run.step_timeout_minutes", str(10 / 60))
    worker = sorted(psutil.Process(process.pid).children(), key=psutil.Process.create_time)[1]
    worker.suspend()
    since = time.monotonic()
    run.allow(STEPS)
    _, error = process.communicate()
    took = time.monotonic() - since
    print(f"found and ended after {took:.1f} s: {error}")
    assert process.returncode == 1 and error.count("\n") == 1
    named = f"rank 1 (process {worker.pid} on {socket.gethostname()}) does not answer, last heard of at "
    assert f"no progress in 10 seconds of training at step 7: {named}" in error
    assert run.status() == {"exit_code": 1, "reason": error.strip().removeprefix("megatron-dlm: error: [rank 0] ")}
    stacks = [(run.directory / "stacks" / f"rank-{rank:05d}.txt").read_text() for rank in (0, 1)]
    assert "pipeline" in stacks[0] and "step.py" in stacks[0], "it waits for the other in a collective"
    assert "Fatal Python error: Aborted" in stacks[1] and "paced_command.py" in stacks[1], "where it was stopped"
    collectives = json.loads((run.directory / "stacks" / "collectives-00000.json").read_text())
    assert collectives["entries"], "the flight recorder has recorded"
    assert took < 30 or psutil.getloadavg()[0] > 8


def test_a_second_signal_ends_the_run_at_once(tiny_data: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, tiny_data, checkpoint_interval=1)
    process = run.start(1)
    while not (run.directory / "checkpoints" / "latest").exists():
        time.sleep(0.01)
    run.signal(process, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    process.communicate()  # in the middle of a step that has no end
    assert process.returncode == 1
    assert run.status()["reason"] == "stopped by a second signal before a checkpoint was saved"
    assert run.saved_step() == 1
    assert not list((run.directory / "checkpoints").glob(".*partial*"))
    options = ("--train.steps", "2", "--optimizer.warmup_steps", "1", "--optimizer.decay_steps", "1")
    assert main(["train", "--config", str(run.config), *options]) == 0
    assert run.saved_step() == 2
