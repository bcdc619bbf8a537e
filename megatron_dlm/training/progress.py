"""How far a run has come; with the configuration it decides what every later step sees."""

from __future__ import annotations

from typing import NamedTuple


class Progress(NamedTuple):
    """How far a run has come."""

    step: int = 0
    """Completed steps."""
    consumed_samples: int = 0
    """Samples of those steps: the id of the next one. Batches, data order and noise follow from it."""
    skipped: int = 0
    """Steps that were skipped, because their gradient was not finite."""
    skipped_in_a_row: int = 0
    """The last ones of them."""

    def after(self, samples: int, *, applied: bool) -> Progress:
        """One step of so many samples further."""
        return Progress(
            step=self.step + 1,
            consumed_samples=self.consumed_samples + samples,
            skipped=self.skipped + (not applied),
            skipped_in_a_row=0 if applied else self.skipped_in_a_row + 1,
        )
