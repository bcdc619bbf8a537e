"""Checkpoints that load at any parallel layout: written beside, renamed into place, ``latest`` moved last."""

from __future__ import annotations

import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dlm.config import Config, ConfigError
from megatron_dlm.config_loading import dump_yaml, from_dict, read_yaml
from megatron_dlm.data.dataset import Dataset
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.model.initialization import CHECKPOINT_METADATA
from megatron_dlm.parallel.compat import load_sharded, save_sharded
from megatron_dlm.training.setup import Training

# Optimizer state in terms of whole parameters: any layout may load what another has saved.
_METADATA = {
    **CHECKPOINT_METADATA,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
_INFO = "checkpoint.json"
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


def save(training: Training, *, step: int) -> Path:
    """Write the state after ``step`` completed steps; collective. Returns the checkpoint's directory.

    The directory appears under its name only when it is complete. Older checkpoints beyond
    ``checkpoint.keep`` are removed last.
    """
    root = checkpoint_root(training.config)
    final, partial = root / f"step-{step:08d}", root / f".step-{step:08d}.partial"
    if dist.get_rank() == 0:
        for leftover in root.glob(".step-*.partial*"):  # of saves that were killed
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    dist.barrier()
    save_sharded(_state(training, step, is_loading=False), str(partial), _METADATA)
    if dist.get_rank() == 0:
        _write_description(training, partial, step)
        if final.exists():  # of a branch that was given up; kept until the new one is in place
            os.rename(final, root / f".{final.name}.partial.old")
        os.rename(partial, final)
        _point_latest(root, final.name)
        _prune(root, final, keep=training.config.checkpoint.keep)
    dist.barrier()
    return final


def load(training: Training, directory: Path) -> int:
    """Restore model and optimizer, at any layout; collective. Returns the number of completed steps."""
    for part in training.optimizer.parts:
        # torch's Adam has no state before its first step, and megatron's sharded state needs one to fill.
        part._init_optimizer_states_with_dummy_values()
    state = load_sharded(_state(training, 0, is_loading=True), str(directory))
    for index, chunk in enumerate(training.chunks):
        chunk.module.load_state_dict(state[f"model{index}"])
    training.optimizer.megatron.load_state_dict(state["optimizer"])
    return int(state["step"])


def resumable(config: Config, tokenizer: Tokenizer, train_data: Dataset, *, steps: int) -> Path | None:
    """The checkpoint that a run of ``steps`` steps with ``config`` continues from; None for a fresh start.

    The one that ``latest`` names, or the newest complete one. Raises ``ConfigError`` where the run directory has
    checkpoints but must not be continued: another model, tokenizer, training data or seed, a run that is already
    longer, or ``checkpoint.resume: never``.
    """
    root = checkpoint_root(config)
    checkpoints = list_checkpoints(root)
    if not checkpoints:
        return None
    if config.checkpoint.resume == "never":
        raise ConfigError(
            f"{root} already has checkpoints and checkpoint.resume is never; choose another run.directory, or auto"
        )
    pointer = root / "latest"
    named = root / pointer.read_text().strip() if pointer.exists() else checkpoints[-1]
    latest = named if named in checkpoints else checkpoints[-1]
    saved = from_dict(read_yaml(str(latest / "config.yaml")))
    info = json.loads((latest / _INFO).read_text())
    pairs = [(key, _lookup(saved, key), _lookup(config, key)) for key in _BINDING]
    pairs.append(("the fingerprint of data.tokenizer", info["tokenizer_fingerprint"], tokenizer.fingerprint))
    sources = _describe_sources(config, train_data)
    pairs.append(("the list of (tokens, weight) of data.train", info["train_sources"], sources))
    for key, before, now in pairs:
        if before != now:
            what = _first_difference(key, before, now)
            raise ConfigError(f"{what}, which {latest} cannot continue; restore it or choose another run.directory")
    if info["step"] > steps:
        raise ConfigError(
            f"{latest} is beyond the {steps} steps of this run; train longer or choose another run.directory"
        )
    return latest


def checkpoint_root(config: Config) -> Path:
    """Where the checkpoints of a run are."""
    return Path(config.run.directory) / "checkpoints"


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under ``root``, oldest first."""
    return sorted(path for path in root.glob("step-*") if (path / _INFO).is_file())


def _state(training: Training, step: int, *, is_loading: bool) -> dict[str, Any]:
    model = {
        f"model{index}": chunk.module.sharded_state_dict(metadata=_METADATA)
        for index, chunk in enumerate(training.chunks)
    }
    optimizer = training.optimizer.megatron.sharded_state_dict(model, is_loading=is_loading, metadata=_METADATA)
    consumed = step * training.train_stream.global_batch_size
    return {**model, "optimizer": optimizer, "step": step, "consumed_samples": consumed}


def _write_description(training: Training, directory: Path, step: int) -> None:
    """The resolved configuration, the tokenizer and the versions; the marker of completeness comes last."""
    (directory / "config.yaml").write_text(dump_yaml(training.config))
    training.tokenizer.save(directory / "tokenizer")
    info = {
        "step": step,
        "consumed_samples": step * training.train_stream.global_batch_size,
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
    (directory / _INFO).write_text(json.dumps(info, indent=2) + "\n")


def _describe_sources(config: Config, train_data: Dataset) -> list[list[float]]:
    """[tokens, weight] of every source; with the seed they decide which sequence every sample id is."""
    weights = [source.weight for source in config.data.train]
    return [[tokens, weight] for tokens, weight in zip(train_data.source_tokens, weights, strict=True)]


def _prune(root: Path, current: Path, *, keep: int) -> None:
    """Remove what ``current`` makes obsolete: older checkpoints beyond ``keep``, newer ones of a branch given up."""
    checkpoints = list_checkpoints(root)
    place = checkpoints.index(current)
    for path in [*checkpoints[: max(0, place + 1 - keep)], *checkpoints[place + 1 :], *root.glob(".step-*.old")]:
        shutil.rmtree(path)


def _point_latest(root: Path, name: str) -> None:
    temporary = root / ".latest.partial"
    temporary.write_text(name + "\n")
    os.replace(temporary, root / "latest")


def _lookup(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _first_difference(key: str, before: Any, now: Any) -> str:
    for name in getattr(before, "__dataclass_fields__", ()):
        if getattr(before, name) != getattr(now, name):
            return _first_difference(f"{key}.{name}", getattr(before, name), getattr(now, name))
    return f"{key} is {now!r} but was {before!r}"
