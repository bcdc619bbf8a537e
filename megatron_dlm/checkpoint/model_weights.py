"""The weights of a checkpoint without the rest of it: to run a model, or to begin training with them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from megatron_dlm.checkpoint.collective import cause
from megatron_dlm.checkpoint.manifest import Damaged
from megatron_dlm.checkpoint.pieces import MAIN, Piece, pieces
from megatron_dlm.checkpoint.sharded_state import read_pieces
from megatron_dlm.checkpoint.tensor_files import TensorReader
from megatron_dlm.errors import TrainingError
from megatron_dlm.model.placement import place
from megatron_dlm.model.transformer import DiffusionTransformer

MainWeights = dict[str, dict[str, Tensor]]
"""This rank's parameters in fp32, on the CPU: by ``model{chunk}`` and name."""


def load_weights(chunks: Sequence[DiffusionTransformer], directory: Path) -> None:
    """Give bare chunks the weights of a checkpoint, which may be of any layout; collective.

    They become of the dtype that the chunks' parameters have.

    Raises:
        TrainingError: the checkpoint cannot be read, or is damaged; on all ranks.
    """
    _read(
        [
            piece
            for placed in place(chunks)
            for piece in pieces(placed.blocks, placed.parameter.detach().view(-1), start=0)
        ],
        directory,
    )


@torch.no_grad()
def load_main_weights(chunks: Sequence[DiffusionTransformer], directory: Path) -> MainWeights:
    """As ``load_weights``, from the most exact values that the checkpoint has, which are returned too.

    A run in bf16 has saved the fp32 values of its optimizer beside the weights.

    Raises:
        TrainingError: the checkpoint cannot be read, or is damaged; on all ranks.
    """
    try:
        stored = TensorReader(directory).read_metadata().state_dict_metadata
    except (OSError, Damaged, pickle.UnpicklingError) as error:
        raise _unreadable(directory, error) from None
    main: MainWeights = {f"model{index}": {} for index in range(len(chunks))}
    wanted: list[Piece] = []
    for parameter, name, chunk, blocks in (all_placed := place(chunks)):
        values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        main[f"model{chunk}"][name] = values
        prefix = MAIN if all(MAIN + block.key in stored for block in blocks) else ""
        wanted += pieces(blocks, values.view(-1), start=0, prefix=prefix)
    _read(wanted, directory)
    for placed in all_placed:
        placed.parameter.copy_(main[f"model{placed.chunk}"][placed.name])
    return main


def _read(wanted: list[Piece], directory: Path) -> None:
    try:
        read_pieces(wanted, directory)
    except (OSError, Damaged, CheckpointException, pickle.UnpicklingError) as error:
        raise _unreadable(directory, error) from None


def _unreadable(directory: Path, error: BaseException) -> TrainingError:
    return TrainingError(f"cannot read checkpoint {directory}: {cause(error)}; restore it or give another one")
