"""Triton kernels of the weighted cross-entropy: statistics, merge, gradient, and all of them in one launch.

For a row of logits z with target t and weight w:

    peak    = max z_j                              others = sum over j != t of exp(z_j - peak)
    margin  = peak - z_t                           total  = others + exp(-margin)
    entropy = margin + log(total)
    dz_j    = w exp(z_j - peak) / total, j != t    dz_t   = -w others / total

The target is kept out of `others` because a confident one, 1, would absorb the rest, and with it the small loss and
gradient that are left; so nothing is ever subtracted after rounding. The margin is the difference of two logits, not of
two logarithms, which at logits of 1e4 are rounded by as much as the loss.

One program works on one row, in tiles of R lanes with K neighbouring columns each: K fills a load of 16 bytes. A lane
keeps a maximum and a sum of its own (1 + 1/K exponentials per element); lanes meet once, after the last tile. Whole
tiles are read and written without a mask; the last one is bounded by the width of the memory, padding included, which
may be aligned where the number of real columns is not, and a misaligned mask would split loads and stores into single
elements. What it reads of the padding is replaced at once. Rows of weight 0 take a branch that reads no logit.
"""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _exp(values):
    return tl.exp2(values * _LOG2_E)


@triton.jit
def _entropy(margin, others):
    total = others + _exp(-margin)
    log_total = tl.log2(total) * _LN_2
    # Where the target is the maximum, log(1 + others) must not lose a small `others`: what 1 + others was rounded by
    # is undone (there is no log1p in the interpreter). Elsewhere others >= 1, and nothing is lost.
    excess = total - 1.0
    kept = tl.where(excess == 0.0, 1.0, excess)
    log1p = tl.where(excess == 0.0, others, log_total * (others / kept))
    return tl.where(margin == 0.0, log1p, margin + log_total)


@triton.jit
def _lanes(R: tl.constexpr, K: tl.constexpr):
    """First column of each lane of a tile, [R, 1]."""
    return tl.arange(0, R)[:, None] * K


@triton.jit
def _inner(K: tl.constexpr):
    """Columns of a lane, [1, K]: constants, so that comparing them takes no registers."""
    return tl.arange(0, K)[None, :]


@triton.jit
def _own_target(targets_ptr, row, first, columns):
    """Column of the target in this shard, or -1."""
    column = tl.load(targets_ptr + row) - first
    return tl.where((column >= 0) & (column < columns), column, -1).to(tl.int32)


@triton.jit
def _load_last(row_ptr, lane, columns, width, ACC: tl.constexpr, K: tl.constexpr):
    """The lanes of a tile beyond the whole ones: -inf in the padding, whatever is there."""
    column = lane + _inner(K)
    # Bounded by the memory's width, which is aligned; the real columns are picked after the load.
    values = tl.load(row_ptr + column, mask=column < width, other=float("-inf")).to(ACC)
    return tl.where(_inner(K) < columns - lane, values, float("-inf"))


@triton.jit
def _absorb(values, lane, target, peak, others, K: tl.constexpr):
    """Take a tile into the maximum and the sum of each lane, without the target."""
    # Compared relative to the lane, so that the columns stay compile-time constants.
    values = tl.where(_inner(K) == target - lane, float("-inf"), values)
    higher = tl.maximum(peak, tl.max(values, 1))
    # The sum so far moves to the new maximum: one pass, and no exponential overflows.
    others = others * _exp(peak - higher) + tl.sum(_exp(values - higher[:, None]), 1)
    return higher, others


@triton.jit
def _row_statistics(
    row_ptr, target, columns, width, LOWEST: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, K: tl.constexpr
):
    """(peak, others, target's logit or -inf) of this shard's columns of one row."""
    # Loaded first: a later kernel phase may overwrite it.
    at_target = tl.load(row_ptr + target, mask=target >= 0, other=float("-inf")).to(ACC)
    peak = tl.full((R,), LOWEST, ACC)  # finite, so that -inf minus the maximum is -inf
    others = tl.zeros((R,), ACC)
    # Whole tiles need no mask; the rest is at most one tile.
    whole = columns // (R * K) * (R * K)
    for start in range(0, whole, R * K):
        lane = start + _lanes(R, K)
        peak, others = _absorb(tl.load(row_ptr + (lane + _inner(K))).to(ACC), lane, target, peak, others, K)
    for start in range(whole, columns, R * K):
        lane = start + _lanes(R, K)
        peak, others = _absorb(_load_last(row_ptr, lane, columns, width, ACC, K), lane, target, peak, others, K)
    highest = tl.max(peak, 0)
    # Lanes meet here, and the target, which is in no lane's sum.
    top = tl.maximum(highest, at_target)
    return top, tl.sum(others * _exp(peak - highest), 0) * _exp(highest - top), at_target


