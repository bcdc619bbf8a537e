"""The weights of a checkpoint without the rest of it: to run a model, or to begin training with them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from megatron_dlm.checkpoint.collective import cause
from megatron_dlm.checkpoint.sharded_state import read_sharded
from megatron_dlm.checkpoint.tensor_files import TensorReader
from megatron_dlm.errors import TrainingError
from megatron_dlm.model.initialization import CHECKPOINT_METADATA
from megatron_dlm.model.transformer import DiffusionTransformer

# Where the optimizer of a run keeps the fp32 values of its parameters, which are bf16 in a bf16 run.
_MAIN = "optimizer.state.param."

MainWeights = dict[str, dict[str, Tensor]]
"""This rank's parameters in fp32, on the CPU: by ``model{chunk}`` and name."""


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
    return TrainingError(f"cannot read checkpoint {directory}: {cause(error)}; restore it or give another one")
