"""Starting workers: exit codes, stop signals, what is printed, status.json.

The worker functions signal the launcher themselves (it is their parent), so that nothing depends on timing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from megatron_dlm import launch
from megatron_dlm.config.tree import Config, ParallelConfig, RunConfig
from megatron_dlm.errors import ConfigError, DataError, TrainingError


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(run=RunConfig(directory=str(tmp_path / "run")))


FORK = multiprocessing.get_context("fork")
LAUNCHER = FORK.Value("i", 0)


def alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def status(config: Config) -> dict:
    return json.loads(Path(config.run.directory, "status.json").read_text())


def note(config: dict, text: str) -> None:
    Path(config["run"]["directory"], f"rank{os.environ['RANK']}").write_text(text)


def notes(config: Config) -> list[str]:
    return [path.read_text() for path in sorted(Path(config.run.directory).glob("rank*"))]


def wait_for(config: dict, ranks: int) -> None:
    while len(list(Path(config["run"]["directory"]).glob("rank*"))) < ranks:
        time.sleep(0.01)


class Stop:
    """A trainer's stop signal: noted, and a second one ends the process."""

    def __init__(self, config: dict) -> None:
        self.count = 0
        signal.signal(signal.SIGTERM, self)
        note(config, "ready")

    def __call__(self, number, frame) -> None:
        self.count += 1
        if self.count == 2:
            os._exit(128 + number)

    def wait(self) -> None:
        while not self.count:
            time.sleep(0.01)


def describe(config: dict) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    note(config, " ".join(os.environ.get(name, "-") for name in names) + f" {torch.get_num_threads()}")


def fail_on_rank_1(config: dict) -> None:
    if os.environ["RANK"] == "1":
        raise RuntimeError("the cause")
    time.sleep(60)


def fail_together(config: dict) -> None:
    note(config, "")
    wait_for(config, 2)
    raise RuntimeError("the cause")


def killed(config: dict) -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def stopped_while_training(config: dict, number: signal.Signals = signal.SIGTERM) -> None:
    stop = Stop(config)
    wait_for(config, 2)
    if os.environ["RANK"] == "0":
        os.kill(os.getppid(), number)
    stop.wait()
    time.sleep(0.2 * (1 + int(os.environ["RANK"])))  # one saves longer than the other
    note(config, "saved")
    raise SystemExit(launch.STOPPED)


def interrupted_while_training(config: dict) -> None:
    stopped_while_training(config, signal.SIGINT)


def stopped_twice(config: dict) -> None:
    stop = Stop(config)
    wait_for(config, 2)
    if os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGTERM)
    stop.wait()
    if os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)


def outlives_the_launcher(config: dict) -> None:
    """The launcher (a process of its own, see the test) is killed; this saves and ends."""
    signal.signal(signal.SIGINT, lambda *_: None)
    note(config, str(os.getpid()))
    wait_for(config, 2)
    if os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGKILL)
    while os.getppid() == LAUNCHER.value:
        time.sleep(0.01)
    raise SystemExit(launch.STOPPED)


def stopped_before_training(config: dict) -> None:
    note(config, "")
    wait_for(config, 2)
    if os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)


@pytest.mark.parametrize("omp", [None, "2"])
def test_workers_know_their_place_and_do_not_share_cores(config, monkeypatch, omp):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    threads = torch.get_num_threads()
    assert launch.launch(describe, config, 2) == 0
    omp = omp or "1"
    assert notes(config) == [f"0 0 2 {omp} {omp}", f"1 1 2 {omp} {omp}"]
    assert status(config) == {"exit_code": 0, "reason": "done"}
    assert torch.get_num_threads() == threads


def test_one_process_runs_here_and_leaves_the_environment_alone(config):
    before = dict(os.environ)
    assert launch.launch(describe, config, 1) == 0
    assert notes(config)[0].startswith("0 0 1 ")
    assert dict(os.environ) == before


def test_the_check_comes_first_and_its_error_is_one_line(config, capfd):
    def check(config: Config, world_size: int) -> None:
        raise DataError("no such file; prepare it")

    assert launch.launch(describe, config, 2, check) == 2
    assert capfd.readouterr().err == "megatron-dlm: error: no such file; prepare it\n"
    assert not Path(config.run.directory).exists(), "what is refused leaves nothing behind"


