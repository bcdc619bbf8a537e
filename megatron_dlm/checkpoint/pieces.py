"""Rectangles of whole tensors: where a rank's elements stand in a checkpoint that knows no layout.

A checkpoint has whole tensors, each in rectangles that may be cut in any way. A rank holds a contiguous range of a
parameter's elements: all of them, or the distributed optimizer's share for one data-parallel rank. Such a range of a
matrix is up to three rectangles: the end of a row, whole rows, the beginning of a row. So every rank writes its own
range and reads its own range, at any layout, without a collective and without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from megatron_dlm.model.placement import Block

MAIN = "optimizer.state.param."
"""Where the optimizer of a run keeps the fp32 values of its parameters, which are bf16 in a bf16 run."""


class Piece(NamedTuple):
    """A rectangle of a whole tensor, in this process's memory."""

    key: str
    """Name of the whole tensor."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    data: Tensor
    """A view: what is read into it is where it belongs."""


def pieces(blocks: Iterable[Block], flat: Tensor, start: int, *, prefix: str = "") -> Iterator[Piece]:
    """What ``flat`` [n], the elements from ``start`` on of a parameter, is in the checkpoint.

    Args:
        prefix: of the keys; the optimizer's tensors are named after the parameter.
    """
    stop = start + flat.numel()
    for block in blocks:
        # The part [low, high) of the block that is in `flat`, counted in elements of the parameter.
        low, high = max(start, block.begin), min(stop, block.begin + math.prod(block.sizes))
        for corner, sizes in rectangles(block.sizes, low - block.begin, high - block.begin):
            size = math.prod(sizes)
            at = block.begin + _index(block.sizes, corner) - start
            offset = tuple(a + b for a, b in zip(block.offset, corner, strict=True))
            yield Piece(prefix + block.key, block.shape, offset, flat[at : at + size].view(sizes))


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(corner, sizes) of the rectangles that hold the elements [start, stop) of ``shape`` in row-major order.

    As few as possible: at most 2 * dimensions - 1. Their elements are contiguous, one after the other.
    """
    if stop <= start:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows are [first, last); a row may be a tensor itself
    if first > last:  # all within one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    yield from _in_row(shape, first - 1, start - (first - 1) * row, row if start < first * row else 0)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for corner, sizes in rectangles(shape[1:], start, stop):
        yield (row, *corner), (1, *sizes)


def _index(shape: Sequence[int], place: Sequence[int]) -> int:
    """Number of an element in row-major order."""
    index = 0
    for size, at in zip(shape, place, strict=True):
        index = index * size + at
    return index
