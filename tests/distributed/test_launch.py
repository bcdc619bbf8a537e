"""Starting workers: exit codes, stop signals, what is printed, status.json.

The worker functions signal the launcher themselves (it is their parent), and wait for one another, so that nothing
depends on timing. What must be ended from outside waits for an hour, far beyond the time limit of a test.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from megatron_dlm.config.tree import Config, RunConfig
from megatron_dlm.errors import ConfigError, DataError, TrainingError
from megatron_dlm.launch import launcher as launch
from megatron_dlm.launch import place
from megatron_dlm.launch.stop_signal import STOP_SIGNALS
from megatron_dlm.run_folder import STOPPED


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(run=RunConfig(directory=str(tmp_path / "run")))


FORK = multiprocessing.get_context("fork")
LAUNCHER = FORK.Value("i", 0)
HOUR = 3600


def alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def status(config: Config) -> dict:
    return json.loads(Path(config.run.directory, "status.json").read_text())


def note(config: dict, text: str, kind: str = "note") -> None:
    """Leave ``text`` for the others: all of it at once, so that nobody reads a part."""
    path = Path(config["run"]["directory"], f"{kind}-{os.environ['RANK']}")
    path.with_name(f".{path.name}").write_text(text)
    path.with_name(f".{path.name}").rename(path)


def notes(directory: str, kind: str = "note") -> list[str]:
    return [path.read_text() for path in sorted(Path(directory).glob(f"{kind}-*"))]


def meet(config: dict) -> list[int]:
    """Wait until both workers are here; their process ids by rank."""
    note(config, str(os.getpid()), "process")
    while len(processes := notes(config["run"]["directory"], "process")) < 2:
        time.sleep(0.01)
    return [int(process) for process in processes]


class Stop:
    """A trainer's stop signal: noted."""

    def __init__(self, config: dict) -> None:
        self.count, self.config = 0, config
        signal.signal(signal.SIGTERM, self)

    def __call__(self, number, frame) -> None:
        self.count += 1

    def wait(self) -> None:
        while not self.count:
            time.sleep(0.01)


def describe(config: dict) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    note(config, " ".join(os.environ.get(name, "-") for name in names) + f" {torch.get_num_threads()}")


def fail_on_rank_1(config: dict) -> None:
    if os.environ["RANK"] == "1":
        raise RuntimeError("the cause")
    time.sleep(HOUR)


def fail_together(config: dict) -> None:
    meet(config)
    raise RuntimeError("the cause")


def killed(config: dict) -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(HOUR)


def stopped_while_training(config: dict, number: signal.Signals = signal.SIGTERM) -> None:
    stop = Stop(config)
    meet(config)
    if os.environ["RANK"] == "0":
        os.kill(os.getppid(), number)
    stop.wait()
    while os.environ["RANK"] == "1" and not notes(config["run"]["directory"]):  # it saves for longer than rank 0
        time.sleep(0.01)
    note(config, "saved")
    raise SystemExit(STOPPED)


def interrupted_while_training(config: dict) -> None:
    stopped_while_training(config, signal.SIGINT)


def stopped_twice(config: dict) -> None:
    """Rank 0 notes signals and does not end; rank 1 is stopped, so that it cannot even note them."""
    stop = Stop(config)
    processes = meet(config)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    while psutil.Process(processes[1]).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGTERM)
    stop.wait()
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(HOUR)


def warned_while_training(config: dict) -> None:
    """A warning and then the first signal: that is no second one."""
    received = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(number))
    meet(config)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        if os.environ["RANK"] == "0":
            os.kill(os.getppid(), signal.SIGUSR2 if number == signal.SIGUSR1 else number)
        while number not in received:
            time.sleep(0.01)
    note(config, "saved")
    raise SystemExit(STOPPED)


def outlives_the_launcher(config: dict) -> None:
    """The launcher (a process of its own, see the test) is killed; this saves and ends."""
    signal.signal(signal.SIGINT, lambda *_: None)
    meet(config)
    if os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGKILL)
    while os.getppid() == LAUNCHER.value:
        time.sleep(0.01)
    raise SystemExit(STOPPED)


def stopped_before_training(config: dict) -> None:
    meet(config)
    if os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(HOUR)


@pytest.mark.parametrize("omp", [None, "2"])
def test_workers_know_their_place_and_do_not_share_cores(config, monkeypatch, omp):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    threads = torch.get_num_threads()
    assert launch.launch(describe, config, 2) == 0
    omp = omp or "1"
    assert notes(config.run.directory) == [f"0 0 2 {omp} {omp}", f"1 1 2 {omp} {omp}"]
    assert status(config) == {"exit_code": 0, "reason": "done"}
    assert torch.get_num_threads() == threads


