"""The error of a run that cannot go on."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training cannot go on, through nothing that the configuration shows. One line: the cause and the fix."""
