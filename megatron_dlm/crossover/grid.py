"""The file of a crossover: a training configuration and a grid, and the arms that they make.

    base: {data: {...}, train: {...}, ...}     # a configuration of `megatron-dlm train`, without what the grid decides
    grid:
      unique_tokens: [20000, 80000]
      models: {small: {num_layers: 3, hidden_size: 96}}
      seeds: [1, 2]
      autoregressive: {input_mask_ratio: [0.0, 0.3], dropout: [0.0, 0.1]}
    arms_at_once: 2

Every model, budget and seed has one DLM arm and one AR arm for every mask ratio and dropout. The arms of a pair differ
in `model.objective` and what is the AR's own, so they read the same sequences in the same steps. Every arm has a folder
whose name says what it is; one that holds anything else is refused.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dlm.config.check import validate
from megatron_dlm.config.load import build, read_stored, read_yaml, to_dict
from megatron_dlm.config.tree import Config, ModelConfig
from megatron_dlm.crossover.curves import Arm, Run, read_run
from megatron_dlm.errors import ConfigError
from megatron_dlm.run_folder import RunFolder

# Keys that do not change what an arm learns or what is recorded of it.
_FREE = {
    "run": ("directory",),
    "parallel": None,
    "kernels": None,
    "data": ("train", "valid", "tokenizer"),  # by content, in arm.json
    "train": ("micro_batch_size", "recompute", "log_interval", "max_skipped_steps"),
    "evaluate": ("samples", "sample_tokens"),
    "checkpoint": ("interval", "keep", "resume"),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DECIDED = {  # keys of base, and where they belong
    "run.seed": "grid.seeds",
    "model.objective": "nothing, as both are trained",
    "data.unique_tokens": "grid.unique_tokens",
    "autoregressive.input_mask_ratio": "grid.autoregressive.input_mask_ratio",
}


@dataclass
class AutoregressiveGrid:
    """Variants of the autoregressive arm: every mask ratio with every dropout."""

    input_mask_ratio: list[float] = field(default_factory=lambda: [0.0])
    """Shares of the inputs that are replaced by [MASK]."""
    dropout: list[float] | None = None
    """Values for model.attention_dropout and model.hidden_dropout; null: what the base has."""


@dataclass
class Grid:
    """What is varied."""

    unique_tokens: list[int] = field(default_factory=list)
    """Budgets of unique tokens; those of a smaller one are part of a larger one."""
    seeds: list[int] = field(default_factory=list)
    """One run of every arm with each."""
    models: dict[str, Any] = field(default_factory=lambda: {"base": {}})
    """Names of models, and the keys of the model section in which they differ from the base."""
    autoregressive: AutoregressiveGrid = field(default_factory=AutoregressiveGrid)


@dataclass
class CrossoverConfig:
    """The file."""

    grid: Grid
    base: dict[str, Any] = field(default_factory=dict)
    """A training configuration; its run.directory is that of the crossover."""
    arms_at_once: int = 1
    """Arms that are trained at the same time."""


@dataclass(frozen=True)
class Crossover:
    """A checked file."""

    directory: Path
    """Of the results; every arm has a folder in it."""
    arms: dict[Arm, Config]
    """In the order in which they are trained."""
    arms_at_once: int

    @property
    def base(self) -> Config:
        """A configuration whose run.directory is the crossover's, for whoever locks it."""
        config = copy.deepcopy(next(iter(self.arms.values())))
        config.run.directory = str(self.directory)
        return config


def load_crossover(path: str, *, output: str | None = None, arms_at_once: int | None = None) -> Crossover:
    """Read a file; ``output`` and ``arms_at_once`` override it.

    Raises ``ConfigError``, one line: unknown keys, wrong types, contradictions.
    """
    file = build(CrossoverConfig, read_yaml(path), "")
    if arms_at_once is not None:
        file.arms_at_once = arms_at_once
    if file.arms_at_once < 1:
        raise ConfigError(f"arms_at_once is {file.arms_at_once}; it must be at least 1")
    for key, place in _DECIDED.items():
        section, name = key.split(".")
        if isinstance(given := file.base.get(section), Mapping) and name in given:
            raise ConfigError(f"base.{key} is decided by the grid; remove it (it belongs in {place})")
    base = build(Config, file.base, "base.")
    named = base.run.directory if "directory" in file.base.get("run", {}) else "runs/crossover"
    directory = Path(named if output is None else output)
    _check_base(base)
    _check_grid(file.grid)
    arms: dict[Arm, Config] = {}
    for arm in _arms(file.grid):
        config = _configure(arm, base, file.grid, directory)
        if any(other.name == arm.name for other in arms):
            raise ConfigError(f"two arms of the grid are {arm.name}: a value stands twice, or two differ too little")
        arms[arm] = config
    return Crossover(directory, arms, file.arms_at_once)


