"""Stop signals: the launcher hands them on, workers finish the step, save, and exit with "start me again"."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from types import FrameType

import psutil

from megatron_dlm.run_folder import STOPPED

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""What a batch system sends some minutes before it ends a job (Slurm's --signal)."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *WARNINGS)


_PR_SET_PDEATHSIG = 1
_warned: list[int] = []


def was_warned() -> bool:
    """Whether this process has had a warning; a SIGTERM may also come from torchrun, when another process fails."""
    return bool(_warned)


def stop_with_parent(parent: int) -> None:
    """Have this process get a SIGTERM when ``parent`` dies, even if that is killed; at once where it has died already.

    A flag of the process (PR_SET_PDEATHSIG), which a program that takes its place keeps. Only Linux has it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


class Stopped(BaseException):
    """A stop signal came while there was no training to save."""


class SecondSignal(BaseException):
    """A second stop signal came before what the first one had asked for was done; warnings do not count."""


class StopHandler:
    """Stop signals of the launcher, handed to whoever can save: workers, or the trainer in this process.

    Workers get a SIGTERM (or a warning), and then ``second``: a SIGKILL ends a worker that is stuck as well. While
    there is neither, ``Stopped`` is raised. Workers are in process groups of their own, so that a terminal's Ctrl-C
    comes to them once and from here.
    """

    def __init__(self, *, hands_on: bool = False, second: signal.Signals = signal.SIGKILL) -> None:
        """``hands_on``: this process's children are workers, and not compilers that a library has started."""
        self.hands_on = hands_on
        self.warned = False
        self.received = 0
        """Signals that were no warnings."""
        self.second = second
        self.owner = os.getpid()
        # Of whoever calls this as a library: helpers of multiprocessing, say.
        self.others = set(psutil.Process().children())

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.owner:
            os._exit(STOPPED)  # a worker in the moment after its fork
        if number in WARNINGS:
            _warned.append(number)
            self.warned, wanted = True, signal.SIGUSR1
        else:
            self.received += 1
            wanted = signal.SIGTERM if self.received == 1 else self.second
        # Not multiprocessing.active_children(), which does not know a worker that is being started just now.
        workers = set(psutil.Process().children()) - self.others if self.hands_on else set()
        if signal.getsignal(signal.SIGTERM) is not self:
            os.kill(self.owner, signal.SIGTERM)
        elif workers:
            for worker in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.send_signal(wanted)
        else:
            raise Stopped

    def __enter__(self) -> StopHandler:
        _warned.clear()
        self.previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number, previous in self.previous.items():
            if previous is not signal.SIG_IGN:  # nohup stays in force
                signal.signal(number, self)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, previous in self.previous.items():
            signal.signal(number, previous)


class StopSignal:
    """Notes a worker's stop signals instead of dying; at a second one ``SecondSignal`` is raised.

    The ranks agree on the flag inside the training step, so that all of them save the same step.
    """

    def __init__(self, *, announce: bool = False) -> None:
        """``announce`` says on stderr that the signal has arrived; for one rank."""
        self.requested = False
        self._final = False
        self._announce = announce

    def __enter__(self) -> StopSignal:
        numbers = (signal.SIGTERM, signal.SIGINT, *WARNINGS)
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in WARNINGS:
            _warned.append(number)
        elif self._final:
            raise SecondSignal
        self._final = self._final or number not in WARNINGS
        announce, self.requested = self._announce and not self.requested, True
        if announce:
            os.write(2, b"\nstopping after this step, and saving; once more to exit at once\n")
