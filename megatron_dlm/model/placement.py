"""Where a rank's parameters stand in the whole tensors of the model, which no layout divides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_dlm.model.initialization import CHECKPOINT_METADATA


class Block(NamedTuple):
    """A contiguous range of a parameter's elements that is one rectangle of a whole tensor.

    Most parameters are one block; the gate and the input projection of SwiGLU, which are one parameter, are two.
    """

    key: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    begin: int
    """First element in the parameter."""
    is_copy: bool
    """Another tensor- or pipeline-parallel rank has the same elements, and writes them."""


class Placed(NamedTuple):
    """A parameter of this rank and its place in the checkpoint."""

    parameter: Tensor
    name: str
    """In its chunk."""
    chunk: int
    blocks: tuple[Block, ...]


def place(chunks: Sequence[MegatronModule]) -> list[Placed]:
    """Every parameter of the bare ``chunks`` with its blocks, from megatron's own description of its shards."""
    placed = []
    for index, chunk in enumerate(chunks):
        state = chunk.sharded_state_dict(metadata=dict(CHECKPOINT_METADATA))
        # By identity: the tensors of the description are the parameters themselves, or views of them.
        described = {id(base.data): base for base in nested_values(state) if isinstance(base.data, Tensor)}
        for name, parameter in chunk.named_parameters():
            base = described.get(id(parameter))
            assert isinstance(base, ShardedTensor | ShardedTensorFactory), f"megatron does not describe {name}"
            # A factory cuts its parameter into views, so a view's own offset says where its elements are.
            parts = nested_values(base.build()) if isinstance(base, ShardedTensorFactory) else [base]
            blocks = sorted((_block(part, parameter) for part in parts), key=lambda block: block.begin)
            placed.append(Placed(parameter, name, index, tuple(blocks)))
    return placed


def _block(part: ShardedTensor, parameter: Tensor) -> Block:
    assert part.data.is_contiguous() and part.flattened_range is None and not part.prepend_axis_num, part
    return Block(
        key=part.key,
        shape=tuple(part.global_shape),
        offset=tuple(part.global_offset),
        sizes=tuple(part.local_shape),
        # A view's place in its parameter is where both begin in the storage that they share.
        begin=part.data.storage_offset() - parameter.storage_offset(),
        # megatron's (pipeline, tensor, data) copies; which data-parallel rank writes what is for the caller to say.
        is_copy=any(part.replica_id[:2]),
    )
