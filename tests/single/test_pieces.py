"""Rectangles of whole tensors, and files that are verified in parts."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dlm.checkpoint import manifest
from megatron_dlm.checkpoint.manifest import BLOCK_BYTES, Damaged
from megatron_dlm.checkpoint.pieces import pieces, rectangles
from megatron_dlm.checkpoint.tensor_files import _HashingFileSystem, _VerifyingFileSystem
from megatron_dlm.model.placement import Block

SHAPES = [(1,), (7,), (1, 1), (3, 5), (5, 1), (1, 6), (2, 3, 4), (3, 1, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rectangles_are_the_range_in_order_and_few(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(numbers.numel() + 1), 2):
        found = list(rectangles(shape, start, stop))
        cut = [
            numbers[tuple(slice(a, a + n) for a, n in zip(corner, sizes, strict=True))].flatten().tolist()
            for corner, sizes in found
        ]
        assert [number for part in cut for number in part] == list(range(start, stop))
        assert len(found) <= 2 * len(shape) - 1 and all(cut)


def test_pieces_of_every_cut_put_two_blocks_together_again() -> None:
    # Rows 2 to 4 of one whole tensor and rows 6 to 8 of it, as the two projections of SwiGLU are one parameter.
    whole = torch.arange(40.0).view(8, 5)
    local = torch.cat((whole[1:4], whole[5:8])).clone()
    blocks = [Block("w", (8, 5), (1, 0), (3, 5), 0, False), Block("w", (8, 5), (5, 0), (3, 5), 15, False)]
    for cut in range(31):
        target = torch.full((8, 5), -1.0)
        flat = local.flatten()
        for start, stop in ((0, cut), (cut, 30)):
            for piece in pieces(blocks, flat[start:stop], start, prefix="p."):
                assert (piece.key, piece.shape) == ("p.w", (8, 5))
                assert piece.data.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr(), "a view"
                target[tuple(slice(a, a + n) for a, n in zip(piece.offset, piece.data.shape, strict=True))] = piece.data
        assert torch.equal(target[1:4], whole[1:4]) and torch.equal(target[5:8], whole[5:8])
        assert (target[[0, 4]] == -1).all()


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 5])
def test_a_file_is_hashed_in_blocks_however_it_is_written(size: int, tmp_path: Path) -> None:
    content = np.random.default_rng(size).bytes(size)
    for step in (size or 1, 70_000, BLOCK_BYTES, 2 * BLOCK_BYTES + 3):
        system, path = _HashingFileSystem(), tmp_path / "x.distcp"
        with system.create_stream(path, "wb") as stream:
            for start in range(0, size, step):
                stream.write(content[start : start + step])
        record = system.records["x.distcp"]
        assert (record.size, record.sha256) == manifest.record(path)[:2]
        assert len(record.blocks) == -(-size // BLOCK_BYTES)
        with _VerifyingFileSystem({"x.distcp": record.blocks}).create_stream(path, "rb") as verified:
            assert io.BufferedReader(verified).read() == content  # type: ignore[type-var]


def test_a_part_can_be_read_where_another_is_damaged(tmp_path: Path) -> None:
    content = bytearray(np.random.default_rng(1).bytes(3 * BLOCK_BYTES))
    system, path = _HashingFileSystem(), tmp_path / "x.distcp"
    with system.create_stream(path, "wb") as stream:
        stream.write(content)
    path.write_bytes(content[: BLOCK_BYTES + 9] + b"!!!" + content[BLOCK_BYTES + 12 :])
    with _VerifyingFileSystem({"x.distcp": system.records["x.distcp"].blocks}).create_stream(path, "rb") as verified:
        assert verified.read(BLOCK_BYTES) == content[:BLOCK_BYTES]
        with pytest.raises(Damaged, match="the content of x.distcp has changed since it was written"):
            verified.read(1)
        verified.seek(-5, io.SEEK_END)
        assert verified.read(100) == content[-5:] and verified.read(1) == b""
