"""From a path that a user gives to a complete checkpoint, and what it says about itself."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dlm.checkpoint import manifest
from megatron_dlm.checkpoint.tensor_files import COMMON, INDEX
from megatron_dlm.config.load import read_stored
from megatron_dlm.config.tree import Config
from megatron_dlm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.files import flush, open_regular, read_bytes, read_json_object, written_beside
from megatron_dlm.launch.place import is_first_rank
from megatron_dlm.run_folder import RunFolder

INFO, CONFIG, TOKENIZER, LATEST = "checkpoint.json", "config.yaml", "tokenizer", "latest"
_NEEDED = (INFO, CONFIG, INDEX, COMMON, "metadata.json")
_NAME = re.compile(r"step-([0-9]{8,18})")
_LONGEST_NAME = 1000  # bytes of ``latest``
# Entries of INFO that others rely on, and what they are.
_INFO_TYPES: dict[str, type] = {
    "step": int,
    "consumed_samples": int,
    "vocab_size": int,
    "tokenizer_fingerprint": str,
    "train_sources": list,
    "layout": str,
    "versions": dict,
    "imported_from": str,
}


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

    def open_tokenizer(self) -> Tokenizer:
        """Its tokenizer. Raises ``ConfigError`` or ``DataError``, one line, where its copy is not what the run had."""
        path, remedy = self.directory / TOKENIZER, "restore it or give another checkpoint"
        try:
            for file in path.iterdir():
                open_regular(file).close()  # a pipe would keep the reader waiting
            tokenizer = load_tokenizer(str(path))
        except OSError as error:
            raise ConfigError(f"cannot read the tokenizer of {self.directory}: {error.strerror}; {remedy}") from None
        except DataError:
            raise
        except Exception as error:  # the packages that read one raise nearly anything
            raise ConfigError(f"the tokenizer of {self.directory} is damaged ({error}); {remedy}") from None
        known = self.info["tokenizer_fingerprint"], self.info["vocab_size"]
        if (tokenizer.fingerprint, tokenizer.vocab_size) != known:
            raise ConfigError(f"{path} is not the tokenizer of its checkpoint; {remedy}")
        return tokenizer


def open_checkpoint(path: str | Path) -> StoredCheckpoint:
    """The checkpoint at ``path``: its own directory, or a run's, of which the one that ``latest`` names is taken.

    The sizes of all files and the content of the small ones are compared with the manifest. Where ``latest`` names none
    the newest complete one is taken, and a warning says so.

    Raises:
        ConfigError: there is none, it is damaged, or it is of another version; one line.
    """
    directory, note = _directory(Path(path))
    try:
        if fault := find_fault(directory):
            raise ConfigError(f"checkpoint {directory} is damaged: {fault}; restore it or give another one")
    except OSError as error:
        raise ConfigError(f"cannot read {directory}: {error.strerror}; check the path") from None
    stored = StoredCheckpoint(directory, read_stored(directory / CONFIG), read_info(directory))
    if note and is_first_rank():
        print(f"megatron-dlm: warning: {note}", file=sys.stderr, flush=True)
    return stored


def read_info(directory: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises ``ConfigError`` where it is not what a run has written; one line."""
    path, remedy = directory / INFO, "restore it or give another checkpoint"
    info = read_json_object(path, remedy)
    for name, kind in _INFO_TYPES.items():
        if name in info and (not isinstance(info[name], kind) or isinstance(info[name], bool)):
            raise ConfigError(f"{path} is damaged: its {name} is no {kind.__name__}; {remedy}")
        if kind is int and not 0 <= info.get(name, 0) < 2**63:
            raise ConfigError(f"{path} is damaged: its {name} is out of range; {remedy}")
    if missing := [name for name in ("vocab_size", "tokenizer_fingerprint") if not info.get(name)]:
        raise ConfigError(f"{path} is damaged: it has no {missing[0]}; {remedy}")
    return info


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
    except ConfigError:  # of a run whose checkpoints are damaged, opening it says which is
        return os.path.lexists(RunFolder(Path(path)).checkpoints / LATEST)
    return True


def _directory(path: Path) -> tuple[Path, str]:
    """The checkpoint's directory, and what is to be said about it."""
    try:
        if (path / INFO).is_file():
            return path, ""
        for root in (path, RunFolder(path).checkpoints):
            if (directory := latest(root)) is not None and (directory / INFO).is_file():
                return directory, ""
            for directory in checkpoints(root) if root.is_dir() else []:
                if find_fault(directory) is None:
                    taken = f"taking {directory.name}, the newest complete one"
                    return directory, f"{root / LATEST} names no checkpoint; {taken}"
            if os.path.lexists(root / LATEST):
                raise ConfigError(f"{root / LATEST} names no checkpoint, and none beside it is complete; give another")
        what = "has no checkpoint" if path.is_dir() else "is no directory"
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; check the path") from None
    raise ConfigError(f"{path} {what}; give a run directory, or one of its checkpoints/step-*")


def checkpoint_root(config: Config) -> Path:
    """Where the checkpoints of a run are."""
    return RunFolder(Path(config.run.directory)).checkpoints


def exists(config: Config) -> bool:
    """Whether a run has checkpoints, sound or not: then it continues, or is refused. Raises ``ConfigError``."""
    return bool(candidates(checkpoint_root(config)))


def latest(root: Path) -> Path | None:
    """What ``latest`` names, whether it is there or not; None where that cannot be the name of a checkpoint."""
    try:
        name = read_bytes(root / LATEST, _LONGEST_NAME).decode(errors="replace").strip()
    except OSError:
        return None
    return root / name if _NAME.fullmatch(name) else None


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
    with written_beside(root / LATEST) as partial:
        partial.write_text(name + "\n")
        flush(partial)
        if (root / LATEST).is_dir():
            (root / LATEST).rename(root / f"{LATEST}.old")
    flush(root)
