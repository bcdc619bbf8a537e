"""Files that are complete or as they were before, and what would keep them from being written."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_dlm.errors import ConfigError, DataError

_LARGEST_JSON = 2**28  # bytes


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A hidden file beside ``path`` to write into, which takes its place when the block ends.

    What a killed writer has left there is removed. A link is never followed: whoever can write into the folder could
    have put one there.

    Raises ``OSError`` where it cannot be written; then, as after any error in the block, ``path`` is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all. Raises ``OSError``."""
    with written_beside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def open_regular(path: str | os.PathLike) -> io.BufferedReader:
    """A regular file, open for reading. Raises ``OSError``, also for anything else: opening a pipe would wait."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(mode := os.fstat(handle).st_mode):
        os.close(handle)
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, os.strerror(code) if stat.S_ISDIR(mode) else "it is no regular file", str(path))
    return os.fdopen(handle, "rb")


def read_bytes(path: str | os.PathLike, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes. Raises ``OSError``, for a larger one too."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
    return content


def read_json_object(path: Path, remedy: str, error_type: type[ValueError] = ConfigError) -> dict[str, Any]:
    """The object in a JSON file. Raises ``error_type`` where there is none, one line that ends with the ``remedy``."""
    try:
        content = json.loads(read_bytes(path, _LARGEST_JSON).decode())
    except OSError as error:
        raise error_type(f"cannot read {path}: {error.strerror}; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise error_type(f"{path} is not JSON: {' '.join(str(error).split())}; {remedy}") from None
    if not isinstance(content, dict):
        raise error_type(f"{path} is not a JSON object; {remedy}")
    return content


def json_text(content: object) -> str:
    """A JSON file's content. Raises ``ValueError`` for a number that is not finite, which JSON has not."""
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, flushed to the disk: whole or not at all.

    Raises:
        DataError: it cannot be written; one line.
        ValueError: as ``json_text``.
    """
    try:
        with written_beside(path) as partial:
            partial.write_text(json_text(content), encoding="utf-8")
            flush(partial)
        flush(path.parent)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; make that possible, or choose another file") from None


def check_file_output(path: Path, option: str, *, overwrite: bool = True) -> None:
    """Find what would keep a file from being written, before anything is computed.

    Args:
        option: names the file on the command line, for messages.
        overwrite: a file that is there may be replaced.

    Raises:
        ConfigError: it is there, and may not be; one line.
        DataError: something else is there, or its folder is none that can be written to; one line.
    """
    if os.path.lexists(path) and not path.is_file():
        what = "it is a directory" if path.is_dir() else "it is no regular file"
        raise DataError(f"cannot write {path}: {what}; choose another {option}")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} is there already; use --overwrite, or choose another {option}")
    if not path.parent.is_dir():
        raise DataError(f"cannot write {path}: {path.parent} is no directory; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise DataError(f"cannot write {path}: {path.parent} cannot be written to; choose another {option}")


def flush(path: Path) -> None:
    """Have the disk hold a file's content, or a directory's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
