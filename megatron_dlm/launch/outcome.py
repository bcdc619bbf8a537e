"""How a process of a run ends: a line on stderr, and what status.json is to say."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from megatron_dlm.errors import ConfigError, DataError, TrainingError
from megatron_dlm.run_folder import DONE, FAILED, INVALID, STOPPED, Status

SAVED = Status(STOPPED, "stopped by a signal; a checkpoint is saved")
STOPPED_EARLY = Status(STOPPED, "stopped by a signal before training began; there was nothing to save")
SECOND_SIGNAL = Status(FAILED, "stopped by a second signal before a checkpoint was saved")

_record: list[Callable[[BaseException], object]] = []


def report(error: BaseException | None, prefix: str = "") -> Status:
    """Print ``error``, in one line if its message says all that there is to say, else with its traceback."""
    invalid = isinstance(error, ConfigError | DataError)
    if invalid or isinstance(error, TrainingError):
        say(f"{prefix}{error}")
        return Status(INVALID if invalid else FAILED, str(error))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or "a file of the run"
        reason = f"cannot write {where}: {error.strerror}; make room, and the same command continues the run"
        say(f"{prefix}{reason}")
        return Status(FAILED, reason)
    text = "".join(traceback.format_exception(error))
    print(f"{prefix}{text}", file=sys.stderr, end="", flush=True)
    return Status(FAILED, text.rstrip().rpartition("\n")[2])


def say(reason: str) -> None:
    """Print the line that a run ends with."""
    print(f"megatron-dlm: error: {reason}", file=sys.stderr, flush=True)


def of_exit(end: SystemExit) -> Status:
    """The outcome of a worker function that ended its process."""
    if end.code == STOPPED:
        return SAVED
    if end.code in (None, 0):
        return Status(DONE, "done")
    return Status(FAILED, f"the worker ended with exit code {end.code}")


def record_fatal_with(record: Callable[[BaseException], object]) -> None:
    """Have ``record`` print and note what ``record_fatal`` is given; for whoever started this process's work."""
    _record[:] = [record]


def record_fatal(error: BaseException) -> None:
    """Print ``error`` and note it as what the run has ended with, from any thread."""
    (_record[0] if _record else report)(error)


def end_at_once() -> NoReturn:
    """End this process with exit code 1 from any thread, whatever its main thread waits for."""
    os._exit(FAILED)
