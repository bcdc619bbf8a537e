"""Checkpoints that load at any parallel layout: written beside, renamed into place, ``latest`` moved last."""

from __future__ import annotations

import json
import os
import pickle
import platform
import re
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_dlm.config import Config, ConfigError
from megatron_dlm.config_loading import dump_yaml, from_dict, read_yaml
from megatron_dlm.data.dataset import Dataset
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.errors import TrainingError
from megatron_dlm.model.initialization import CHECKPOINT_METADATA
from megatron_dlm.storage import manifest
from megatron_dlm.storage.locate import CONFIG, INFO, SMALL, TOKENIZER
from megatron_dlm.training.sharded_state import read_sharded, write_sharded

if TYPE_CHECKING:
    from megatron_dlm.training.setup import Training

# Optimizer state in terms of whole parameters: any layout may load what another has saved.
_METADATA = {
    **CHECKPOINT_METADATA,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
_NAME = re.compile(r"step-(\d{8,})")
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


class Progress(NamedTuple):
    """How far a run has come."""

    step: int
    """Completed steps."""
    skipped: int
    """Those of them that were skipped, because their gradient was not finite."""
    skipped_in_a_row: int = 0
    """The last ones of them."""

    def after(self, *, applied: bool) -> Progress:
        """One step further."""
        return Progress(self.step + 1, self.skipped + (not applied), 0 if applied else self.skipped_in_a_row + 1)


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
        _on_rank_zero(lambda: _begin(root, partial))
        own = write_sharded(_state(training, progress, is_loading=False), partial, _METADATA)
        records: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(records, own)
        known = {name: record for part in records for name, record in part.items()}
        _on_rank_zero(lambda: _describe(training, progress, partial, known))
        _on_rank_zero(lambda: _commit(root, partial, final))
    except (OSError, CheckpointException) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(
            f"cannot write checkpoint {final}: {cause(error)}; make room or correct that, and the same command "
            "continues from the checkpoint before, if there is one"
        ) from None
    if dist.get_rank() == 0:
        for path in _candidates(root)[training.config.checkpoint.keep :]:
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
    template = _state(training, Progress(0, 0), is_loading=True)
    try:
        state = read_sharded(template, directory)
    except (OSError, CheckpointException, pickle.UnpicklingError) as error:
        raise TrainingError(f"cannot read checkpoint {directory}: {cause(error)}; restore or remove it") from None
    for index, chunk in enumerate(training.chunks):
        chunk.module.load_state_dict(state[f"model{index}"])
    training.optimizer.load_state_dict(state["optimizer"])
    return Progress(int(state["step"]), int(state["skipped"]), int(state.get("skipped_in_a_row", 0)))


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
        _point_latest(found.parent, found.name)
    dist.barrier()
    return found


def check_sizes(directory: Path) -> str | None:
    """Whether the checkpoint is complete, without reading its large files: a sentence about the first fault."""
    try:
        return manifest.find_fault(directory, content=False) or manifest.find_fault(directory, SMALL)
    except OSError as error:
        raise _unreadable(directory, error.strerror) from None


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
    candidates = _candidates(root)
    if not candidates:
        return None
    if config.checkpoint.resume == "never":
        raise ConfigError(
            f"{root} already has checkpoints and checkpoint.resume is never; choose another run.directory, or auto"
        )
    faults = []
    for directory in candidates:
        if fault := verify(directory):
            faults.append(f"{directory.name}: {fault}")
        else:
            _require_same_run(directory, config, tokenizer, train_data, steps)
            return directory
    raise ConfigError(
        f"no checkpoint in {root} can be used ({'; '.join(faults)}); restore one, or choose another run.directory"
    )


def checkpoint_root(config: Config) -> Path:
    """Where the checkpoints of a run are."""
    return Path(config.run.directory) / "checkpoints"


def exists(config: Config) -> bool:
    """Whether a run has checkpoints, sound or not: then it continues, or is refused. Raises ``ConfigError``."""
    return bool(_candidates(checkpoint_root(config)))


def _candidates(root: Path) -> list[Path]:
    """What ``latest`` names and what is older, newest first; newer ones are of a branch that was given up."""
    directories = _checkpoints(root)
    try:
        latest = root / (root / "latest").read_bytes().decode(errors="replace").strip()
    except OSError:
        return directories
    return directories[directories.index(latest) :] if latest in directories else directories


def _checkpoints(root: Path) -> list[Path]:
    """Directories with the names of checkpoints, newest first. Whatever else is there is the user's.

    Raises ``ConfigError`` where ``root`` is something else than a directory.
    """
    if os.path.lexists(root) and not root.is_dir():
        raise ConfigError(f"{root} is not a directory; move it away or choose another run.directory")
    found = [(int(match[1]), path) for path in root.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


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


def shared_fault(directory: Path) -> str | None:
    """``manifest.find_fault`` with the reading shared among the ranks; collective, the same answer everywhere."""
    fault = unreadable = None
    try:
        records = manifest.read(directory)
        names = sorted({*records, *SMALL}, key=lambda name: records[name].size if name in records else 0, reverse=True)
        fault = manifest.find_fault(directory, names[dist.get_rank() :: dist.get_world_size()])
    except ValueError as error:
        fault = str(error)
    except OSError as error:
        unreadable = error.strerror
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (fault, unreadable))
    for _, unreadable in answers:
        if unreadable:
            raise _unreadable(directory, unreadable)
    return next((fault for fault, _ in answers if fault), None)


def _unreadable(directory: Path, reason: str | None) -> ConfigError:
    """Not a reason to fall back: the next save would replace a checkpoint that may be sound."""
    return ConfigError(f"cannot read {directory}: {reason}; correct that, or set {directory.parent / 'latest'} back")


def _state(training: Training, progress: Progress, *, is_loading: bool) -> dict[str, Any]:
    model = {
        f"model{index}": chunk.module.sharded_state_dict(metadata=_METADATA)
        for index, chunk in enumerate(training.chunks)
    }
    optimizer = training.optimizer.megatron.sharded_state_dict(model, is_loading=is_loading, metadata=_METADATA)
    consumed = progress.step * training.train_stream.global_batch_size
    return {**model, "optimizer": optimizer, **progress._asdict(), "consumed_samples": consumed}


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
        "consumed_samples": progress.step * training.train_stream.global_batch_size,
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
    current = set(_candidates(root))
    for path in _checkpoints(root):
        if path not in current or path == final:
            _remove(path)
    os.rename(partial, final)
    manifest.flush(root)
    _point_latest(root, final.name)


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


def _point_latest(root: Path, name: str) -> None:
    temporary = root / ".latest.partial"
    temporary.write_text(name + "\n")
    manifest.flush(temporary)
    if (root / "latest").is_dir():
        (root / "latest").rename(root / "latest.old")
    os.replace(temporary, root / "latest")
    manifest.flush(root)


def _on_rank_zero(action: Callable[[], None]) -> None:
    """Do something on rank 0 that all ranks wait for; collective. Its ``OSError`` is raised on all of them."""
    failure: list[OSError | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            failure = [error]
    dist.broadcast_object_list(failure)
    if failure[0]:
        raise failure[0]


def cause(error: Exception) -> str:
    """What went wrong, in a line; torch's exception has the errors of all ranks."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().partition("\n")[0] or type(error).__name__


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
