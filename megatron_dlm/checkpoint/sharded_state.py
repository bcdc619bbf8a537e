"""Megatron's sharded state dicts on disk, in its own layout-independent format (torch_dist).

Read and written by torch.distributed.checkpoint's plain file writer, not by megatron's: that one forks helper
processes, waits for ever for one that was killed, and leaves the others behind when its rank is. Here every rank writes
one file and hashes what it writes, an error on any rank is raised on all of them, and nothing that is read can execute
code. ``megatron.core.dist_checkpointing.load`` of any supported version reads the result.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.utils import extract_sharded_base

from megatron_dlm.checkpoint.manifest import FileRecord
from megatron_dlm.checkpoint.tensor_files import COMMON, TensorReader, TensorWriter


def write_sharded(state: dict[str, Any], directory: Path, metadata: dict[str, Any]) -> dict[str, FileRecord]:
    """Write a sharded state dict into an existing, empty ``directory``; collective, durable when it returns.

    Args:
        state: tensors wrapped by megatron's ``sharded_state_dict``, and plain values that are equal on all ranks.
        directory: on a file system that all ranks share.
        metadata: what ``state`` was made with; stored beside it.

    Returns:
        Records of the large files that this rank has written, by name.

    Raises:
        CheckpointException: a rank could not write; on all ranks.
    """
    sharded, common = save_preprocess({**state, "content_metadata": metadata})
    flat, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(_tensors(sharded), True)
    writer = TensorWriter(directory, common)
    planner = torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    dcp.save(torch_dist.mcore_to_pyt_state_dict(flat, False), storage_writer=writer, planner=planner)
    return writer.records


def read_sharded(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Read ``directory`` into the shape of the sharded state dict ``state``, of any layout; collective.

    Raises:
        CheckpointException: a rank could not read, or found something that is not a tensor; on all ranks.
        pickle.UnpicklingError: the index or the plain values hold something else than they should.
    """
    sharded, nonpersistent, factories = load_preprocess(state)
    result = torch.load(directory / COMMON, map_location="cpu", weights_only=True)
    merge(result, nonpersistent)
    template = _tensors(extract_sharded_base(sharded)[0])
    flat, flat_names, names = torch_dist._replace_state_dict_keys_with_sharded_keys(template)
    tensors = torch_dist.mcore_to_pyt_state_dict(flat, True)
    planner = _TensorPlanner(
        shapes_validation_sharded_tensors=[t for t in nested_values(template) if isinstance(t, ShardedTensor)],
        flatten_state_dict=False,
        flatten_sharded_tensors=False,
    )
    dcp.load(tensors, storage_reader=TensorReader(directory), planner=planner)
    loaded = {key: torch_dist._unwrap_pyt_sharded_tensor(value) for key, value in tensors.items()}
    loaded = torch_dist._replace_sharded_keys_with_state_dict_keys(loaded, flat_names, names)
    torch_dist._restore_dict_types(loaded, template)
    merge(result, loaded)
    return apply_factory_merges(result, factories)


def _tensors(sharded: dict[str, Any]) -> dict[str, Any]:
    """Without the pickled objects: Transformer Engine's (empty) extra states, which other layers do not have."""
    return extract_matching_values(sharded, lambda value: not isinstance(value, ShardedObject))[0]


class _TensorPlanner(torch_dist.MCoreLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise pickle.UnpicklingError(f"refusing to load {read_item.dest_index.fqn}, which is not a tensor")
