"""From a path that a user gives to a complete checkpoint, and what it says about itself."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dlm.checkpoint import manifest
from megatron_dlm.checkpoint.tensor_files import COMMON, INDEX
from megatron_dlm.config.load import read_stored
from megatron_dlm.config.tree import Config
from megatron_dlm.errors import ConfigError
from megatron_dlm.files import flush
from megatron_dlm.run_folder import RunFolder

INFO, CONFIG, TOKENIZER, LATEST = "checkpoint.json", "config.yaml", "tokenizer", "latest"
_NEEDED = (INFO, CONFIG, INDEX, COMMON, "metadata.json")
_NAME = re.compile(r"step-(\d{8,})")


class StoredCheckpoint(NamedTuple):
    """A complete checkpoint."""

    directory: Path
    config: Config
    """The resolved configuration of its run."""
    info: dict[str, Any]
    """Step, consumed samples, layout, vocabulary size, versions."""

    @property
    def run_folder(self) -> RunFolder | None:
        """The folder of its run; None where it is no longer where the run has put it."""
        folder = RunFolder(self.directory.parent.parent)
        return folder if folder.checkpoints == self.directory.parent else None

    @property
    def tokenizer(self) -> str:
        """What `data.tokenizer.load_tokenizer` takes to read its tokenizer."""
        return str(self.directory / TOKENIZER)


def open_checkpoint(path: str | Path) -> StoredCheckpoint:
    """The checkpoint at ``path``: its own directory, or a run's, of which the one that ``latest`` names is taken.

    The sizes of all files and the content of the small ones are compared with the manifest.

    Raises:
        ConfigError: there is none, it is damaged, or it is of another version; one line.
    """
    directory = _directory(Path(path))
    try:
        if fault := find_fault(directory):
            raise ConfigError(f"checkpoint {directory} is damaged: {fault}; restore it or give another one")
        info = json.loads((directory / INFO).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {directory}: {error.strerror}; check the path") from None
    return StoredCheckpoint(directory, read_stored(directory / CONFIG), info)


def find_fault(directory: Path) -> str | None:
    """A sentence about the first thing that is wrong with a checkpoint, or None.

    The sizes of all files and the content of all but the tensors are compared with the manifest. Tensors are verified
    by whoever reads them, but for checkpoints of earlier versions, in which they cannot be read in parts.

    Raises:
        OSError: a file is there but cannot be read, which says nothing about what is in it.
    """
    try:
        records, in_parts = manifest.read(directory), manifest.read_blocks(directory)
    except ValueError as error:
        return str(error)
    others = {name for name in records if name not in in_parts}
    return manifest.find_fault(directory, content=False) or manifest.find_fault(directory, sorted({*_NEEDED, *others}))


def is_checkpoint(path: str | Path) -> bool:
    """Whether ``path`` is the directory of a checkpoint, or of a run that has some."""
    try:
        _directory(Path(path))
    except ConfigError:
        return False
    return True


def _directory(path: Path) -> Path:
    if (path / INFO).is_file():
        return path
    for root in (path, RunFolder(path).checkpoints):
        if (directory := latest(root)) is not None:
            if (directory / INFO).is_file():
                return directory
            raise ConfigError(f"{root / LATEST} names {directory.name!r}, which is no checkpoint; give one beside it")
    what = "has no checkpoint" if path.is_dir() else "is no directory"
    raise ConfigError(f"{path} {what}; give a run directory, or one of its checkpoints/step-*")


def checkpoint_root(config: Config) -> Path:
    """Where the checkpoints of a run are."""
    return RunFolder(Path(config.run.directory)).checkpoints


def exists(config: Config) -> bool:
    """Whether a run has checkpoints, sound or not: then it continues, or is refused. Raises ``ConfigError``."""
    return bool(candidates(checkpoint_root(config)))


def latest(root: Path) -> Path | None:
    """What ``latest`` names, whether it is there or not; None where nothing can be read."""
    try:
        return root / (root / LATEST).read_bytes().decode(errors="replace").strip()
    except OSError:
        return None


def candidates(root: Path) -> list[Path]:
    """What ``latest`` names and what is older, newest first; newer ones are of a branch that was given up."""
    directories, newest = checkpoints(root), latest(root)
    return directories[directories.index(newest) :] if newest in directories else directories


def checkpoints(root: Path) -> list[Path]:
    """Directories with the names of checkpoints, newest first. Whatever else is there is the user's.

    Raises ``ConfigError`` where ``root`` is something else than a directory.
    """
    if os.path.lexists(root) and not root.is_dir():
        raise ConfigError(f"{root} is not a directory; move it away or choose another run.directory")
    found = [(int(match[1]), path) for path in root.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def point_latest(root: Path, name: str) -> None:
    """Have ``latest`` name a checkpoint; durable when it returns."""
    temporary = root / f".{LATEST}.partial"
    temporary.write_text(name + "\n")
    flush(temporary)
    if (root / LATEST).is_dir():
        (root / LATEST).rename(root / f"{LATEST}.old")
    os.replace(temporary, root / LATEST)
    flush(root)
