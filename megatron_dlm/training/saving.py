"""Checkpoints that load at any parallel layout: written beside, renamed into place, ``latest`` moved last."""

from __future__ import annotations

import json
import os
import pickle
import platform
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_dlm.checkpoint import manifest
from megatron_dlm.checkpoint.collective import cause, on_rank_zero, shared_fault, unreadable
from megatron_dlm.checkpoint.sharded_state import read_sharded, write_sharded
from megatron_dlm.checkpoint.stored import (
    CONFIG,
    INFO,
    SMALL,
    TOKENIZER,
    candidates,
    checkpoint_root,
    checkpoints,
    point_latest,
)
from megatron_dlm.config.load import dump_yaml, from_dict, read_yaml
from megatron_dlm.config.tree import Config
from megatron_dlm.data.dataset import Dataset
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.errors import ConfigError, TrainingError
from megatron_dlm.files import flush
from megatron_dlm.model.initialization import CHECKPOINT_METADATA
from megatron_dlm.training.progress import Progress
from megatron_dlm.training.state import Training

# Optimizer state in terms of whole parameters: any layout may load what another has saved.
_METADATA = {
    **CHECKPOINT_METADATA,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
# What defines the trajectory: a resumed run must have the same values. Layout, precision, schedule and
# intervals may change.
_BINDING = (
    "model",
    "diffusion",
    "autoregressive",
    "run.seed",
    "data.sequence_length",
    "data.unique_tokens",
    "train.global_batch_size",
)


def save(training: Training, progress: Progress) -> Path:
    """Write the state after ``progress.step`` completed steps; collective. Returns the checkpoint's directory.

    Written beside, described by a manifest, renamed into place; then ``latest`` moves, and last the checkpoints beyond
    ``checkpoint.keep`` are removed. Whenever the run is killed, ``latest`` names a complete checkpoint.

    Raises:
        TrainingError: it could not be written, for want of space, say; on all ranks. What had been written is removed,
            older checkpoints are untouched.
    """
    root = checkpoint_root(training.config)
    final, partial = root / f"step-{progress.step:08d}", root / f".step-{progress.step:08d}.partial"
    try:
        on_rank_zero(lambda: _begin(root, partial))
        own = write_sharded(_state(training, progress, is_loading=False), partial, _METADATA)
        records: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(records, own)
        known = {name: record for part in records for name, record in part.items()}
        on_rank_zero(lambda: _describe(training, progress, partial, known))
        on_rank_zero(lambda: _commit(root, partial, final))
    except (OSError, CheckpointException) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(
            f"cannot write checkpoint {final}: {cause(error)}; make room or correct that, and the same command "
            "continues from the checkpoint before, if there is one"
        ) from None
    if dist.get_rank() == 0:
        for path in candidates(root)[training.config.checkpoint.keep :]:
            _remove(path)
    return final


def load(training: Training, directory: Path) -> Progress:
    """Restore model and optimizer, at any layout; collective.

    Raises:
        TrainingError: the checkpoint cannot be read; on all ranks.
    """
    for part in training.optimizer.parts:
        if not part.optimizer.state:  # of another Adam than torch's; megatron's sharded state needs one to fill
            part._init_optimizer_states_with_dummy_values()
    template = _state(training, Progress(), is_loading=True)
    try:
        state = read_sharded(template, directory)
    except (OSError, CheckpointException, pickle.UnpicklingError) as error:
        raise TrainingError(f"cannot read checkpoint {directory}: {cause(error)}; restore or remove it") from None
    for index, chunk in enumerate(training.chunks):
        chunk.module.load_state_dict(state[f"model{index}"])
    training.optimizer.load_state_dict(state["optimizer"])
    return Progress(*(int(state.get(name, 0)) for name in Progress._fields))


def find(training: Training) -> Path | None:
    """The checkpoint to continue from, with the content of all its files verified; collective.

    Damaged ones are passed over and named on stderr, and ``latest`` is set back to the one that is found, so that the
    next save replaces them. Raises ``ConfigError`` as ``resumable``.
    """
    config, dataset, topology = training.config, training.train_stream.dataset, training.topology
    damaged: list[str] = []

    def verify(directory: Path) -> str | None:
        fault = shared_fault(directory)
        if fault:
            damaged.append(f"checkpoint {directory} is damaged: {fault}")
        return fault

    found = resumable(config, training.tokenizer, dataset, steps=training.steps, verify=verify)
    if found and damaged and topology.rank == 0:
        print(f"megatron-dlm: warning: {'; '.join(damaged)}; continuing from {found.name}", file=sys.stderr, flush=True)
        point_latest(found.parent, found.name)
    dist.barrier()
    return found


def check_sizes(directory: Path) -> str | None:
    """Whether the checkpoint is complete, without reading its large files: a sentence about the first fault."""
    try:
        return manifest.find_fault(directory, content=False) or manifest.find_fault(directory, SMALL)
    except OSError as error:
        raise unreadable(directory, error.strerror) from None


def resumable(
    config: Config,
    tokenizer: Tokenizer,
    train_data: Dataset,
    *,
    steps: int,
    verify: Callable[[Path], str | None] = check_sizes,
) -> Path | None:
    """The checkpoint that a run of ``steps`` steps with ``config`` continues from; None for a fresh start.

    The one that ``latest`` names, or the newest before it that has no fault. Raises ``ConfigError`` where the run
    directory has checkpoints but must not be continued: none is sound, another model, tokenizer, training data or seed,
    a run that is already longer, or ``checkpoint.resume: never``.
    """
    root = checkpoint_root(config)
    found = candidates(root)
    if not found:
        return None
    if config.checkpoint.resume == "never":
        raise ConfigError(
            f"{root} already has checkpoints and checkpoint.resume is never; choose another run.directory, or auto"
        )
    faults = []
    for directory in found:
        if fault := verify(directory):
            faults.append(f"{directory.name}: {fault}")
        else:
            _require_same_run(directory, config, tokenizer, train_data, steps)
            return directory
    raise ConfigError(
        f"no checkpoint in {root} can be used ({'; '.join(faults)}); restore one, or choose another run.directory"
    )


def _require_same_run(directory: Path, config: Config, tokenizer: Tokenizer, train_data: Dataset, steps: int) -> None:
    """Raise ``ConfigError`` where the configuration or the data contradicts the checkpoint."""
    try:
        saved = from_dict(read_yaml(str(directory / CONFIG)))
    except ConfigError as error:
        raise ConfigError(f"{directory} is of another version of megatron_dlm: {error}") from None
    info = json.loads((directory / INFO).read_text())
    pairs = [(key, _lookup(saved, key), _lookup(config, key)) for key in _BINDING]
    pairs.append(("the fingerprint of data.tokenizer", info["tokenizer_fingerprint"], tokenizer.fingerprint))
    sources = _describe_sources(config, train_data)
    pairs.append(("the list of (fingerprint, share) of data.train", info["train_sources"], sources))
    for key, before, now in pairs:
        if before != now:
            what = _first_difference(key, before, now)
            raise ConfigError(f"{what}, which {directory} cannot continue; restore it or choose another run.directory")
    if info["step"] > steps:
        raise ConfigError(
            f"{directory} is beyond the {steps} steps of this run; train longer or choose another run.directory"
        )


def _state(training: Training, progress: Progress, *, is_loading: bool) -> dict[str, Any]:
    model = {
        f"model{index}": chunk.module.sharded_state_dict(metadata=_METADATA)
        for index, chunk in enumerate(training.chunks)
    }
    optimizer = training.optimizer.megatron.sharded_state_dict(model, is_loading=is_loading, metadata=_METADATA)
    return {**model, "optimizer": optimizer, **progress._asdict()}


def _begin(root: Path, partial: Path) -> None:
    for leftover in root.glob(".step-*.partial*"):  # of saves that were killed
        _delete(leftover)
    partial.mkdir(parents=True)


def _describe(training: Training, progress: Progress, directory: Path, known: dict[str, manifest.FileRecord]) -> None:
    """The resolved configuration, the tokenizer and the versions; the manifest makes it complete."""
    (directory / CONFIG).write_text(dump_yaml(training.config))
    training.tokenizer.save(directory / TOKENIZER)
    info = {
        **progress._asdict(),
        "layout": str(training.topology),
        "tokenizer_fingerprint": training.tokenizer.fingerprint,
        "vocab_size": training.tokenizer.vocab_size,
        "train_sources": _describe_sources(training.config, training.train_stream.dataset),
        "versions": {
            "megatron_dlm": version("megatron-dlm"),
            "megatron-core": version("megatron-core"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    (directory / INFO).write_text(json.dumps(info, indent=2) + "\n")
    manifest.write(directory, known)


def _commit(root: Path, partial: Path, final: Path) -> None:
    """Put the complete checkpoint in its place; ``latest`` names a complete one at every moment."""
    current = set(candidates(root))
    for path in checkpoints(root):
        if path not in current or path == final:
            _remove(path)
    os.rename(partial, final)
    flush(root)
    point_latest(root, final.name)


def _remove(directory: Path) -> None:
    """Remove a checkpoint so that a kill leaves nothing that looks like one; what cannot be removed is named."""
    hidden = directory.with_name(f".{directory.name}.partial.old")
    try:
        os.rename(directory, hidden)
        _delete(hidden)
    except OSError as error:
        print(f"megatron-dlm: warning: cannot remove {directory}: {error.strerror}", file=sys.stderr, flush=True)


def _delete(path: Path) -> None:
    """Delete a directory; of a symbolic link to one (to another disk, say) the link only."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _describe_sources(config: Config, train_data: Dataset) -> list[list[Any]]:
    """[fingerprint, share] of every source; with the seed they decide which sequence every sample id is."""
    weights = [source.weight for source in config.data.train]
    shares = [round(weight / sum(weights), 12) for weight in weights]
    return [[fingerprint, share] for fingerprint, share in zip(train_data.fingerprints, shares, strict=True)]


def _lookup(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _first_difference(key: str, before: Any, now: Any) -> str:
    for name in getattr(before, "__dataclass_fields__", ()):
        if getattr(before, name) != getattr(now, name):
            return _first_difference(f"{key}.{name}", getattr(before, name), getattr(now, name))
    return f"{key} is {now!r} but was {before!r}"
