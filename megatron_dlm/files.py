"""Files that are complete or as they were before."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_dlm.errors import ConfigError


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A hidden file beside ``path`` to write into, which takes its place when the block ends.

    Raises ``OSError`` where it cannot be written; then, as after any error in the block, ``path`` is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all. Raises ``OSError``."""
    with written_beside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file. Raises ``ConfigError`` where there is none, one line that ends with the ``remedy``."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {' '.join(str(error).split())}; {remedy}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object; {remedy}")
    return content


def flush(path: Path) -> None:
    """Have the disk hold a file's content, or a directory's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
