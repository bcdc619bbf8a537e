"""The model's tensors of a checkpoint, whole and one at a time; and checkpoints that hold nothing but them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, NamedTuple, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from megatron_dlm.checkpoint.collective import cause
from megatron_dlm.checkpoint.manifest import Damaged, FileRecord
from megatron_dlm.checkpoint.tensor_files import INDEX, TensorReader, TensorWriter
from megatron_dlm.errors import ConfigError

_FILE = "__0_0.distcp"  # as torch names the first file of rank 0


class TensorInfo(NamedTuple):
    """A whole tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightsReader:
    """Reads whole tensors of the model in a checkpoint of any layout; one process, no process group, no megatron.

    Attributes:
        tensors: of the model by key, without the optimizer's.
        files: names of the files that hold them.
    """

    tensors: dict[str, TensorInfo]
    files: list[str]

    def __init__(self, directory: Path) -> None:
        """Read the index.

        Raises:
            ConfigError: it cannot be read, or is not an index of tensors.
        """
        self._directory = directory
        try:
            self._reader = TensorReader(directory)
            self._index = self._reader.read_metadata()
            self.tensors, self.files = _contents(self._index)
        except Exception as error:  # a pickle of something else fails in any way
            raise _unreadable(directory / INDEX, error) from None
        self._reader.set_up_storage_reader(self._index, is_coordinator=True)

    def read(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, its shards put together; in memory is one stored shard at a time beside the result.

        Args:
            key: of ``tensors``.
            dtype: of the result; None: as stored.

        Raises:
            ConfigError: its file cannot be read, or is not what was written.
        """
        info = self.tensors[key]
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            result = torch.empty(info.shape, dtype=dtype or info.dtype)
            planner.set_up_planner({key: result}, self._index, is_coordinator=True)
            plan = planner.create_local_plan()
            if sum(math.prod(item.lengths) for item in plan.items) != result.numel():
                raise ValueError("its shards are not the whole tensor")
            # Into the result itself: of another dtype than the shards, it makes no copy of them in that dtype.
            self._reader.read_data(plan, planner)
        except Damaged as fault:
            raise ConfigError(
                f"checkpoint {self._directory} is damaged: {fault}; restore it or give another one"
            ) from None
        except Exception as error:  # torch has no common class for what a damaged file can cause
            raise _unreadable(f"{key} of {self._directory}", error) from None
        return result


def write_weights(
    directory: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], Tensor]
) -> dict[str, FileRecord]:
    """Write a checkpoint's tensor files from tensors that are made one at a time; flushed to the disk.

    Args:
        directory: exists and is empty.
        tensors: what will be written.
        read: gives the tensor of a key; called once for each, and the result is dropped once it is written.

    Returns:
        Records of the large files, for the manifest.

    Raises:
        OSError: it could not be written.
    """
    writer = TensorWriter(directory, common={})
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(
        {key: torch.empty(info.shape, dtype=info.dtype, device="meta") for key, info in tensors.items()},
        is_coordinator=True,
    )
    (plan,), metadata = planner.create_global_plan([planner.create_local_plan()])
    results = []
    # Not by the writer's own write_data, which keeps every tensor of a file until the file is complete.
    with writer.fs.create_stream(directory / _FILE, "wb") as stream:
        for item in plan.items:
            start, key = stream.tell(), item.index.fqn
            torch.save(_bare(read(key), tensors[key]), cast(IO[bytes], stream))
            length = stream.tell() - start
            results.append(WriteResult(item.index, length, _StorageInfo(_FILE, start, length)))
        stream.flush()
        os.fsync(stream.fileno())
    writer.finish(metadata, [results])
    return writer.records


def model_keys(keys: Iterable[str]) -> list[str]:
    """Those of ``keys`` that are the model's and not the optimizer's."""
    return [key for key in keys if not key.startswith("optimizer.")]


def _contents(index: Metadata) -> tuple[dict[str, TensorInfo], list[str]]:
    """The model's tensors, and the files they are in."""
    tensors = {
        key: TensorInfo(tuple(stored.size), stored.properties.dtype)
        for key in model_keys(index.state_dict_metadata)
        if isinstance(stored := index.state_dict_metadata[key], TensorStorageMetadata)
    }
    return tensors, sorted({place.relative_path for item, place in index.storage_data.items() if item.fqn in tensors})


def _bare(tensor: Tensor, info: TensorInfo) -> Tensor:
    """``tensor`` on the CPU with nothing else in its storage, all of which would be written."""
    assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), "not the tensor that was announced"
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _unreadable(what: Path | str, error: Exception) -> ConfigError:
    return ConfigError(f"cannot read {what}: {cause(error)}; restore it or give another checkpoint")
