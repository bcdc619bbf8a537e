"""Stop signals: the launcher hands them on, workers finish the step, save, and exit with "start me again"."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

import psutil

from megatron_dlm.run_folder import STOPPED

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""What a batch system sends some minutes before it ends a job (Slurm's --signal)."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *WARNINGS)


class Stopped(BaseException):
    """A stop signal came while there was no training to save."""


class SecondSignal(BaseException):
    """A second stop signal came before what the first one had asked for was done; warnings do not count."""


class StopHandler:
    """Stop signals of the launcher, handed to whoever can save: workers, or the trainer in this process.

    They get a SIGTERM (or a warning), and then ``second``: a SIGKILL ends a worker that is stuck as well. While there
    is neither, ``Stopped`` is raised. Workers are in process groups of their own, so that a terminal's Ctrl-C comes to
    them once and from here.
    """

    def __init__(self, second: signal.Signals = signal.SIGKILL) -> None:
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
            self.warned, wanted = True, signal.SIGUSR1
        else:
            self.received += 1
            wanted = signal.SIGTERM if self.received == 1 else self.second
        # Not multiprocessing.active_children(), which does not know a worker that is being started just now.
        workers = set(psutil.Process().children()) - self.others
        if signal.getsignal(signal.SIGTERM) is not self:
            os.kill(self.owner, signal.SIGTERM)
        elif workers:
            for worker in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.send_signal(wanted)
        else:
            raise Stopped

    def __enter__(self) -> StopHandler:
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
        if self._final and number not in WARNINGS:
            raise SecondSignal
        self._final = self._final or number not in WARNINGS
        announce, self.requested = self._announce and not self.requested, True
        if announce:
            os.write(2, b"\nstopping after this step, and saving; once more to exit at once\n")
