"""Pieces of tensors on disk, in megatron-core's own layout-independent format (torch_dist).

Written and read by torch.distributed.checkpoint, with planners that know rectangles and nothing else; not by megatron's
writers, which fork helper processes, wait for ever for one that was killed, and leave the others behind when their rank
is. An error on any rank is raised on all of them, and nothing that is read can execute code.
``megatron.core.dist_checkpointing.load`` of any supported version reads the result.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_dlm.checkpoint.manifest import FileRecord
from megatron_dlm.checkpoint.pieces import MAIN, Piece
from megatron_dlm.checkpoint.tensor_files import COMMON, TensorReader, TensorWriter
from megatron_dlm.files import open_regular


def write_pieces(pieces: Iterable[Piece], common: dict[str, Any], directory: Path) -> dict[str, FileRecord]:
    """Write this rank's pieces into an existing, empty ``directory``; collective, durable when it returns.

    Args:
        pieces: of all ranks together they are whole tensors, and no two of them overlap.
        common: plain values, equal on all ranks; rank 0 writes them.
        directory: on a file system that all ranks share.

    Returns:
        Records of the large files that this rank has written, by name; none where it has no pieces.

    Raises:
        CheckpointException: a rank could not write; on all ranks.
    """
    writer = TensorWriter(directory, common)
    # Nothing in the state that torch knows of: the planner has all the pieces.
    dcp.save({}, storage_writer=writer, planner=_PieceWriter(pieces))
    return writer.records


def read_pieces(pieces: Iterable[Piece], directory: Path) -> None:
    """Fill this rank's pieces, whatever rectangles the checkpoint has; collective.

    Every rank reads what overlaps its own pieces and no more, and verifies what it reads: weights must be finite.

    Raises:
        CheckpointException: a rank could not read, or found something else than its pieces; on all ranks.
        pickle.UnpicklingError: the index holds something else than it should.
    """
    dcp.load({}, storage_reader=TensorReader(directory), planner=_PieceReader(pieces))


def read_common(directory: Path) -> dict[str, Any]:
    """The plain values. Raises ``OSError`` or ``pickle.UnpicklingError``."""
    with open_regular(directory / COMMON) as file:
        try:
            common = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, pickle.UnpicklingError):
            raise
        except Exception as error:  # what is no archive of torch's fails in any way
            raise pickle.UnpicklingError(f"its {COMMON} is damaged ({type(error).__name__})") from None
    if not isinstance(common, dict):
        raise pickle.UnpicklingError(f"its {COMMON} is damaged")
    return common


def _by_place(pieces: Iterable[Piece]) -> dict[MetadataIndex, Piece]:
    # Key and offset name a piece; no two of one rank begin at the same place.
    return {MetadataIndex(piece.key, torch.Size(piece.offset)): piece for piece in pieces}


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(piece.offset), sizes=piece.data.shape)


class _PieceWriter(dcp.DefaultSavePlanner):
    """torch's own planner checks that the pieces of all ranks fill whole tensors and do not overlap."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        # There is no dictionary to be flattened: the plan is made from the pieces alone.
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces = _by_place(pieces)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    index=index,
                    # A rectangle of a larger tensor, even where it is the whole.
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=_chunk(piece),
                        properties=TensorProperties.create_from_tensor(piece.data),
                        size=torch.Size(piece.shape),
                    ),
                )
                for index, piece in self._pieces.items()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._pieces[index].data


class _PieceReader(dcp.DefaultLoadPlanner):
    def __init__(self, pieces: Iterable[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces = _by_place(pieces)

    def create_local_plan(self) -> LoadPlan:
        by_key: dict[str, list[Piece]] = {}
        for piece in self._pieces.values():
            # A tensor's pieces together: what overlaps them is looked up once.
            by_key.setdefault(piece.key, []).append(piece)
        return LoadPlan([item for key, pieces in by_key.items() for item in self._items(key, pieces)])

    def _items(self, key: str, pieces: Sequence[Piece]) -> list[ReadItem]:
        assert self.metadata is not None, "the reader has set it up"
        stored = self.metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise ValueError(f"it has no tensor {key}")
        if tuple(stored.size) != pieces[0].shape:
            raise ValueError(f"{key} is {list(stored.size)} instead of {list(pieces[0].shape)}")
        items = create_read_items_for_chunk_list(key, stored, [_chunk(piece) for piece in pieces])
        # Overlaps that add up to less leave a hole, which would keep what was in memory before.
        if sum(math.prod(item.lengths) for item in items) != sum(piece.data.numel() for piece in pieces):
            raise ValueError(f"the parts of {key} are not the whole of it")
        return items

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._pieces[index].data

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Refuse weights with which nothing can be computed, while they are at hand."""
        key = read_item.dest_index.fqn
        if (not key.startswith("optimizer.") or key.startswith(MAIN)) and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{key} has values that are not finite numbers")

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise pickle.UnpicklingError(f"refusing to load {read_item.dest_index.fqn}, which is not a tensor")
