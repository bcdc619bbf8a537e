"""Weights of another checkpoint to begin a run with: ``checkpoint.initialize_from``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dlm.checkpoint.collective import on_rank_zero
from megatron_dlm.checkpoint.model_weights import MainWeights, load_main_weights
from megatron_dlm.checkpoint.stored import StoredCheckpoint, exists, open_checkpoint
from megatron_dlm.config.tree import Config, ModelConfig
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.errors import ConfigError
from megatron_dlm.model.transformer import DiffusionTransformer

# What neither shapes the weights nor changes what a trained model computes.
_FREE = {"objective", "init_std", "attention_dropout", "hidden_dropout"}


# Keys whose default stands for a number that is computed from others.
_RESOLVED: dict[str, Callable[[ModelConfig], Any]] = {
    "num_query_groups": lambda model: model.resolved_query_groups,
    "head_dim": lambda model: model.resolved_head_dim,
}


class InitialWeights(NamedTuple):
    """What training begins with."""

    directory: Path
    """The checkpoint they are of."""
    main: MainWeights


def load_initial_weights(config: Config, chunks: Sequence[DiffusionTransformer]) -> InitialWeights | None:
    """Do what ``checkpoint.initialize_from`` says; collective. None where it says nothing.

    And where the run has checkpoints, which it will continue from: what it began with may be gone by then.

    Raises:
        ConfigError: it names no sound checkpoint; on all ranks.
        TrainingError: that cannot be read, or its tensors are damaged; on all ranks.
    """
    directory = on_rank_zero(lambda: _choose(config))  # the others might see a run's `latest` move
    if directory is None:
        return None
    return InitialWeights(directory, load_main_weights(chunks, directory))


def check_initial_weights(config: Config, tokenizer: Tokenizer) -> None:
    """Find out whether ``checkpoint.initialize_from``, if given, can be the beginning of a run with ``config``.

    Raises ``ConfigError`` where it is no checkpoint, or of another model or vocabulary; all differences in one line.
    """
    if config.checkpoint.initialize_from is None:
        return
    stored = open_checkpoint(config.checkpoint.initialize_from)
    differences = [f"{key} is {now!r} but was {before!r}" for key, before, now in _pairs(stored, config, tokenizer)]
    if differences:
        raise ConfigError(
            f"checkpoint.initialize_from {stored.directory} has weights of another model: {', '.join(differences)}; "
            f"take the values of its config.yaml, or another checkpoint"
        )


def _pairs(stored: StoredCheckpoint, config: Config, tokenizer: Tokenizer) -> list[tuple[str, Any, Any]]:
    """(key, value there, value here) of what differs."""
    pairs = []
    for item in fields(ModelConfig):
        if item.name not in _FREE:
            value = _RESOLVED.get(item.name, lambda model, name=item.name: getattr(model, name))
            pairs.append((f"model.{item.name}", value(stored.config.model), value(config.model)))
    pairs.append(("the vocabulary of data.tokenizer", stored.info["vocab_size"], tokenizer.vocab_size))
    fingerprint = stored.info["tokenizer_fingerprint"]
    pairs.append(("the fingerprint of data.tokenizer", fingerprint, tokenizer.fingerprint))
    return [(key, before, now) for key, before, now in pairs if before != now]


def _choose(config: Config) -> Path | None:
    if config.checkpoint.initialize_from is None or exists(config):
        return None
    return open_checkpoint(config.checkpoint.initialize_from).directory
