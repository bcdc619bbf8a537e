"""A run's folder: the name of everything in it, how the run ended, and the one reader of its records."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dlm.errors import DataError
from megatron_dlm.files import check_file_output, json_text, open_regular, read_bytes, write_text

DONE, FAILED, INVALID, STOPPED = 0, 1, 2, 75
"""Exit codes of a run: done, failed, refused before it began, and stopped with everything saved: start it again."""

_REMEDY = "give a run's directory or its metrics.jsonl"
_TAIL = 2**17  # bytes that hold the last records of a run
_LARGEST_STATUS = 2**20  # bytes


class Status(NamedTuple):
    """How a run ended."""

    exit_code: int
    reason: str


class Records(NamedTuple):
    """What a run has recorded, in the order of its steps."""

    steps: list[dict[str, Any]]
    """One for each training step."""
    evaluations: list[dict[str, Any]]
    """One for each held-out evaluation."""

    def curves(self) -> list[list[dict[str, Any]]]:
        """The evaluations, apart for each held-out data that the run had, the present one last."""
        # Records without a name are older than names are.
        unnamed = next((record["valid_data"] for record in self.evaluations if "valid_data" in record), None)
        found: dict[Any, list[dict[str, Any]]] = {}
        for record in self.evaluations:
            name = record.get("valid_data", unnamed)
            # What a run returns to is the present one again.
            found[name] = [*found.pop(name, []), record]
        return list(found.values())

    @property
    def curve(self) -> list[dict[str, Any]]:
        """The evaluations with the held-out data of the last one; empty where there is none."""
        return next(reversed(self.curves()), [])


@dataclass(frozen=True)
class RunFolder:
    """The files of a run. None of them need be there."""

    path: Path

    @classmethod
    def at(cls, path: str | Path) -> RunFolder:
        """The folder ``path``, or that of the metrics.jsonl ``path``. Raises ``DataError`` for any other file."""
        folder = cls(Path(path))
        if folder.path.is_file():
            folder = cls(folder.path.parent)
            if folder.metrics.name != Path(path).name:
                raise DataError(f"{path} is no run's record; {_REMEDY}")
        return folder

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    def earlier_config(self, step: int) -> Path:
        """The configuration of the steps up to ``step``, from which the run went on with another one."""
        return self.path / f"config.step-{step:08d}.yaml"

    @property
    def metrics(self) -> Path:
        """Records of steps, evaluations and changes of the configuration, a line each."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """What the model has written at evaluations, a line each."""
        return self.path / "samples.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's events."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def status_file(self) -> Path:
        """How the run ended; not there while it runs."""
        return self.path / "status.json"

    @property
    def lock(self) -> Path:
        """Locked by the run that is writing the folder."""
        return self.path / ".lock"

    @property
    def owner(self) -> Path:
        """Host and process of the run that is writing the folder, where the file system has no locks."""
        return self.path / ".owner.json"

    @property
    def stacks(self) -> Path:
        """Folder of the Python stacks of ranks that did not go on, a file each."""
        return self.path / "stacks"

    @property
    def stop_marker(self) -> Path:
        """Names the start of torchrun whose workers were stopped by a signal, and must not be started again."""
        return self.path / ".stopped"

    def status(self) -> Status | None:
        """How the run ended; None while it runs, and where nothing can be read."""
        try:
            content = json.loads(read_bytes(self.status_file, _LARGEST_STATUS).decode())
            return Status(int(content["exit_code"]), str(content["reason"]))
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None

    def check_writable(self) -> None:
        """Find what would keep a run from writing its files: one that is none, say. Raises ``DataError``, one line."""
        if self.path.is_dir():
            for file in (self.config, self.metrics, self.samples, self.status_file, self.lock):
                check_file_output(file, "run.directory")
        if os.path.lexists(self.tensorboard) and not self.tensorboard.is_dir():
            raise DataError(f"cannot write {self.tensorboard}: it is no directory; choose another run.directory")

    def write_status(self, status: Status) -> None:
        """Record how the run ended. Raises ``OSError``."""
        write_text(self.status_file, json_text(status._asdict()))

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended at its last step."""
        status = self.status()
        return status is not None and status.exit_code == DONE

    def records(self, remedy: str = _REMEDY, *, skip_damaged: bool = False) -> Records:
        """All records; what is no number in them is None. ``skip_damaged`` and ``DataError`` as for ``read_lines``."""
        lines = read_lines(self.metrics, skip_damaged=skip_damaged, remedy=remedy)
        return _sorted(record if "kind" in record else _numbers(record) for record in lines)

    def last_records(self) -> Records:
        """The last ones (of a run that may be writing), as far as they can be read; empty where there are none."""
        try:
            with open_regular(self.metrics) as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
                lines = file.read().splitlines()
        except OSError:
            lines = []
        # The first is cut by the seek, the last may be half written.
        return _sorted(record for line in lines if (record := _record(line)) is not None)


def number(value: Any) -> float:
    """A value of a record; NaN where it is no number, as null is, which stands for one that was not finite."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def is_evaluation(record: dict[str, Any]) -> bool:
    """Whether a record is of a held-out evaluation, not of a training step."""
    return "valid_nelbo" in record


def is_configuration(record: dict[str, Any]) -> bool:
    """Whether a record is of keys that the configuration changed at its step, where the run went on."""
    return record.get("kind") == "configuration"


def _sorted(records: Iterable[dict[str, Any]]) -> Records:
    """What is of a step or an evaluation; records of other kinds have a ``kind``."""
    found = Records([], [])
    for record in records:
        if "kind" not in record:
            (found.evaluations if is_evaluation(record) else found.steps).append(record)
    return found


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    """A record with None for what is no number, but for the name of the held-out data."""
    return {key: value if _is_number(value) or key == "valid_data" else None for key, value in record.items()}


def read_lines(path: Path, *, skip_damaged: bool = False, remedy: str = _REMEDY) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl or samples.jsonl: mappings with the ``step`` that they are of.

    A last line that a kill has cut short is left out.

    Args:
        skip_damaged: leave out all other lines that are no records as well, instead of refusing the file.
        remedy: ends the message of an error.

    Raises:
        DataError: the file cannot be read, or has a line that is no record; one line.
    """
    try:
        with open_regular(path) as file:
            for number, line in enumerate(file, start=1):
                if (record := _record(line)) is not None:
                    yield record
                elif line.endswith(b"\n") and not skip_damaged:  # only a last line has no end
                    raise DataError(f"{path}:{number} is no record of a step; {remedy}")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; {remedy}") from None


def _is_number(value: Any) -> bool:
    """Whether a value is what a record may have: a number, or a list of numbers and None."""
    if isinstance(value, list):
        return all(item is None or (_is_number(item) and not isinstance(item, list)) for item in value)
    return isinstance(value, int | float)


def _integer(text: str) -> int | float:
    return int(text) if len(text) < 20 else float(text)  # one that no float can hold is infinite


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line, parse_int=_integer)
    except (ValueError, RecursionError):  # of JSON, and of UTF-8
        return None
    known = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if known else None
