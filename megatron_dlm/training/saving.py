"""Checkpoints that load at any parallel layout: written beside, renamed into place, ``latest`` moved last."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_dlm.checkpoint import manifest
from megatron_dlm.checkpoint.collective import cause, first_failure, on_rank_zero
from megatron_dlm.checkpoint.manifest import Damaged
from megatron_dlm.checkpoint.pieces import Piece, pieces
from megatron_dlm.checkpoint.sharded_state import read_common, read_pieces, write_pieces
from megatron_dlm.checkpoint.stored import (
    CONFIG,
    INFO,
    LATEST,
    TOKENIZER,
    candidates,
    checkpoint_root,
    checkpoints,
    find_fault,
    point_latest,
    read_info,
)
from megatron_dlm.checkpoint.tensor_files import COMMON
from megatron_dlm.config.differences import Difference, differences
from megatron_dlm.config.load import dump_yaml, read_stored
from megatron_dlm.config.tree import Config, SourceConfig
from megatron_dlm.data.dataset import Dataset
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.errors import ConfigError, TrainingError
from megatron_dlm.files import flush, json_text
from megatron_dlm.model.initialization import CHECKPOINT_METADATA
from megatron_dlm.model.placement import place
from megatron_dlm.packages import versions
from megatron_dlm.training.progress import Progress
from megatron_dlm.training.state import Training

# How megatron describes such a checkpoint, for its own reader.
_METADATA = {
    **CHECKPOINT_METADATA,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
# What defines the trajectory: a resumed run must have the same values. Layout, precision, schedule and
# intervals may change.
_BINDING = (
    "model.",
    "diffusion.",
    "autoregressive.",
    "run.seed.",
    "data.sequence_length.",
    "data.unique_tokens.",
    "train.global_batch_size.",
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
    began = time.perf_counter()
    final, partial = root / f"step-{progress.step:08d}", root / f".step-{progress.step:08d}.partial"
    try:
        on_rank_zero(lambda: _begin(root, partial))
        own = write_pieces(_pieces(training, saving=True), _common(training, progress), partial)
        records: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(records, own)
        known = {name: record for part in records for name, record in part.items()}
        on_rank_zero(lambda: _describe(training, progress, partial, known, time.perf_counter() - began))
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


def resume(training: Training) -> tuple[Path | None, Progress]:
    """Continue from the newest sound checkpoint, or begin; collective. Returns its directory and how far it is.

    What is read is verified as it is read. A damaged checkpoint is named on stderr and the one before it is taken;
    ``latest`` is then set back to that one, so that the next save replaces the damaged ones.

    Raises:
        ConfigError: as ``resumable``.
        TrainingError: a checkpoint cannot be read, which says nothing about what is in it.
    """
    faults: dict[Path, str] = {}

    def choose() -> Path | None:
        stream = training.train_stream
        return resumable(training.config, training.tokenizer, stream.dataset, steps=training.steps, faults=faults)

    while (directory := on_rank_zero(choose)) is not None:
        try:
            progress = load(training, directory)
        except Damaged as error:
            faults[directory] = str(error)
            continue
        if faults and training.topology.rank == 0:
            named = "; ".join(f"checkpoint {path} is damaged: {fault}" for path, fault in faults.items())
            print(f"megatron-dlm: warning: {named}; continuing from {directory.name}", file=sys.stderr, flush=True)
            point_latest(directory.parent, directory.name)
        return directory, progress
    return None, Progress()


def load(training: Training, directory: Path) -> Progress:
    """Restore model and optimizer, at any layout; collective. Every rank reads its own share, straight into its place.

    Raises:
        Damaged: a file is not what was written; on all ranks. What had been read is already in place.
        TrainingError: the checkpoint cannot be read; on all ranks.
    """
    try:
        common = on_rank_zero(lambda: read_common(directory))
        progress = _take_over(training, common)
        read_pieces(_pieces(training, saving=False), directory)
    except (OSError, CheckpointException, pickle.UnpicklingError) as error:
        if isinstance(first_failure(error), Damaged):
            raise Damaged(cause(error)) from None
        raise TrainingError(f"cannot read checkpoint {directory}: {cause(error)}; restore or remove it") from None
    for chunk in training.chunks:
        chunk.start_param_sync(force_sync=True)  # every rank has its own share of the weights, and gets the others
    return progress


def _take_over(training: Training, common: dict[str, Any]) -> Progress:
    """Give the optimizer what is no tensor. Raises ``pickle.UnpicklingError`` where that is something else."""
    try:
        training.optimizer.load_common_state(common["optimizer"])
        return Progress(*(int(common.get(name, 0)) for name in Progress._fields))
    except Exception as error:  # megatron's optimizer says in many ways that it is not its own
        raise pickle.UnpicklingError(f"its {COMMON} is damaged ({type(error).__name__})") from None


def seconds_taken(directory: Path) -> float:
    """How long a checkpoint's tensors took to be written; 0 where it does not say."""
    return float(json.loads((directory / INFO).read_text()).get("save_seconds", 0.0))


