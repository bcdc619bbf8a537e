"""Weights as a pure function of (seed, global parameter name), at every parallel layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.transformer.module import MegatronModule

# Keys in which a residual branch ends; their scale shrinks with depth (GPT-2: std / sqrt(2 * layers)).
_RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")
# Rows of a tensor that are drawn at a time: the memory needed beside the model, and part of the definition
# of the initial weights (a row's values depend on its block's number, not on the shard that holds it).
_ROWS = 1024

CHECKPOINT_METADATA = {"non_homogeneous_layers": True}
"""Gives every layer's tensors keys with the global layer index, under PP and interleaving too.

Pass a copy: megatron puts process groups into what it is given, which no checkpoint could hold.
"""


def initialize_weights(chunks: Iterable[MegatronModule], *, seed: int, num_layers: int, std: float) -> None:
    """Fill every matrix with normal values of (seed, key, block of rows); norms stay at one.

    The mapping from shard to whole tensor is megatron's own checkpoint metadata, whose data are views of
    the parameters (both halves of a gated fc1 too), so that copying into them initialises the model.
    Call it on the bare chunks, before the data-parallel wrapper and the optimizer copy the weights.
    """
    for chunk in chunks:
        state = chunk.sharded_state_dict(metadata=dict(CHECKPOINT_METADATA))
        apply_factories(state)
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor) and tensor.data is not None and tensor.data.ndim >= 2:
                residual = tensor.key.endswith(_RESIDUAL_OUTPUTS)
                _fill(tensor, seed, std / (2 * num_layers) ** 0.5 if residual else std)


@torch.no_grad()
def _fill(tensor: ShardedTensor, seed: int, std: float) -> None:
    # This rank's rectangle of the whole tensor: rows first to first + rows, and some columns of the others.
    first, rows = tensor.global_offset[0], tensor.local_shape[0]
    columns = tuple(
        slice(start, start + size) for start, size in zip(tensor.global_offset[1:], tensor.local_shape[1:], strict=True)
    )
    # Blocks that reach beyond the shard are drawn whole and cut, so that a shard sees the whole tensor's values.
    for block in range(first // _ROWS, -(-(first + rows) // _ROWS)):
        begin, end = max(first, block * _ROWS), min(first + rows, (block + 1) * _ROWS)
        values = _block(seed, tensor.key, block, tuple(tensor.global_shape)).mul_(std)
        here = values[begin - block * _ROWS : end - block * _ROWS][(slice(None), *columns)]
        tensor.data[begin - first : end - first].copy_(here)


def _block(seed: int, key: str, block: int, global_shape: tuple[int, ...]) -> torch.Tensor:
    """Rows ``block * _ROWS`` onwards of the whole tensor, standard normal, fp32."""
    digest = hashlib.blake2b(f"{seed}/{key}/{block}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.randn(min(_ROWS, global_shape[0]), *global_shape[1:], generator=generator)