def _check_base(base: Config) -> None:
    if not base.data.valid:
        raise ConfigError("base.data.valid is empty, but the arms are compared on held-out data; give some")
    if base.checkpoint.resume != "auto":
        raise ConfigError(
            f"base.checkpoint.resume: {base.checkpoint.resume} would keep a stopped arm from going on; remove it"
        )
    if base.diffusion.complementary:
        raise ConfigError(
            "base.diffusion.complementary: true gives the DLM half the sequences of its AR in every step, which is no "
            "pair; set it to false"
        )


def _check_grid(grid: Grid) -> None:
    for name in ("unique_tokens", "seeds", "models"):
        if not getattr(grid, name):
            raise ConfigError(f"grid.{name} is empty; give at least one")
    for name, values in (
        ("autoregressive.input_mask_ratio", grid.autoregressive.input_mask_ratio),
        ("autoregressive.dropout", grid.autoregressive.dropout),
    ):
        if values is not None and not values:
            raise ConfigError(f"grid.{name} is empty; give at least one, or leave it out")
    for name, changes in grid.models.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(
                f"grid.models has the name {name!r}; use letters, digits, dots, dashes and underscores, as it is part "
                "of a folder's name"
            )
        build(ModelConfig, changes, f"grid.models.{name}.")
        if "objective" in changes:
            raise ConfigError(f"grid.models.{name}.objective: both objectives are trained; remove it")


def _arms(grid: Grid) -> list[Arm]:
    """One pair after the other, so that first results come early."""
    own = grid.autoregressive
    arms = []
    dropouts: list[float | None] = [*own.dropout] if own.dropout else [None]
    for model, tokens, seed in itertools.product(grid.models, sorted(grid.unique_tokens), grid.seeds):
        arms.append(Arm(model, tokens, "masked_diffusion", seed))
        for ratio, dropout in itertools.product(own.input_mask_ratio, dropouts):
            arms.append(Arm(model, tokens, "autoregressive", seed, ratio, dropout))
    return arms


def _configure(arm: Arm, base: Config, grid: Grid, directory: Path) -> Config:
    """The arm's training configuration; ``ConfigError`` names the arm."""
    config = copy.deepcopy(base)
    changes = build(ModelConfig, grid.models[arm.model], f"grid.models.{arm.model}.")
    for key in grid.models[arm.model]:
        setattr(config.model, key, getattr(changes, key))
    config.model.objective = arm.objective
    config.run.directory = str(directory / arm.name)
    config.run.seed = arm.seed
    config.data.unique_tokens = arm.unique_tokens
    config.autoregressive.input_mask_ratio = arm.input_mask_ratio
    if arm.dropout is not None:
        config.model.attention_dropout = config.model.hidden_dropout = arm.dropout
    try:
        validate(config)
    except ConfigError as error:
        raise ConfigError(f"{arm.name}: {error}") from None
    return config


def folder_of(config: Config) -> RunFolder:
    """The arm's run folder."""
    return RunFolder(Path(config.run.directory))


def finished_runs(crossover: Crossover) -> list[Run]:
    """What the finished arms have on record. Raises ``DataError`` for records that cannot be read."""
    folders = {arm: folder_of(config) for arm, config in crossover.arms.items()}
    return [read_run(arm, folder) for arm, folder in folders.items() if folder.is_finished]


def check_recorded(crossover: Crossover) -> None:
    """Raise ``ConfigError`` for a folder that contradicts its arm: another configuration, or another thing."""
    for config in crossover.arms.values():
        folder = folder_of(config)
        directory = folder.path
        if directory.exists() and not directory.is_dir():
            raise ConfigError(f"{directory} is a file, so this arm cannot be trained; move it away or choose --output")
        if not folder.config.exists():
            continue
        if not (directory / "arm.json").exists():
            raise ConfigError(f"{directory} holds a run that is not of a crossover; move it away or choose --output")
        recorded = read_stored(folder.config)
        if difference := first_difference(_bound(recorded), _bound(config)):
            key, before, now = difference
            raise ConfigError(
                f"{directory} was trained with {key} {before}, not {now}; restore it, choose another --output, or "
                "remove that folder to train the arm again"
            )


def _bound(config: Config) -> dict[str, Any]:
    """The keys that an arm's results depend on, by section."""
    tree = to_dict(config)
    return {
        section: {key: value for key, value in values.items() if key not in (_FREE.get(section) or ())}
        for section, values in tree.items()
        if _FREE.get(section, ()) is not None
    }


def first_difference(before: Any, now: Any, prefix: str = "") -> tuple[str, Any, Any] | None:
    """The first dotted key at which two trees differ, and both values."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return None if before == now else (prefix, before, now)
    keys = {**before, **now}
    found = (first_difference(before.get(key), now.get(key), f"{prefix}.{key}".lstrip(".")) for key in keys)
    return next((difference for difference in found if difference), None)