def test_one_process_runs_here_and_leaves_the_environment_alone(config):
    before = dict(os.environ)
    assert launch.launch(describe, config, 1) == 0
    assert notes(config.run.directory)[0].startswith("0 0 - ")
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
    assert launch.launch(fn, config, 2) == 1
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


@pytest.mark.parametrize("fn", [stopped_while_training, interrupted_while_training, warned_while_training])
def test_a_stop_signal_lets_every_worker_save(config, fn):
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    assert launch.launch(fn, config, 2) == 75
    assert notes(config.run.directory) == ["saved", "saved"]
    assert status(config) == {"exit_code": 75, "reason": "stopped by a signal; a checkpoint is saved"}
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers


def test_a_second_stop_signal_does_not_wait_for_saving(config):
    assert launch.launch(stopped_twice, config, 2) == 1
    assert "second signal" in status(config)["reason"]


def test_a_stop_signal_before_training_has_nothing_to_save(config):
    assert launch.launch(stopped_before_training, config, 2) == 75
    assert "nothing to save" in status(config)["reason"]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_stop_signals_of_a_single_process(config, number):
    def early(config: dict) -> None:
        os.kill(os.getpid(), number)
        time.sleep(HOUR)

    def training(config: dict) -> None:
        previous = signal.getsignal(signal.SIGTERM)
        stop = Stop(config)
        os.kill(os.getpid(), number)
        stop.wait()
        signal.signal(signal.SIGTERM, previous)
        raise SystemExit(STOPPED)

    assert launch.launch(early, config, 1) == 75
    assert "nothing to save" in status(config)["reason"]
    assert launch.launch(training, config, 1) == 75
    assert "saved" in status(config)["reason"]


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_ignored_signal_stays_ignored(config, world_size, number):
    """So that nohup stays in force, and a Ctrl-C is not for what a script has started with ``&``."""

    def fn(mapping: dict) -> None:
        os.kill(os.getpid(), number)
        note(mapping, str(signal.getsignal(number) is signal.SIG_IGN))

    previous = signal.signal(number, signal.SIG_IGN)
    try:
        assert launch.launch(fn, config, world_size) == 0
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, previous)
    assert notes(config.run.directory) == ["True"] * world_size


def test_children_of_the_caller_are_not_taken_for_workers(config):
    def early(config: dict) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(HOUR)

    helper = FORK.Process(target=time.sleep, args=(HOUR,))
    helper.start()
    try:
        assert launch.launch(early, config, 1) == 75
        assert helper.is_alive()
    finally:
        helper.kill()
        helper.join()


def test_a_killed_worker_is_named_and_not_what_the_others_say_of_it(config, capfd):
    def fn(mapping: dict) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # or the launcher would end this before it complains
        processes = meet(mapping)
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        while psutil.pid_exists(processes[1]):  # until the launcher has taken note of its end
            time.sleep(0.01)
        raise RuntimeError("connection closed by peer")

    assert launch.launch(fn, config, 2) == 1
    assert status(config)["reason"] == "the worker of rank 1 was killed by SIGKILL (out of memory?)"
    assert "rank 1 was killed" in capfd.readouterr().err


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_directory_in_use_is_refused_and_left_alone(config, capfd, world_size):
    def outer(mapping: dict) -> None:
        if os.environ["RANK"] == "0":
            code = launch.launch(lambda inner: note(inner, "second"), config, 1)
            note(mapping, f"{code} {place.adopt()}")

    assert launch.launch(outer, config, world_size) == 0
    assert notes(config.run.directory)[0].startswith("2 ")
    assert "another run is using run.directory" in capfd.readouterr().err
    assert status(config) == {"exit_code": 0, "reason": "done"}
    assert launch.launch(lambda mapping: None, config, 1) == 0, "the lock ends with the run"


def test_workers_are_out_of_reach_of_the_terminal(config):
    def group(config: dict) -> None:
        note(config, str(os.getpgid(0) == os.getpid()))

    assert launch.launch(group, config, 2) == 0
    assert notes(config.run.directory) == ["True", "True"]


def test_workers_end_when_the_launcher_was_killed(config):
    def run() -> None:
        LAUNCHER.value = os.getpid()
        launch.launch(outlives_the_launcher, config, 2)

    process = FORK.Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    workers = [int(number) for number in notes(config.run.directory, "process")]
    assert len(workers) == 2
    while any(map(alive, workers)):
        time.sleep(0.01)


def test_an_unwritable_directory_is_a_configuration_error(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert launch.launch(describe, Config(run=RunConfig(directory=str(tmp_path / "file"))), 1) == 2
    assert "run.directory" in capfd.readouterr().err


def test_an_old_status_is_gone_while_a_run_lasts(config):
    def look(mapping: dict) -> None:
        note(mapping, str(Path(mapping["run"]["directory"], "status.json").exists()))

    launch.launch(look, config, 1)
    launch.launch(look, config, 1)
    assert notes(config.run.directory) == ["False"]
