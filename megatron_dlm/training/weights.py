"""The weights of a checkpoint without the rest of it: to run a model, or to begin training with them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from megatron_dlm.config import Config, ConfigError, ModelConfig
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.errors import TrainingError
from megatron_dlm.model.initialization import CHECKPOINT_METADATA
from megatron_dlm.model.transformer import DiffusionTransformer
from megatron_dlm.storage.locate import StoredCheckpoint, open_checkpoint
from megatron_dlm.storage.tensor_files import TensorReader
from megatron_dlm.training import checkpoint
from megatron_dlm.training.sharded_state import read_sharded

# Where the optimizer of a run keeps the fp32 values of its parameters, which are bf16 in a bf16 run.
_MAIN = "optimizer.state.param."
# What neither shapes the weights nor changes what a trained model computes.
_FREE = {"objective", "init_std", "attention_dropout", "hidden_dropout"}
# Keys whose default stands for a number that is computed from others.
_RESOLVED: dict[str, Callable[[ModelConfig], Any]] = {
    "num_query_groups": lambda model: model.resolved_query_groups,
    "head_dim": lambda model: model.resolved_head_dim,
}

MainWeights = dict[str, dict[str, Tensor]]
"""This rank's parameters in fp32, on the CPU: by ``model{chunk}`` and name."""


class InitialWeights(NamedTuple):
    """What training begins with."""

    directory: Path
    """The checkpoint they are of."""
    main: MainWeights


def load_weights(chunks: Sequence[DiffusionTransformer], directory: Path) -> None:
    """Give bare chunks the weights of a checkpoint, which may be of any layout; collective.

    They become of the dtype that the chunks' parameters have.

    Raises:
        TrainingError: the checkpoint cannot be read; on all ranks.
    """
    _copy(_read(chunks, directory, lambda value: value), chunks)


def load_main_weights(chunks: Sequence[DiffusionTransformer], directory: Path) -> MainWeights:
    """As ``load_weights``, from the most exact values that the checkpoint has, which are returned too.

    A run in bf16 has saved the fp32 values of its optimizer beside the weights.

    Raises:
        TrainingError: the checkpoint cannot be read; on all ranks.
    """
    try:
        stored = TensorReader(directory).read_metadata().state_dict_metadata
    except (OSError, pickle.UnpicklingError) as error:
        raise _unreadable(directory, error) from None

    def in_fp32(value: Any) -> Any:
        if not isinstance(value, ShardedTensor | ShardedTensorFactory):
            return value
        key = _MAIN + value.key if _MAIN + value.key in stored else value.key
        data = torch.empty_like(value.data, dtype=torch.float32, device="cpu", requires_grad=False)
        if isinstance(value, ShardedTensor):
            return replace(value, key=key, data=data, dtype=torch.float32)
        return replace(value, key=key, data=data)

    main = _read(chunks, directory, in_fp32)
    _copy(main, chunks)
    return main


def load_initial_weights(config: Config, chunks: Sequence[DiffusionTransformer]) -> InitialWeights | None:
    """Do what ``checkpoint.initialize_from`` says; collective. None where it says nothing.

    And where the run has checkpoints, which it will continue from: what it began with may be gone by then.

    Raises:
        ConfigError: it names no sound checkpoint; on all ranks.
        TrainingError: that cannot be read; on all ranks.
    """
    choice: list[Any] = [None]
    if dist.get_rank() == 0:  # the others might see a run's `latest` move
        choice = [_choose(config)]
    dist.broadcast_object_list(choice)
    if isinstance(choice[0], ConfigError):
        raise choice[0]
    directory: Path | None = choice[0]
    if directory is None:
        return None
    if fault := checkpoint.shared_fault(directory):
        raise ConfigError(f"checkpoint.initialize_from {directory} is damaged: {fault}; restore it or give another one")
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
            value = _RESOLVED.get(item.name, lambda model, name=item.name: getattr(model, name))  # type: ignore[misc]
            pairs.append((f"model.{item.name}", value(stored.config.model), value(config.model)))
    pairs.append(("the vocabulary of data.tokenizer", stored.info["vocab_size"], tokenizer.vocab_size))
    fingerprint = stored.info["tokenizer_fingerprint"]
    pairs.append(("the fingerprint of data.tokenizer", fingerprint, tokenizer.fingerprint))
    return [(key, before, now) for key, before, now in pairs if before != now]


def _choose(config: Config) -> Path | ConfigError | None:
    try:
        if config.checkpoint.initialize_from is None or checkpoint.exists(config):
            return None
        return open_checkpoint(config.checkpoint.initialize_from).directory
    except ConfigError as error:
        return error


def _read(
    chunks: Sequence[DiffusionTransformer], directory: Path, change: Callable[[Any], Any]
) -> dict[str, dict[str, Tensor]]:
    """The chunks' tensors by ``model{chunk}`` and name, read into what ``change`` makes of their sharded tensors."""
    template = {}
    for index, chunk in enumerate(chunks):
        state = chunk.sharded_state_dict(metadata=CHECKPOINT_METADATA)
        template[f"model{index}"] = dict_list_map_outplace(change, state)
    try:
        return read_sharded(template, directory)
    except (OSError, CheckpointException, pickle.UnpicklingError) as error:
        raise _unreadable(directory, error) from None


@torch.no_grad()
def _copy(weights: dict[str, dict[str, Tensor]], chunks: Sequence[DiffusionTransformer]) -> None:
    for index, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            parameter.copy_(weights[f"model{index}"][name])


def _unreadable(directory: Path, error: Exception) -> TrainingError:
    return TrainingError(
        f"cannot read checkpoint {directory}: {checkpoint.cause(error)}; restore it or give another one"
    )
