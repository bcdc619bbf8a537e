"""The manifest of a directory: size and SHA-256 of every file, so that damage is found before anything is loaded."""

from __future__ import annotations

import errno
import hashlib
import json
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from megatron_dlm.files import flush, open_regular, read_bytes

NAME = "manifest.json"
BLOCKS = "blocks.json"
"""File with the digests of the large files' blocks."""
BLOCK_BYTES = 2**20
_LARGEST = 2**28  # bytes of a manifest, and of the digests of blocks: those of some terabytes


class Damaged(ValueError):
    """A file is not what was written; the message is a sentence that names it."""

    @classmethod
    def of(cls, name: str) -> Damaged:
        """For content that has another digest."""
        return cls(f"the content of {name} has changed since it was written (its SHA-256 differs)")


class FileRecord(NamedTuple):
    """What a file must be."""

    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal."""
    blocks: tuple[str, ...] = ()
    """SHA-256 of each ``BLOCK_BYTES``, of a file that may be read in parts."""


def record(path: Path) -> FileRecord:
    """Size and digest of a file, which is read once."""
    with open_regular(path) as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def write(directory: Path, known: dict[str, FileRecord]) -> None:
    """Write the manifest of all other files below ``directory``, and flush everything to the disk.

    Args:
        directory: holds the files already.
        known: records by name of the large files, which are not read again.

    Raises:
        OSError: a known file is not there: the ranks do not write to one file system.
    """
    for name, item in known.items():
        if not (directory / name).is_file() or (directory / name).stat().st_size != item.size:
            raise OSError(
                errno.ENOENT,
                f"{name}, which another rank has written, is not there: run.directory must be on a file system that "
                "all nodes share",
            )
    blocks = {name: item.blocks for name, item in known.items() if item.blocks}
    if blocks:
        text = json.dumps({"block_bytes": BLOCK_BYTES, "files": blocks})
        (directory / BLOCKS).write_text(text + "\n", encoding="utf-8")
    records = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != NAME:
            records[name] = known[name] if name in known else record(path)
            if name not in known:
                flush(path)
    files = {name: {"size": item.size, "sha256": item.sha256} for name, item in records.items()}
    text = json.dumps({"files": files}, indent=1)
    (directory / NAME).write_text(text + "\n", encoding="utf-8")
    for path in (directory / NAME, *(path for path in directory.rglob("*") if path.is_dir()), directory):
        flush(path)


def read(directory: Path) -> dict[str, FileRecord]:
    """The records by name, which are those of files inside ``directory``.

    Raises ``ValueError`` with a sentence if there is no manifest, or something else in it.
    """
    try:
        files = json.loads(read_bytes(directory / NAME, _LARGEST).decode())["files"]
        records = {name: FileRecord(int(item["size"]), str(item["sha256"])) for name, item in files.items()}
    except FileNotFoundError:
        raise ValueError(f"it has no {NAME}, so it was not completed") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise ValueError(f"its {NAME} is damaged") from None
    for name in records:
        require_inside(directory, name)
    return records


def require_inside(directory: Path, name: str) -> None:
    """Raise ``Damaged`` for the ``name`` of a file that is outside ``directory``: ``..``, absolute, or by a link."""
    try:
        inside = name and (directory / name).resolve().is_relative_to(directory.resolve())
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, links in a circle
        inside = False
    if not inside or ".." in Path(name).parts:
        raise Damaged(f"it names {name!r}, which is not one of its files")


def read_blocks(directory: Path) -> dict[str, list[str]]:
    """Digests of the large files' blocks by name; empty where there are none, as in checkpoints of earlier versions.

    Raises ``Damaged`` for something else.
    """
    try:
        content = json.loads(read_bytes(directory / BLOCKS, _LARGEST).decode())
        if content["block_bytes"] != BLOCK_BYTES:
            raise ValueError(BLOCKS)
        return {str(name): [str(digest) for digest in digests] for name, digests in content["files"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Damaged(f"its {BLOCKS} is damaged") from None


def find_fault(directory: Path, names: Iterable[str] | None = None, *, content: bool = True) -> str | None:
    """A sentence that names the first bad file, or None if all are as the manifest says.

    Args:
        directory: with a manifest.
        names: the files to look at; None = all.
        content: compare digests too, which reads the files; else only their sizes.

    Raises:
        OSError: a file is there but cannot be read, which says nothing about what is in it.
    """
    try:
        records = read(directory)
    except ValueError as error:
        return str(error)
    for name in records if names is None else names:
        path, expected = directory / name, records.get(name)
        if expected is None:
            return f"its {NAME} lacks {name}"
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                return f"{name} is no regular file"
            if found.st_size != expected.size:
                return f"{name} has {found.st_size} bytes instead of {expected.size}"
            if content and record(path).sha256 != expected.sha256:
                return str(Damaged.of(name))
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
    return None
