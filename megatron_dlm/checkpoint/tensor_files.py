"""The files of a checkpoint's tensors: torch.distributed.checkpoint's format, hashed as written, verified as read.

What megatron-core adds to it (``torch_dist``) are two small files, so nothing here needs megatron or process groups.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as index
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_dlm.checkpoint.manifest import BLOCK_BYTES, Damaged, FileRecord, read_blocks, require_inside
from megatron_dlm.files import open_regular

COMMON = "common.pt"
"""File of the plain values."""
INDEX = ".metadata"
"""File that says where every tensor is."""
TENSORS = ".distcp"
"""Suffix of the files of the tensors."""
_FORMAT = "metadata.json"
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class TensorWriter(dcp.FileSystemWriter):
    """Writes a file of this rank's pieces into an existing ``directory``, on rank 0 the plain values ``common`` too.

    Everything is flushed to the disk. A rank without pieces writes no file.
    """

    def __init__(self, directory: Path, common: dict[str, Any]) -> None:
        super().__init__(directory, single_file_per_rank=True, sync_files=True)
        # torch writes through this attribute: the one place where all bytes come by.
        self.fs = self._hashing = _HashingFileSystem()
        self._common = common

    @property
    def records(self) -> dict[str, FileRecord]:
        """Of the large files that this rank has written, by name."""
        return self._hashing.records

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """As torch's, but no empty files."""
        if plan.items:
            return super().write_data(plan, planner)
        nothing: Future[list[WriteResult]] = Future()
        nothing.set_result([])
        return nothing

    def storage_meta(self) -> index.StorageMeta:
        """Nothing: torch's has the path written to, which is not the path the checkpoint will have."""
        return index.StorageMeta()

    def finish(self, metadata: index.Metadata, results: Any) -> None:
        """Write the index and the plain values; on rank 0, while the others wait for its result."""
        # The index is small and hashed with the other small files, when the manifest is written.
        super().finish(metadata, results)
        buffer = io.BytesIO()
        torch.save(self._common, buffer)
        (Path(self.path) / COMMON).write_bytes(buffer.getvalue())
        (Path(self.path) / _FORMAT).write_text(json.dumps(_BACKEND))


class _HashingFileSystem(FileSystem):
    """Knows size and digests of the tensor files that were written through it."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        # What is read, or written as text, is none of the large files.
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        try:
            with _HashingWriter(path) as stream:
                yield stream
        except OSError as error:  # of a write, which does not say where
            error.filename = error.filename or str(path)
            raise
        if Path(path).suffix == TENSORS:
            self.records[Path(path).name] = stream.record()


class _HashingWriter(io.BufferedWriter):
    """Hashes the whole file, and every block of it: a reader of a part must be able to verify that part."""

    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__(io.FileIO(path, "w"), buffer_size=1 << 20)
        self._whole, self._block, self._size = hashlib.sha256(), hashlib.sha256(), 0
        self._blocks: list[str] = []

    def write(self, data: Any) -> int:
        # As bytes, whatever it was: lengths below are counted in them.
        view = memoryview(data).cast("B")
        self._whole.update(view)
        for start in range(0, len(view), BLOCK_BYTES):
            self._hash_blocks(view[start : start + BLOCK_BYTES])
        # Hashed on the way to the disk: no second pass over what was written.
        return super().write(view)

    def record(self) -> FileRecord:
        """What has been written."""
        # The last block is shorter, unless the file ends with a whole one.
        unfinished = [self._block.hexdigest()] if self._size % BLOCK_BYTES else []
        return FileRecord(self._size, self._whole.hexdigest(), (*self._blocks, *unfinished))

    def _hash_blocks(self, view: memoryview) -> None:
        """Add at most one block's length of bytes, which may end one block and begin the next."""
        # What is left of the block that was begun; the rest of the view begins the next.
        room = BLOCK_BYTES - self._size % BLOCK_BYTES
        self._block.update(view[:room])
        self._size += len(view)
        if len(view) >= room:
            self._blocks.append(self._block.hexdigest())
            self._block = hashlib.sha256(view[room:])


class _VerifyingFileSystem(FileSystem):
    """Lets nothing be read of a tensor file but what was written into it."""

    def __init__(self, blocks: Mapping[str, Sequence[str]]) -> None:
        self._blocks = blocks

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with open_regular(path) as stream:
            name = Path(path).name
            yield _VerifiedFile(stream, name, self._blocks[name]) if name in self._blocks else stream


