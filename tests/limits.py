"""A pytest plugin: every test has a time limit and leaves no process behind, however pytest itself was started.

At its limit a test is told of (which one, and the stacks of this process and of those it forked), all processes that
it has started are killed, and it fails; if it then hangs even so, this process ends. Orphans count: this process is
the subreaper of its descendants, so one whose parent has gone becomes a child of this process and not of init.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator, Set
from types import FrameType

import psutil
import pytest

STACKS = signal.SIGUSR1
"""At this signal a process that was forked from this one (or by one that was) prints its stacks."""
TO_UNWIND = 60.0
"""Seconds that a test gets to fail after its limit, with fixtures that clean up."""
TO_END = 20.0
"""Seconds that processes get to end by themselves after a test; on a busy machine even a killed one takes a while."""
PR_SET_CHILD_SUBREAPER = 36
WATCH = pytest.StashKey["Watch"]()
STDERR = pytest.StashKey[int]()


def children() -> set[psutil.Process]:
    """The processes that this one has started, and orphans; zombies too."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # most tests start none, and this says so without reading the whole of /proc
        return set()
    return set(psutil.Process().children())


def descendants(spared: Set[psutil.Process]) -> set[psutil.Process]:
    """The children but ``spared``, and all that they have started."""
    found = children() - spared
    for child in list(found):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.update(child.children(recursive=True))
    return found


def running(processes: Set[psutil.Process]) -> set[psutil.Process]:
    """Those that have not ended."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
    return found


def end(spared: Set[psutil.Process]) -> None:
    """Kill ``descendants(spared)`` until no new one shows up. Who has started them still finds their exit codes."""
    until = time.monotonic() + TO_END
    while (found := running(descendants(spared))) and time.monotonic() < until:
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.02)


class Watch(threading.Thread):
    """Waits for the end of one test. A thread, because a test that hangs in C code does not handle signals."""

    def __init__(self, name: str, limit: float, stderr: int) -> None:
        super().__init__(daemon=True)
        self.test, self.limit, self.stderr = name, limit, stderr
        self.over = threading.Event()
        self.late = False

    def run(self) -> None:
        if self.over.wait(self.limit):
            return
        self.late = True
        self.say(f"{self} Its stacks, and then those of the processes that it forked:")
        faulthandler.dump_traceback(self.stderr)
        for process in sorted(running(descendants(set())), key=lambda process: process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.say(f"{process.pid}: {process.cmdline()}")
                process.send_signal(STACKS)  # ends those that do not know it
            time.sleep(0.2)  # one after the other, or their lines would mix
        end(set())
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        if not self.over.wait(TO_UNWIND):
            self.say(f"{self.test} goes on even so: this ends all tests.")
            os._exit(1)

    def say(self, text: str) -> None:
        os.write(self.stderr, f"\n{text}\n".encode())

    def __str__(self) -> str:
        return f"{self.test} has reached its time limit of {self.limit:g} s."


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("time_limit", "seconds that a test may take, with its fixtures", default="600")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "time_limit(seconds): another time limit than that of the configuration")
    # What a script starts with `&` ignores Ctrl-C, and all that it starts does; so do tests of just that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Under nohup these tests still outlive the terminal, but what they start does not know of it: a handler is
    # forgotten by exec, other than SIG_IGN.
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: None)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    config.stash[STDERR] = os.dup(2)  # what a test prints is captured; this is not
    faulthandler.register(STACKS, config.stash[STDERR])

    def out_of_time(number: int, frame: FrameType | None) -> None:
        pytest.fail("the test has reached its time limit")

    signal.signal(signal.SIGALRM, out_of_time)


def pytest_unconfigure(config: pytest.Config) -> None:
    end(set())  # what fixtures with a wider scope have forgotten
    faulthandler.unregister(STACKS)
    os.close(config.stash[STDERR])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """The limit is that of a test with the setting up and the tearing down of its fixtures."""
    marker = item.get_closest_marker("time_limit")
    limit = float(marker.args[0] if marker else item.config.getini("time_limit"))
    watch = item.config.stash[WATCH] = Watch(item.nodeid, limit, item.config.stash[STDERR])
    watch.start()
    try:
        return (yield)
    finally:
        watch.over.set()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """What caught the failure at the limit does not pass for it."""
    result = yield
    if item.config.stash[WATCH].late:
        pytest.fail(str(item.config.stash[WATCH]), pytrace=False)
    return result


def pytest_enter_pdb(config: pytest.Config) -> None:
    config.stash[WATCH].over.set()


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Those of fixtures with a wider scope may stay: they are set up before this one."""
    before = children()
    yield
    until = time.monotonic() + TO_END
    while (left := running(descendants(before))) and time.monotonic() < until:
        time.sleep(0.02)
    commands = []
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            commands.append(f"{process.pid}: {process.cmdline()}")
    end(before)
    multiprocessing.active_children()  # takes note of the ends of its own
    for orphan in children() - before:
        os.waitpid(orphan.pid, os.WNOHANG)
    if commands:
        pytest.fail("the test has left processes behind: " + ", ".join(commands), pytrace=False)
