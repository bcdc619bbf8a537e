"""The files of a checkpoint's tensors: torch.distributed.checkpoint's format, hashed as written and safe to read.

What megatron-core adds to it (``torch_dist``) are two small files, so nothing here needs megatron or process groups.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as index
from torch.distributed.checkpoint.filesystem import FileSystem

from megatron_dlm.checkpoint.manifest import FileRecord

COMMON = "common.pt"
"""File of the plain values."""
INDEX = ".metadata"
"""File that says where every tensor is."""
_FORMAT = "metadata.json"
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class TensorWriter(dcp.FileSystemWriter):
    """Writes one file per rank into an existing ``directory`` and the plain values ``common``, flushed to the disk."""

    def __init__(self, directory: Path, common: dict[str, Any]) -> None:
        super().__init__(directory, single_file_per_rank=True, sync_files=True)
        self.fs = _HashingFileSystem()
        self._common = common

    @property
    def records(self) -> dict[str, FileRecord]:
        """Of the large files that this rank has written, by name."""
        return self.fs.records

    def storage_meta(self) -> index.StorageMeta:
        """Nothing: torch's has the path written to, which is not the path the checkpoint will have."""
        return index.StorageMeta()

    def finish(self, metadata: index.Metadata, results: Any) -> None:
        """Write the index and the plain values; on rank 0, while the others wait for its result."""
        super().finish(metadata, results)
        buffer = io.BytesIO()
        torch.save(self._common, buffer)
        (Path(self.path) / COMMON).write_bytes(buffer.getvalue())
        (Path(self.path) / _FORMAT).write_text(json.dumps(_BACKEND))


class _HashingFileSystem(FileSystem):
    """Knows size and digest of the tensor files that were written through it."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with _HashingWriter(path) as stream:
            yield stream
        if Path(path).suffix == ".distcp":
            self.records[Path(path).name] = FileRecord(stream.size, stream.sha256.hexdigest())


class _HashingWriter(io.BufferedWriter):
    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__(io.FileIO(path, "w"), buffer_size=1 << 20)
        self.sha256, self.size = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.size += memoryview(data).nbytes
        return super().write(data)


class TensorReader(dcp.FileSystemReader):
    """Has read the index of tensors, a pickle, without letting it call anything.

    Raises ``OSError`` for an index that cannot be read, ``pickle.UnpicklingError`` for one that is something else.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        with open(directory / INDEX, "rb") as file:
            self._index = _IndexUnpickler(file).load()

    def read_metadata(self, *args: Any, **kwargs: Any) -> index.Metadata:
        self._index.storage_meta = index.StorageMeta(load_id=self.load_id)
        return self._index


class _IndexUnpickler(pickle.Unpickler):
    """Knows the classes of the index, dtypes, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INDEX_NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == _INDEX_MODULE and getattr(getattr(index, name, None), "__module__", None) == _INDEX_MODULE:
            return getattr(index, name)
        raise pickle.UnpicklingError(f"refusing to load {module}.{name} from an index of tensors")


_INDEX_MODULE = index.__name__
_INDEX_NAMES = {
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}