class _VerifiedFile(io.RawIOBase):
    """A file that is read in blocks, each compared with its digest before a byte of it is handed out.

    So a part of a file can be trusted without reading the rest, and nothing is read twice. Raises ``Damaged``.
    """

    def __init__(self, file: Any, name: str, digests: Sequence[str]) -> None:
        self._file, self._name, self._digests = file, name, digests
        self._position, self._number, self._block = 0, -1, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET:
            offset += self._position if whence == os.SEEK_CUR else self._file.seek(0, os.SEEK_END)
        self._position = offset
        return offset

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer``, but for the end of the file: torch takes less for an error."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            number, begin = divmod(self._position, BLOCK_BYTES)
            part = self._load(number)[begin : begin + len(view) - done]
            if not part:
                break
            view[done : done + len(part)] = part
            done, self._position = done + len(part), self._position + len(part)
        return done

    def _load(self, number: int) -> bytes:
        if number != self._number and number < len(self._digests):
            self._file.seek(number * BLOCK_BYTES)
            block = self._file.read(BLOCK_BYTES)
            if hashlib.sha256(block).hexdigest() != self._digests[number]:
                raise Damaged.of(self._name)
            self._number, self._block = number, block
        return self._block if number == self._number else b""


class TensorReader(dcp.FileSystemReader):
    """Has read the index of tensors, a pickle, without letting it call anything; verifies the tensors as it reads them.

    A checkpoint of an earlier version has digests of whole files only: there the files must be verified before.

    Raises ``OSError`` for an index that cannot be read, ``pickle.UnpicklingError`` for one that is something else,
    ``Damaged`` (from reading, too) for a file that is not what was written, or not the checkpoint's.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        # As in the writer: torch opens every file through this.
        self.fs = _VerifyingFileSystem(read_blocks(directory))
        try:
            with open_regular(directory / INDEX) as file:
                self._index = _IndexUnpickler(file).load()
            files = _files(self._index)
        except (OSError, pickle.UnpicklingError):
            raise
        except Exception as error:  # a pickle of something else fails in any way
            raise pickle.UnpicklingError(f"its {INDEX} is damaged ({type(error).__name__})") from None
        for name in files:
            require_inside(directory, name)

    def read_metadata(self, *args: Any, **kwargs: Any) -> index.Metadata:
        # Left out at saving, because it would have the folder's path of then; the planners ask for it.
        self._index.storage_meta = index.StorageMeta(load_id=self.load_id)
        return self._index


def _files(found: Any) -> set[str]:
    """The files that an index names. Raises ``ValueError`` where its parts are not what its readers expect."""
    if type(found) is not index.Metadata:
        raise ValueError("an index")
    for key, stored in found.state_dict_metadata.items():
        if isinstance(stored, index.BytesStorageMetadata):
            continue
        sizes = [stored.size, *(part for chunk in stored.chunks for part in (chunk.offsets, chunk.sizes))]
        whole = all(type(size) is torch.Size and len(size) == len(stored.size) for size in sizes)
        known = type(key) is str and isinstance(stored.properties.dtype, torch.dtype)
        counted = all(number >= 0 for size in sizes for number in size)
        if type(stored) is not index.TensorStorageMetadata or not (whole and known and counted):
            raise ValueError("tensors")
    for place, info in found.storage_data.items():
        if type(place) is not index.MetadataIndex or type(info) is not _StorageInfo:
            raise ValueError("places")
        if not all(type(number) is int and number >= 0 for number in (info.offset, info.length)):
            raise ValueError("numbers")
        if type(info.relative_path) is not str or getattr(info, "transform_descriptors", None):
            raise ValueError("files")
    return {info.relative_path for info in found.storage_data.values()}


class _IndexUnpickler(pickle.Unpickler):
    """Knows the classes of the index, dtypes, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        # By exact name. A pickle may ask for any callable, and calling it is all that an attack needs.
        if (module, name) in _INDEX_NAMES:
            return super().find_class(module, name)
        # dtypes are values, not callables.
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        # Only what is defined in that module itself: it imports others, whose names it has too.
        if module == _INDEX_MODULE and getattr(getattr(index, name, None), "__module__", None) == _INDEX_MODULE:
            return getattr(index, name)
        raise pickle.UnpicklingError(f"refusing to load {module}.{name} from an index of tensors")


_INDEX_MODULE = index.__name__
_INDEX_NAMES = {
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}