def test_a_refusal_leaves_an_earlier_status_alone(config):
    def check(config: Config, world_size: int) -> None:
        raise ConfigError("no")

    assert launch.launch(lambda mapping: None, config, 1) == 0
    assert launch.launch(lambda mapping: None, config, 1, check) == 2
    assert status(config) == {"exit_code": 0, "reason": "done"}


@pytest.mark.parametrize("fn", [fail_on_rank_1, fail_together])
def test_a_failure_is_shown_once_and_ends_the_others(config, capfd, fn):
    started = time.monotonic()
    assert launch.launch(fn, config, 2) == 1
    assert time.monotonic() - started < 20
    error = capfd.readouterr().err
    assert error.count("Traceback") == error.count("RuntimeError: the cause") == 1
    assert "ChildFailedError" not in error and "elastic" not in error
    assert status(config) == {"exit_code": 1, "reason": "RuntimeError: the cause"}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("error", "code"), [(DataError("x is truncated"), 2), (TrainingError("x diverges"), 1)])
def test_an_error_that_says_all_is_one_line(config, capfd, world_size, error, code):
    def fn(mapping: dict) -> None:
        raise error

    assert launch.launch(fn, config, world_size) == code
    printed = capfd.readouterr().err
    assert printed.count("\n") == 1 and printed.endswith(f"{error}\n")
    assert status(config) == {"exit_code": code, "reason": str(error)}


def test_a_killed_worker_is_named(config, capfd):
    assert launch.launch(killed, config, 2) == 1
    reason = "the worker of rank 1 was killed by SIGKILL (out of memory?)"
    assert capfd.readouterr().err == f"megatron-dlm: error: {reason}\n"
    assert status(config) == {"exit_code": 1, "reason": reason}


@pytest.mark.parametrize("fn", [stopped_while_training, interrupted_while_training])
def test_a_stop_signal_lets_every_worker_save(config, fn):
    handlers = [signal.getsignal(number) for number in launch.STOP_SIGNALS]
    assert launch.launch(fn, config, 2) == 75
    assert notes(config) == ["saved", "saved"]
    assert status(config) == {"exit_code": 75, "reason": "stopped by a signal; a checkpoint is saved"}
    assert [signal.getsignal(number) for number in launch.STOP_SIGNALS] == handlers


def test_a_second_stop_signal_does_not_wait_for_saving(config):
    started = time.monotonic()
    assert launch.launch(stopped_twice, config, 2) == 1
    assert time.monotonic() - started < 20
    assert "second signal" in status(config)["reason"]


def test_a_stop_signal_before_training_has_nothing_to_save(config):
    assert launch.launch(stopped_before_training, config, 2) == 75
    assert "nothing to save" in status(config)["reason"]


@pytest.mark.parametrize("number", launch.STOP_SIGNALS)
@pytest.mark.skipif(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, reason="nohup keeps a signal from the launcher")
def test_stop_signals_of_a_single_process(config, number):
    def early(config: dict) -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)

    def training(config: dict) -> None:
        previous = signal.getsignal(signal.SIGTERM)
        stop = Stop(config)
        os.kill(os.getpid(), number)
        stop.wait()
        signal.signal(signal.SIGTERM, previous)
        raise SystemExit(launch.STOPPED)

    assert launch.launch(early, config, 1) == 75
    assert "nothing to save" in status(config)["reason"]
    assert launch.launch(training, config, 1) == 75
    assert "saved" in status(config)["reason"]


def test_children_of_the_caller_are_not_taken_for_workers(config):
    def early(config: dict) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    helper = FORK.Process(target=time.sleep, args=(60,))
    helper.start()
    try:
        assert launch.launch(early, config, 1) == 75
        assert helper.is_alive()
    finally:
        helper.kill()


