"""The time limit of tests, and that they leave no process behind: planted tests, run by a pytest of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
PLANTED = """
import multiprocessing, os, signal, subprocess, sys, threading, time
from pathlib import Path
import pytest
import tests.limits

HERE = Path(__file__).parent
TICKING = threading.Event()

class Watch(tests.limits.Watch):  # its time begins when a test has started all that it wants to

    def run(self):
        if self.limit == 0:
            TICKING.wait()
        super().run()

tests.limits.Watch = Watch

def note(name):
    (HERE / f"new-{name}").write_text(str(os.getpid()))
    (HERE / f"new-{name}").rename(HERE / f"{name}.pid")

def stubborn_rank():
    os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
    note("rank")
    time.sleep(3600)

def orphan():  # its parent ends at once
    if os.fork() == 0:
        os.setsid()
        note("orphan")
        time.sleep(3600)
    os._exit(0)

def start(*functions):
    ranks = [multiprocessing.get_context("fork").Process(target=function) for function in functions]
    for rank in ranks:
        rank.start()
    return ranks

def wait_for(*names):
    while not all((HERE / f"{name}.pid").exists() for name in names):
        time.sleep(0.01)
"""


def run_planted(folder: Path, source: str, *before: str) -> subprocess.CompletedProcess[str]:
    """The outcome of a pytest with the plugin and nothing else of this one, its command behind ``before``."""
    (folder / "test_planted.py").write_text(PLANTED + source)
    command = [*before, sys.executable, "-m", "pytest", "-p", "tests.limits", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": "", "PLANTED": str(folder)}
    return subprocess.run(
        [*command, "--rootdir", str(folder), "test_planted.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def none_is_left(folder: Path, *names: str) -> bool:
    """Whether these processes were there and are no more, and neither is any other that the planted tests started."""
    assert all((folder / f"{name}.pid").exists() for name in names)
    return not [
        process
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get("PLANTED") == str(folder) and process.status() != psutil.STATUS_ZOMBIE
    ]


def test_at_its_limit_a_test_fails_with_all_that_it_started(tmp_path: Path) -> None:
    source = """
@pytest.mark.time_limit(0)
def test_one_that_hangs():
    ranks = start(stubborn_rank, orphan)
    wait_for("rank", "orphan")
    TICKING.set()
    for rank in ranks:
        rank.join()
    time.sleep(3600)

def test_another():
    pass
"""
    result = run_planted(tmp_path, source)
    assert result.returncode == 1 and "1 failed, 1 passed" in result.stdout
    assert "test_one_that_hangs has reached its time limit of 0 s" in result.stderr
    assert "in test_one_that_hangs" in result.stderr and "in stubborn_rank" in result.stderr, "the stacks of both"
    assert none_is_left(tmp_path, "rank", "orphan")


def test_a_failure_in_time_has_a_limit_for_its_fixtures_too_and_what_cannot_fail_is_ended(tmp_path: Path) -> None:
    source = """
tests.limits.TO_UNWIND = 0.1

@pytest.fixture
def stuck():
    yield
    start(stubborn_rank)
    wait_for("rank")
    TICKING.set()
    while True:
        try:
            time.sleep(3600)
        except BaseException:
            pass

@pytest.mark.time_limit(0)
def test_one_that_fails(stuck):
    assert False
"""
    result = run_planted(tmp_path, source)
    assert result.returncode == 1 and "test_one_that_fails goes on even so: this ends all tests" in result.stderr
    assert none_is_left(tmp_path, "rank")


def test_processes_that_a_test_leaves_behind_fail_it(tmp_path: Path) -> None:
    source = """
tests.limits.TO_END = 0.1

@pytest.fixture(scope="module")
def helper():
    (process,) = start(stubborn_rank)
    wait_for("rank")
    yield process
    process.kill()
    process.join()

def test_one_that_leaves_an_orphan(helper):
    start(orphan)
    wait_for("orphan")

def test_one_that_does_not(helper):
    assert helper.is_alive()
    for process in start(lambda: time.sleep(0.02)):
        process.join()
"""
    result = run_planted(tmp_path, source)
    assert result.returncode == 1
    assert re.search(r"= 2 passed, (\d+ warnings?, )?1 error in ", result.stdout), result.stdout
    assert "ERROR at teardown of test_one_that_leaves_an_orphan" in result.stdout
    assert "the test has left processes behind: " in result.stdout
    assert none_is_left(tmp_path, "rank", "orphan")


def test_ignored_signals_are_not_passed_on(tmp_path: Path) -> None:
    """Scripts start with ``&`` what ignores SIGINT, and nohup what ignores SIGHUP."""
    source = """
def test_signals():
    code = "import signal; print(signal.getsignal(signal.SIGINT) == signal.default_int_handler, "
    code += "signal.getsignal(signal.SIGHUP) == signal.SIG_DFL)"
    assert subprocess.check_output([sys.executable, "-c", code]) == b"True True\\n"
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGHUP)  # nohup stays in force for the tests themselves
"""
    result = run_planted(tmp_path, source, "sh", "-c", 'trap "" INT HUP; exec "$@"', "sh")
    assert result.returncode == 0, result.stdout
