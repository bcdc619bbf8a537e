"""The errors that a user can do something about; each message is one line with the cause and the fix."""

from __future__ import annotations


class ConfigError(ValueError):
    """The configuration cannot be run."""


class DataError(ValueError):
    """Data cannot be read or written; the message names the file."""


class TrainingError(RuntimeError):
    """Training cannot go on, through nothing that the configuration shows."""