def resumable(
    config: Config,
    tokenizer: Tokenizer,
    train_data: Dataset,
    *,
    steps: int,
    faults: dict[Path, str] | None = None,
) -> Path | None:
    """The checkpoint that a run of ``steps`` steps with ``config`` continues from; None for a fresh start.

    The one that ``latest`` names, or the newest before it that has no fault; tensors are not looked at.

    Args:
        faults: of checkpoints that were found damaged; what is found here is added.

    Raises:
        ConfigError: the run directory has checkpoints but must not be continued: none is sound, one cannot be read,
            another model, tokenizer, training data or seed, a run that is already longer, or
            ``checkpoint.resume: never``.
    """
    root = checkpoint_root(config)
    found = candidates(root)
    if not found:
        return None
    if config.checkpoint.resume == "never":
        raise ConfigError(
            f"{root} already has checkpoints and checkpoint.resume is never; choose another run.directory, or auto"
        )
    faults = {} if faults is None else faults
    for directory in (path for path in found if path not in faults):
        try:
            fault = find_fault(directory)
        except OSError as error:  # not a reason to fall back: the next save would replace what may be sound
            raise ConfigError(
                f"cannot read {directory}: {error.strerror}; correct that, or set {root / LATEST} back"
            ) from None
        if fault is None:
            _require_same_run(directory, config, tokenizer, train_data, steps)
            return directory
        faults[directory] = fault
    named = "; ".join(f"{path.name}: {fault}" for path, fault in faults.items())
    raise ConfigError(f"no checkpoint in {root} can be used ({named}); restore one, or choose another run.directory")


def changed_since(directory: Path, config: Config) -> list[Difference]:
    """What ``config`` changes in the run that the checkpoint ``directory`` is of. Raises ``ConfigError``."""
    return differences(read_stored(directory / CONFIG), config)


def _require_same_run(directory: Path, config: Config, tokenizer: Tokenizer, train_data: Dataset, steps: int) -> None:
    """Raise ``ConfigError`` where the configuration or the data contradicts the checkpoint."""
    info = read_info(directory)
    sources = describe_sources(config.data.train, train_data)
    # Fingerprints are of samples; digests are of all, but neither early checkpoints nor early corpora have them.
    digests = zip(info.get("train_digests", ()), train_data.digests, strict=False)
    known = [pair for pair in digests if None not in pair]
    found = [
        *(change for change in changed_since(directory, config) if f"{change.key}.".startswith(_BINDING)),
        Difference("the fingerprint of data.tokenizer", info.get("tokenizer_fingerprint"), tokenizer.fingerprint),
        Difference("the list of (fingerprint, share) of data.train", info.get("train_sources"), sources),
        Difference("the list of SHA-256 of data.train", [before for before, _ in known], [now for _, now in known]),
    ]
    for key, before, now in found:
        if before != now:
            raise ConfigError(
                f"{key} is {now!r} but was {before!r}, which {directory} cannot continue; restore it or choose another "
                "run.directory"
            )
    if info.get("step", 0) > steps:
        raise ConfigError(
            f"{directory} is beyond the {steps} steps of this run; train longer or choose another run.directory"
        )


def _pieces(training: Training, *, saving: bool) -> Iterator[Piece]:
    """This rank's share of the model and of the optimizer's state: what it updates, and no other rank does.

    Where ranks have copies (norms over the tensor-parallel ranks, tied embeddings at both ends of the pipeline), one of
    them saves, and all of them load.
    """
    placed = {placed.parameter: placed.blocks for placed in place([chunk.module for chunk in training.chunks])}
    for parameter, start, state in training.optimizer.shards():
        blocks = [block for block in placed[parameter] if not (saving and block.is_copy)]
        size = state["param"].numel()
        yield from pieces(blocks, parameter.detach().view(-1)[start : start + size], start)
        for name, tensor in state.items():
            yield from pieces(blocks, tensor.view(-1), start, prefix=f"optimizer.state.{name}.")


def _common(training: Training, progress: Progress) -> dict[str, Any]:
    """What is no tensor."""
    return {"optimizer": training.optimizer.common_state(), **progress._asdict(), "content_metadata": _METADATA}


def _begin(root: Path, partial: Path) -> None:
    for leftover in root.glob(".step-*.partial*"):  # of saves that were killed
        _delete(leftover)
    partial.mkdir(parents=True)


def _describe(
    training: Training, progress: Progress, directory: Path, known: dict[str, manifest.FileRecord], seconds: float
) -> None:
    """The resolved configuration, the tokenizer and the versions; the manifest makes it complete.

    Args:
        seconds: that writing the tensors has taken.
    """
    (directory / CONFIG).write_text(dump_yaml(training.config), encoding="utf-8")
    training.tokenizer.save(directory / TOKENIZER)
    info = {
        **progress._asdict(),
        "layout": str(training.topology),
        "tokenizer_fingerprint": training.tokenizer.fingerprint,
        "vocab_size": training.tokenizer.vocab_size,
        "train_sources": describe_sources(training.config.data.train, training.train_stream.dataset),
        "train_digests": training.train_stream.dataset.digests,
        "save_seconds": round(seconds, 3),
        "versions": versions(("megatron_dlm", "megatron-core", "torch")),
    }
    (directory / INFO).write_text(json_text(info), encoding="utf-8")
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
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def describe_sources(sources: list[SourceConfig], data: Dataset) -> list[list[Any]]:
    """[fingerprint, share] of every source; with the seed they decide which sequence every sample id is."""
    total = sum(source.weight for source in sources)
    shares = [round(source.weight / total, 12) for source in sources]
    return [[fingerprint, share] for fingerprint, share in zip(data.fingerprints, shares, strict=True)]
