"""What this process is doing and whether it goes on, for whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass

VERIFYING = "verifying the data"
"""A phase without a limit of its own: how long it takes depends on the size of the files."""


@dataclass
class Pulse:
    """Written by the main thread, read by any."""

    phase: str = "starting"
    """Such as "training" or "saving"."""
    step: int = 0
    """Completed training steps."""
    progress: int = 0
    """Grows whenever something was done: phases begun, micro-batches computed."""

    def begin(self, phase: str, step: int) -> None:
        """Say what is done from now on."""
        self.phase, self.step = phase, step
        self.progress += 1

    def beat(self) -> None:
        """Say that it goes on."""
        self.progress += 1


PULSE = Pulse()
"""Of this process."""
