"""Documents: the corpus that comes with every Python, and the readers of files and folders."""

from __future__ import annotations

import stat
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dlm.errors import DataError
from megatron_dlm.packages import optional_module
from megatron_dlm.preparation.records import (
    parquet_columns,
    read_json_lines,
    read_lines,
    read_parquet,
    read_text,
    require_length,
)

# Tests, vendored packages and what a build writes: not the library's own source.
_EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_EXCLUDED_FILES = ("pydoc_data/topics.py", "_sysconfigdata")

_ROWS = 1024  # of a dataset folder that are in memory at a time
_JSON_SUFFIXES = {".jsonl", ".json"}

EMBEDDED_PARTS = ("source", "reference")
"""What every Python brings along: the standard library's source, and the language reference."""


class Document(NamedTuple):
    """One text and where it comes from, for messages."""

    text: str
    origin: str


def embedded_documents(parts: Collection[str] = EMBEDDED_PARTS) -> Iterator[Document]:
    """The standard library's own source, one document a file, then the language reference, one document a topic.

    About 11 MB of Python and 0.5 MB of English without any download; ``parts`` may leave out either. The order is that
    of the paths and topic names, so it depends on the Python version alone.
    """
    from pydoc_data import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")) if "source" in parts else []
    for name in names:
        if _EXCLUDED_FOLDERS.isdisjoint(name.split("/")) and not name.startswith(_EXCLUDED_FILES):
            text = read_text(root / name)
            if text:
                yield Document(text, str(root / name))
    for topic, text in sorted(topics.topics.items()) if "reference" in parts else []:
        yield Document(text, f"the language reference on {topic!r}")


def find_inputs(inputs: Iterable[str | Path]) -> list[Path]:
    """Files and dataset folders to read, in order: the inputs as given, other folders replaced by their files, sorted.

    Raises:
        DataError: an input does not exist or may have no end, or a folder has no visible file in it.
    """
    found: list[Path] = []
    for given in inputs:
        if not str(given).strip():
            raise DataError("an input is an empty text: give the path of a file or a folder")
        path = Path(given)
        _require_end(path)
        if not path.is_dir() or _is_dataset_folder(path):
            found.append(path)
            continue
        inside = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
        if not inside:
            raise DataError(f"the input folder {path} has no files: check the path")
        found += inside
    return found


def read_documents(
    paths: Sequence[Path], *, text_key: str = "text", split_on_blank_lines: bool = False
) -> Iterator[Document]:
    """The documents of files and dataset folders, in order; the kind is told by the name.

    Args:
        paths: *.jsonl or *.json (JSON lines), *.parquet, a folder written by Hugging Face's `save_to_disk`; all else is
            plain UTF-8 text. JSON lines and text may end in .gz.
        text_key: JSON key or column that holds the text.
        split_on_blank_lines: a text file holds several documents with blank lines between them, not just one.

    Raises:
        DataError: a file cannot be read as what it is; the message names the file and the place in it.
    """
    for path in paths:
        kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
        if path.is_dir():
            yield from _read_dataset_folder(path, text_key)
        elif kind in _JSON_SUFFIXES:
            yield from _read_json_lines(path, text_key)
        elif kind == ".parquet":
            yield from _read_parquet(path, text_key)
        elif split_on_blank_lines:
            yield from _read_blocks(path)
        else:
            yield Document(read_text(path), str(path))


def _require_end(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise DataError(f"the input {path} does not exist: check the path") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the input {path}: {getattr(error, 'strerror', error)}; check the path") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise DataError(f"the input {path} is a pipe or a device, which may have no end: write its text to a file")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_dataset_folder(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _read_blocks(path: Path) -> Iterator[Document]:
    block: list[str] = []
    first, size = "", 0
    for line, origin in read_lines(path):
        if line.strip():
            first, size = (first, size + len(line)) if block else (origin, len(line))
            require_length(size, first)
            block.append(line)
        elif block:
            yield Document("".join(block), first)
            block = []
    if block:
        yield Document("".join(block), first)


def _read_json_lines(path: Path, text_key: str) -> Iterator[Document]:
    for record, origin in read_json_lines(path):
        if not isinstance(record, dict):
            raise DataError(f"{origin} is not a JSON object: write one object on each line")
        if text_key not in record:
            raise DataError(f"{origin} has no {text_key!r}: {_name_key(list(record))}")
        yield _document(record[text_key], origin, text_key)


def _read_parquet(path: Path, text_key: str) -> Iterator[Document]:
    if text_key not in (columns := parquet_columns(path)):
        raise DataError(f"{path} has no column {text_key!r}: {_name_key(columns)}")
    for row, origin in read_parquet(path, [text_key]):
        yield _document(row[text_key], origin, text_key)


def _read_dataset_folder(path: Path, text_key: str) -> Iterator[Document]:
    datasets = optional_module("datasets", f"reading {path}")
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.parent.name for p in path.glob("*/state.json")) or ["train"]
        raise DataError(f"{path} holds several splits ({', '.join(splits)}): give one, such as {path / splits[0]}")
    row = 0
    try:
        dataset = datasets.load_from_disk(str(path))
        if text_key not in dataset.column_names:
            raise DataError(f"{path} has no column {text_key!r}: {_name_key(dataset.column_names)}")
        for table in dataset.select_columns([text_key]).with_format("arrow").iter(batch_size=_ROWS):
            table.validate(full=True)  # a wrong offset would be read through a memory map, which kills the process
            for text in table.column(0).to_pylist():
                row += 1
                yield _document(text, f"{path} row {row}", text_key)
    except DataError:
        raise
    except Exception as error:  # pyarrow, json or the file system, whatever part is damaged
        raise DataError(f"{path} is not a readable dataset folder ({_first_line(error)}): save it again") from error


def _document(text: Any, origin: str, text_key: str) -> Document:
    if not isinstance(text, str):
        raise DataError(f"{origin}: {text_key!r} holds {type(text).__name__}, not text: {_name_key([])}")
    return Document(text, origin)


def _name_key(present: list[str]) -> str:
    return "name the key of the text with --text-key" + (f" (there are: {', '.join(present)})" if present else "")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