@triton.jit
def _gradient(values, lane, target, peak, scale, missing, K: tl.constexpr):
    return tl.where(_inner(K) == target - lane, -missing, _exp(values - peak) * scale)


@triton.jit
def _write_gradient(
    row_ptr,
    out_ptr,
    target,
    peak,
    scale,
    missing,
    columns,
    width,
    ACC: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    """Write scale * exp(logit - peak), -missing at the target, and 0 from `columns` to `width`.

    From the end of the row to its beginning: the end was read last, so more of it is still in the L2 cache.
    """
    element = out_ptr.dtype.element_ty
    tiles = columns // (R * K)
    for start in range(tiles * (R * K), width, R * K):
        lane = start + _lanes(R, K)
        values = _load_last(row_ptr, lane, columns, width, ACC, K)
        gradient = _gradient(values, lane, target, peak, scale, missing, K)
        gradient = tl.where(_inner(K) < columns - lane, gradient, 0.0).to(element)
        tl.store(out_ptr + (lane + _inner(K)), gradient, mask=lane + _inner(K) < width)
    for index in range(tiles):
        lane = (tiles - 1 - index) * (R * K) + _lanes(R, K)
        values = tl.load(row_ptr + (lane + _inner(K)), eviction_policy="evict_first").to(ACC)
        gradient = _gradient(values, lane, target, peak, scale, missing, K).to(element)
        tl.store(out_ptr + (lane + _inner(K)), gradient, eviction_policy="evict_first")


@triton.jit
def _write_zeros(out_ptr, width, R: tl.constexpr, K: tl.constexpr):
    for start in range(0, width, R * K):
        column = start + _lanes(R, K) + _inner(K)
        tl.store(out_ptr + column, tl.zeros((R, K), out_ptr.dtype.element_ty), mask=column < width)


@triton.jit
def statistics_kernel(
    logits_ptr,
    targets_ptr,
    factors_ptr,
    statistics_ptr,
    columns,
    width,
    first,
    logits_stride,
    statistics_stride,
    LOWEST: tl.constexpr,
    ACC: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    """One row per program: (peak, others, target's logit or 0) of this shard, to three rows of `statistics`."""
    row = tl.program_id(0).to(tl.int64)
    statistics_ptr += row
    if tl.load(factors_ptr + row) != 0.0:
        target = _own_target(targets_ptr, row, first, columns)
        peak, others, at_target = _row_statistics(
            logits_ptr + row * logits_stride, target, columns, width, LOWEST, ACC, R, K
        )
        tl.store(statistics_ptr, peak)
        tl.store(statistics_ptr + statistics_stride, others)
        tl.store(statistics_ptr + 2 * statistics_stride, tl.where(target >= 0, at_target, 0.0))
    else:
        # Anything finite: the merge sets such rows to 0.
        tl.store(statistics_ptr, 0.0)
        tl.store(statistics_ptr + statistics_stride, 1.0)
        tl.store(statistics_ptr + 2 * statistics_stride, 0.0)


@triton.jit
def merge_kernel(
    gathered_ptr,
    factors_ptr,
    entropy_ptr,
    correct_ptr,
    scale_ptr,
    missing_ptr,
    rows,
    rank,
    WORLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Combine the statistics [WORLD, 3, rows] in the order of the ranks, so that every rank gets the same bits.

    Writes the cross-entropy and whether the target is the maximum, and what this rank's gradient needs:
    scale = w exp(own peak - peak) / total, missing = w others / total. All are 0 where the weight is 0.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    gathered_ptr += row
    own_peak = tl.load(gathered_ptr + rank * 3 * rows, mask=inside, other=0.0)
    peak = own_peak
    # First the common maximum, then the sums relative to it, always in the order of the ranks.
    for shard in tl.static_range(WORLD):
        peak = tl.maximum(peak, tl.load(gathered_ptr + shard * 3 * rows, mask=inside, other=0.0))
    others = tl.zeros_like(peak)
    at_target = tl.zeros_like(peak)
    for shard in tl.static_range(WORLD):
        shard_peak = tl.load(gathered_ptr + shard * 3 * rows, mask=inside, other=0.0)
        shard_others = tl.load(gathered_ptr + (shard * 3 + 1) * rows, mask=inside, other=0.0)
        others += shard_others * _exp(shard_peak - peak)
        at_target += tl.load(gathered_ptr + (shard * 3 + 2) * rows, mask=inside, other=0.0)
    factor = tl.load(factors_ptr + row, mask=inside, other=0.0)
    scored = factor != 0.0
    # Padding lanes of the block compute something here that is never stored.
    margin = peak - at_target
    total = others + _exp(-margin)
    scale = _exp(own_peak - peak) * (factor / total)
    tl.store(entropy_ptr + row, tl.where(scored, _entropy(margin, others), 0.0), mask=inside)
    tl.store(correct_ptr + row, scored & (margin == 0.0), mask=inside)
    tl.store(scale_ptr + row, tl.where(scored, scale, 0.0), mask=inside)
    tl.store(missing_ptr + row, tl.where(scored, factor * (others / total), 0.0), mask=inside)


@triton.jit
def gradient_kernel(
    logits_ptr,
    out_ptr,
    targets_ptr,
    peak_ptr,
    scale_ptr,
    missing_ptr,
    upstream_ptr,
    columns,
    width,
    first,
    logits_stride,
    out_stride,
    ACC: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    """One row per program: the gradient, times the scalar at `upstream` unless that is None. `out` may be `logits`."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr + row)
    missing = tl.load(missing_ptr + row)
    out_ptr += row * out_stride
    # Rows of weight 0 have 0 for both: they are zeroed without reading a logit, which may be NaN.
    if (scale != 0.0) | (missing != 0.0):
        if upstream_ptr is not None:
            upstream = tl.load(upstream_ptr)
            scale *= upstream
            missing *= upstream
        target = _own_target(targets_ptr, row, first, columns)
        _write_gradient(
            logits_ptr + row * logits_stride,
            out_ptr,
            target,
            tl.load(peak_ptr + row),
            scale,
            missing,
            columns,
            width,
            ACC,
            R,
            K,
        )
    else:  # the weight is 0, or this shard has no share that a float could hold
        _write_zeros(out_ptr, width, R, K)


@triton.jit
def fused_kernel(
    logits_ptr,
    out_ptr,
    targets_ptr,
    factors_ptr,
    entropy_ptr,
    correct_ptr,
    columns,
    width,
    logits_stride,
    out_stride,
    LOWEST: tl.constexpr,
    ACC: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """One row per program, with all of its columns: statistics and gradient. `out` may be `logits`.

    RESIDENT: the row is one tile and stays in registers, so it is read once; otherwise it is read twice.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    out_ptr += row * out_stride
    factor = tl.load(factors_ptr + row)
    if factor != 0.0:
        target = _own_target(targets_ptr, row, 0, columns)
        if RESIDENT:
            lane = _lanes(R, K)
            # By itself, before the row is overwritten.
            at_target = tl.load(logits_ptr + target, mask=target >= 0, other=float("-inf")).to(ACC)
            values = _load_last(logits_ptr, lane, columns, width, ACC, K)
            values = tl.where(_inner(K) == target - lane, float("-inf"), values)
            peak = tl.maximum(tl.maximum(tl.max(tl.max(values, 1), 0), at_target), LOWEST)
            values = _exp(values - peak)
            others = tl.sum(tl.sum(values, 1), 0)
            total = others + _exp(at_target - peak)
            gradient = tl.where(_inner(K) == target - lane, -factor * (others / total), values * (factor / total))
            gradient = tl.where(_inner(K) < columns - lane, gradient, 0.0).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + (lane + _inner(K)), gradient, mask=lane + _inner(K) < width)
        else:
            peak, others, at_target = _row_statistics(logits_ptr, target, columns, width, LOWEST, ACC, R, K)
            total = others + _exp(at_target - peak)
            scale = factor / total
            missing = factor * (others / total)
            _write_gradient(logits_ptr, out_ptr, target, peak, scale, missing, columns, width, ACC, R, K)
        margin = peak - at_target
        tl.store(entropy_ptr + row, _entropy(margin, others))
        tl.store(correct_ptr + row, margin == 0.0)
    else:
        _write_zeros(out_ptr, width, R, K)
        tl.store(entropy_ptr + row, 0.0)
        tl.store(correct_ptr + row, False)