def test_a_killed_worker_is_named_and_not_what_the_others_say_of_it(config, capfd):
    def fn(mapping: dict) -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)
        raise RuntimeError("connection closed by peer")

    assert launch.launch(fn, config, 2) == 1
    assert status(config)["reason"] == "the worker of rank 1 was killed by SIGKILL (out of memory?)"
    assert "rank 1 was killed" in capfd.readouterr().err


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_directory_in_use_is_refused_and_left_alone(config, capfd, world_size):
    def outer(mapping: dict) -> None:
        if os.environ["RANK"] == "0":
            code = launch.launch(lambda inner: note(inner, "second"), config, 1)
            note(mapping, f"{code} {launch.started_by_torchrun()}")

    assert launch.launch(outer, config, world_size) == 0
    assert notes(config)[0].startswith("2 ")
    assert "another run is using run.directory" in capfd.readouterr().err
    assert status(config) == {"exit_code": 0, "reason": "done"}
    assert launch.launch(lambda mapping: None, config, 1) == 0, "the lock ends with the run"


def test_workers_are_out_of_reach_of_the_terminal(config):
    def group(config: dict) -> None:
        note(config, str(os.getpgid(0) == os.getpid()))

    assert launch.launch(group, config, 2) == 0
    assert notes(config) == ["True", "True"]


def test_workers_end_when_the_launcher_was_killed(config):
    def run() -> None:
        LAUNCHER.value = os.getpid()
        launch.launch(outlives_the_launcher, config, 2)

    process = FORK.Process(target=run)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    workers, until = [int(number) for number in notes(config)], time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    left = [worker for worker in workers if alive(worker)]
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert len(workers) == 2 and not left


def test_an_unwritable_directory_is_a_configuration_error(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert launch.launch(describe, Config(run=RunConfig(directory=str(tmp_path / "file"))), 1) == 2
    assert "run.directory" in capfd.readouterr().err


def test_an_old_status_is_gone_while_a_run_lasts(config):
    def look(mapping: dict) -> None:
        note(mapping, str(Path(mapping["run"]["directory"], "status.json").exists()))

    launch.launch(look, config, 1)
    launch.launch(look, config, 1)
    assert notes(config) == ["False"]


@pytest.mark.parametrize(("rank", "local_rank"), [(0, 0), (1, 1), (2, 0)])
@pytest.mark.parametrize("error", [ConfigError("bad key"), DataError("bad file"), None])
def test_joining_torchrun(config, capfd, monkeypatch, rank, local_rank, error):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("WORLD_SIZE", "3")
    ran = []

    def check(config: Config, world_size: int) -> None:
        assert world_size == 3
        if error:
            raise error

    code = launch.join(lambda mapping: ran.append(mapping["run"]["seed"]), config, check)
    checks = local_rank == 0 and error is not None
    prints = checks and (rank == 0 or isinstance(error, DataError))
    assert code == (2 if checks else 0)
    assert ran == ([] if checks else [1234])
    assert capfd.readouterr().err == (f"megatron-dlm: error: {error}\n" if prints else "")
    assert Path(config.run.directory, "status.json").exists() == (rank == 0)
    if rank == 0:
        assert status(config)["exit_code"] == code


def test_joining_torchrun_passes_on_the_exit_code(config, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launch.join(lambda mapping: sys.exit(75), config) == 75
    assert status(config)["exit_code"] == 75
    assert launch.join(lambda mapping: 1 / 0, config) == 1
    assert "ZeroDivisionError" in status(config)["reason"] and "Traceback" in capfd.readouterr().err


def test_torchrun_is_recognised(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert not launch.started_by_torchrun()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK is not"):
        launch.started_by_torchrun()
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    assert launch.started_by_torchrun()


@pytest.mark.parametrize(
    ("gpus", "data_parallel_size", "expected"),
    [(0, None, 4), (0, 3, 12), (8, None, 8), (8, 2, 8), (16, 2, 8), (4, 2, None)],
)
def test_number_of_workers(monkeypatch, gpus, data_parallel_size, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = Config(
        parallel=ParallelConfig(
            tensor_model_parallel_size=2, pipeline_model_parallel_size=2, data_parallel_size=data_parallel_size
        )
    )
    if expected is None:
        with pytest.raises(ConfigError, match="needs 8 GPUs but this machine has 4"):
            launch.count_workers(config)
    else:
        assert launch.count_workers(config) == expected
