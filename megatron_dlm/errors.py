"""The errors that a user can do something about; each message is one line with the cause and the fix."""

from __future__ import annotations

_LONGEST = 2000  # characters of a message


def one_line(text: str) -> str:
    """``text`` on one line: escapes for what a terminal would obey, and without its middle where it is very long.

    Messages quote names and values of files that anybody may have written.
    """
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class ConfigError(ValueError):
    """The configuration cannot be run."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class DataError(ValueError):
    """Data cannot be read or written; the message names the file."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class TrainingError(RuntimeError):
    """Training cannot go on, through nothing that the configuration shows."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))
