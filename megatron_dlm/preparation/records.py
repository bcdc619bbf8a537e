"""Values from files, each with where it is: JSON lines, rows of parquet, and the lines of a text.

What is wrong with a file is said in one line that names the file and the place in it.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from megatron_dlm.errors import DataError
from megatron_dlm.packages import optional_module

_ROWS = 1024  # of a parquet file that are in memory at a time
_LONGEST = 2**30  # bytes of a text or a line: it is in memory, and its tokens are too
_BOM = "\ufeff"


class Record(NamedTuple):
    """A value of a file."""

    value: Any
    origin: str
    """File and line, or row, from 1: for messages."""


def read_json_lines(path: Path) -> Iterator[Record]:
    """The value of every line that is not blank; a file that ends in .gz is decompressed.

    Raises:
        DataError: a line is not JSON, or as ``read_lines``; one line.
    """
    for line, origin in read_lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # of brackets that are nested too deep
            damaged = ", or the file is damaged" if path.suffix == ".gz" else ""  # which its end would say
            raise DataError(f"{origin} is not JSON{damaged}; give one JSON object in every line") from None
        yield Record(value, origin)


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """The rows as mappings from columns to values.

    Args:
        columns: those that are read, all of which are there (see ``parquet_columns``); None: all there are.

    Raises:
        DataError: the package pyarrow is missing, or the file is damaged; one line.
    """
    with _parquet_file(path) as file:
        number = 0
        for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield Record(row, f"{path} row {number}")


def parquet_columns(path: Path) -> list[str]:
    """The names of the columns. Raises ``DataError`` as ``read_parquet``."""
    with _parquet_file(path) as file:
        return list(file.schema_arrow.names)


def read_lines(path: Path) -> Iterator[Record]:
    """The lines of a UTF-8 text, with their ends, without a byte-order mark; a .gz file is decompressed.

    Raises:
        DataError: it cannot be read, is damaged or not UTF-8, or a line has more than 2**30 bytes; one line.
    """
    with _opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST + 1), b""), 1):
            origin = f"{path} line {number}"
            require_length(len(line), origin)
            text = _decode(line, origin)
            yield Record(text.removeprefix(_BOM) if number == 1 else text, origin)


def read_text(path: Path) -> str:
    """The whole of a UTF-8 text, of at most 2**30 bytes. Raises ``DataError`` as ``read_lines``."""
    with _opened(path) as file:
        content = file.read(_LONGEST + 1)
    require_length(len(content), str(path))
    return _decode(content, str(path)).removeprefix(_BOM)


def require_length(size: int, where: str) -> None:
    """Raise ``DataError`` where a text or line of ``size`` bytes is too long to be one document."""
    if size > _LONGEST:
        raise DataError(
            f"{where} is longer than the {_LONGEST} bytes that one document may have: divide it, or use "
            "--split-on-blank-lines for a text that has blank lines"
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed. Raises ``DataError`` for what goes wrong while they are read."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]  # a GzipFile is as good
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise DataError(f"{path} is damaged; copy it again") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from None


@contextlib.contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    """A ``pyarrow.parquet.ParquetFile``. Raises ``DataError`` for what goes wrong while it is read."""
    parquet = optional_module("pyarrow.parquet", f"the file {path}")
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except DataError:
        raise
    except Exception as error:  # pyarrow's errors have no common base
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path} is no readable parquet file ({reason}); copy it again") from None


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 at byte {error.start} (0x{content[error.start]:02x}); save the file as UTF-8, or "
            "leave it out"
        ) from None
