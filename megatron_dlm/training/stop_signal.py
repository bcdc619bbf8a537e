"""Stop signals: finish the step, save, and exit with the code that means "start me again"."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopSignal:
    """Notes SIGTERM and SIGINT instead of dying; a second one exits at once.

    The ranks agree on the flag inside the training step, so that all of them save the same step.
    """

    def __init__(self, *, announce: bool = False) -> None:
        """``announce`` says on stderr that the signal has arrived; for one rank."""
        self.requested = False
        self._announce = announce

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        if self._announce:
            os.write(2, b"\nstopping after this step, and saving; once more to exit at once\n")
