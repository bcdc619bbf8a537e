"""How samples are divided over several data sources: a fixed number of each in every block of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dlm_kernels.philox import Purpose, Stream, permute
from megatron_dlm.errors import DataError

_SMALLEST_BLOCK = 64
_LARGEST_EXHAUSTIVE_BLOCK = 1024
_LARGEST_BLOCK = 2**20
_WEIGHT_TOLERANCE = 1e-3


class Blend:
    """Sample id -> (source, index among that source's samples), a pure function.

    In training the order within a block is permuted afresh for each block. In validation every block has the same order
    and takes each source's samples one after the other, so that a prefix of the set holds a prefix of each source.

    Args:
        weights: shares of the samples.
        seed: 64 bits.
        purpose: training or validation.

    Attributes:
        counts: samples of each source in a block, [sources] int64.
        block_size: their sum.
        shares: counts / block_size, [sources] float64.

    Raises:
        DataError: see `blend_counts`.
    """

    def __init__(self, weights: Sequence[float], *, seed: int, purpose: Purpose = Purpose.TRAIN) -> None:
        self.counts = blend_counts(weights)
        self.block_size = int(self.counts.sum())
        self.shares = self.counts / self.block_size
        self._seed = seed
        self._purpose = purpose
        # Where each source's stretch of the unshuffled block ends.
        self._ends = np.cumsum(self.counts)
        if purpose == Purpose.VALIDATION:
            # The same shuffled order in every block; within a source the places are then numbered from the left.
            slots = self._permute(np.arange(self.block_size, dtype=np.int64), block=0)
            self._source_at = np.searchsorted(self._ends, slots, side="right")
            # Within a source, in file order: its places in the block are numbered from left to right.
            self._rank_at = np.empty_like(slots)
            for source, count in enumerate(self.counts):
                self._rank_at[self._source_at == source] = np.arange(count)

    def locate(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each sample and its index among that source's samples of the whole run, both [n] int64."""
        # One source: sample ids are its own indices.
        if len(self.counts) == 1:
            return np.zeros_like(sample_ids), sample_ids
        # A block is `counts` samples laid out source by source, then shuffled: slot -> place in that layout.
        block, slot = np.divmod(sample_ids, self.block_size)
        if self._purpose == Purpose.VALIDATION:
            source, rank = self._source_at[slot], self._rank_at[slot]
        else:
            # Each block has its own permutation; a batch is of few blocks.
            for b in np.unique(block).tolist():
                here = block == b
                slot[here] = self._permute(slot[here], b)
            # Which source's stretch of the layout the place is in, and how far behind that stretch's beginning.
            source = np.searchsorted(self._ends, slot, side="right")
            rank = slot - (self._ends - self.counts)[source]
        # Every earlier block took exactly `counts` of the source's samples.
        return source, block * self.counts[source] + rank

    def samples_before(self, limits: np.ndarray) -> int:
        """How many of the first samples leave every source's index below its limit, [sources] int64."""
        # Whole blocks that every source can fill; the next one, in which some source runs out, is looked at.
        first = int((limits // self.counts).min()) * self.block_size
        source, index = self.locate(np.arange(first, first + self.block_size, dtype=np.int64))
        return first + int(np.argmax(index >= limits[source]))  # argmax: the first that is True

    def _permute(self, slots: np.ndarray, block: int) -> np.ndarray:
        return permute(slots, self.block_size, self._seed, Stream.BLEND, step=block, purpose=self._purpose)


def blend_counts(weights: Sequence[float]) -> np.ndarray:
    """Samples of each source in one block of a blend, [sources] int64; their sum is the block size.

    The block is the smallest, from 64 samples on, in which whole numbers (by largest remainder) keep every weight to
    0.1 %: all sizes up to 1024 are tried, then powers of two up to 2**20; where none does, the closest is taken. One
    source makes a block of 1.

    Raises:
        DataError: a weight is not a positive finite number, or is too small for the largest block.
    """
    if not all(math.isfinite(w) and w > 0 for w in weights):
        raise DataError(f"the weights of the data sources are {list(weights)}: each must be a positive number")
    if len(weights) == 1:
        return np.ones(1, dtype=np.int64)
    shares = np.array(weights, dtype=np.float64) / math.fsum(weights)
    # Small blocks first: every prefix of the samples then has the wanted shares to within a block.
    sizes = [*range(_SMALLEST_BLOCK, _LARGEST_EXHAUSTIVE_BLOCK + 1)]
    while sizes[-1] < _LARGEST_BLOCK:
        sizes.append(2 * sizes[-1])
    best, best_error = np.zeros(len(weights), dtype=np.int64), math.inf
    for size in sizes:
        counts = _largest_remainder(shares, size)
        # Relative to each share: a rare source must be as exact as a common one.
        error = float(np.max(np.abs(counts / size / shares - 1)))
        if counts.min() > 0 and error < best_error:
            best, best_error = counts, error
        if best_error <= _WEIGHT_TOLERANCE:
            break
    if math.isinf(best_error):
        raise DataError(f"the weights of the data sources {list(weights)} differ too much: leave out the smallest")
    return best


def _largest_remainder(shares: np.ndarray, size: int) -> np.ndarray:
    """Whole numbers that sum to `size`, in proportion to `shares`; equal remainders favour the earlier source."""
    counts = np.floor(shares * size).astype(np.int64)
    # The largest remainders are rounded up, as many as are missing.
    order = np.argsort(-(shares * size - counts), kind="stable")
    counts[order[: size - int(counts.sum())]] += 1
    return counts
