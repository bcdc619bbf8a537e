"""Rows of task files, JSON lines or parquet, with one-line errors that say what does not fit and where."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dlm.checkpoint.manifest import record
from megatron_dlm.errors import DataError
from megatron_dlm.preparation.records import read_json_lines, read_parquet

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


class Row(NamedTuple):
    """One question as its file has it."""

    record: Mapping[str, Any]
    origin: str
    """File and line, for messages."""
    layout: str
    """What the rows of such a file hold, for messages."""
    prefix: str = ""
    """Of the keys, where this is a part of a row."""

    def fault(self, key: str, what: str) -> DataError:
        """The error of a value that does not fit."""
        return DataError(f"{self.origin}: {self.prefix + key!r} {what}; the rows must have {self.layout}")

    def value(self, key: str) -> Any:
        """Raises ``DataError`` where it is missing."""
        if key not in self.record:
            raise self.fault(key, f"is missing (there are: {', '.join(map(str, self.record)) or 'none'})")
        return self.record[key]

    def text(self, key: str, *, empty: bool = False) -> str:
        """A string. Raises ``DataError``; ``empty`` ones only where they are allowed."""
        value = self.value(key)
        if not isinstance(value, str):
            raise self.fault(key, f"is {_show(value)}, no text")
        if not value.strip() and not empty:
            raise self.fault(key, "is an empty text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.fault(key, f"is {_show(value)}, which is no valid Unicode") from None
        return value

    def texts(self, key: str, count: int | None = None, *, empty: bool = False) -> list[str]:
        """At least two strings, or ``count``. Raises ``DataError``; ``empty`` ones only where they are allowed."""
        values = self.value(key)
        if not isinstance(values, list):
            raise self.fault(key, f"is {_show(values)}, no list of texts")
        if len(values) < 2 or count not in (None, len(values)):
            raise self.fault(key, f"has {len(values)} texts instead of {count or 'at least 2'}")
        part = Row({f"{key}[{i}]": value for i, value in enumerate(values)}, self.origin, self.layout, self.prefix)
        return [part.text(name, empty=empty) for name in part.record]

    def option(self, key: str, count: int) -> int:
        """A number of an option, from 0 to ``count`` - 1; as text too. Raises ``DataError``."""
        value = self.value(key)
        if value in ("", None, -1):
            raise self.fault(key, "does not say the answer, as in a test split: take the validation split")
        if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
            raise self.fault(key, f"is {_show(value)}, no number from 0 to {count - 1}")
        return value

    def part(self, key: str) -> Row:
        """The mapping below a key. Raises ``DataError``."""
        value = self.value(key)
        if not isinstance(value, Mapping):
            raise self.fault(key, f"is {_show(value)}, no mapping")
        return Row(value, self.origin, self.layout, f"{self.prefix}{key}.")


def read_rows(paths: Sequence[Path], layout: str) -> Iterator[Row]:
    """The rows of JSON lines and parquet files, in order.

    Raises:
        DataError: a file cannot be read as what its name says it is; one line.
    """
    for path in paths:
        rows = read_parquet(path) if path.suffix == ".parquet" else read_json_lines(path)
        for value, origin in rows:
            if not isinstance(value, dict):
                raise DataError(f"{origin}: {_show(value)} is no row; each must be a mapping with {layout}")
            yield Row(value, origin, layout)


def find_task_files(data: str | Path, names: Sequence[str], splits: Sequence[str], *, suffix: str = "") -> list[Path]:
    """The files of a task.

    Args:
        data: a file, or a folder that has NAME.jsonl (or .json, .parquet, .jsonl.gz), or a folder NAME with files
            SPLIT*.jsonl and the like somewhere below it, as data sets are published; all of those are taken.
        names: what the task may be called; the first that is there.
        splits: how the names of the files may begin.
        suffix: behind NAME.

    Raises:
        DataError: there are none; one line.
    """
    root = Path(data)
    if root.is_file():
        return [root]
    if not root.exists():
        raise DataError(f"{data} does not exist; give the file of the task, or a folder that has it")
    for name in names:
        for file in (root / f"{name}{suffix}{kind}" for kind in SUFFIXES):
            if file.is_file():
                return [file]
        # The whole of a set that is there by subject too is in a folder "all".
        folder = root / name / "all" if (root / name / "all").is_dir() else root / name
        for split in splits:
            found = [file for file in sorted(folder.rglob("*")) if _is_of_split(file, split)]
            if found:
                return found
    raise DataError(
        f"{data} has no {names[0]}{suffix}.jsonl or .parquet, and no folder {names[0]} with {splits[0]}*.jsonl or "
        ".parquet in it; put it there, or give the file itself"
    )


def digests(paths: Sequence[Path]) -> list[dict[str, str]]:
    """Path and SHA-256 of every file, for the record."""
    return [{"path": str(path), "sha256": record(path).sha256} for path in paths]


def _is_of_split(file: Path, split: str) -> bool:
    known = file.name.endswith(SUFFIXES) and file.is_file()
    return known and re.match(rf"{split}([-_.]|$)", file.name) is not None


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
