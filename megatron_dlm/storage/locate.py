"""From a path that a user gives to a complete checkpoint, and what it says about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dlm.config import Config, ConfigError
from megatron_dlm.config_loading import from_dict, read_yaml
from megatron_dlm.storage import manifest
from megatron_dlm.storage.tensor_files import COMMON, INDEX

INFO, CONFIG, TOKENIZER = "checkpoint.json", "config.yaml", "tokenizer"
SMALL = (INFO, CONFIG, INDEX, COMMON, "metadata.json")
"""The files whose content is verified even where only the sizes of the others are."""


class StoredCheckpoint(NamedTuple):
    """A complete checkpoint."""

    directory: Path
    config: Config
    """The resolved configuration of its run."""
    info: dict[str, Any]
    """Step, consumed samples, layout, vocabulary size, versions."""

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
        fault = manifest.find_fault(directory, content=False) or manifest.find_fault(directory, SMALL)
        if fault:
            raise ConfigError(f"checkpoint {directory} is damaged: {fault}; restore it or give another one")
        info = json.loads((directory / INFO).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {directory}: {error.strerror}; check the path") from None
    try:
        config = from_dict(read_yaml(str(directory / CONFIG)))
    except ConfigError as error:
        raise ConfigError(f"{directory} is of another version of megatron_dlm: {error}") from None
    return StoredCheckpoint(directory, config, info)


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
    for root in (path, path / "checkpoints"):
        latest = root / "latest"
        if latest.is_file():
            directory = root / latest.read_bytes().decode(errors="replace").strip()
            if (directory / INFO).is_file():
                return directory
            raise ConfigError(f"{latest} names {directory.name!r}, which is no checkpoint; give one beside it")
    what = "has no checkpoint" if path.is_dir() else "is no directory"
    raise ConfigError(f"{path} {what}; give a run directory, or one of its checkpoints/step-*")
