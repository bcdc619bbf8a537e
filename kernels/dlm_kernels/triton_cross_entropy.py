"""Weighted, vocabulary-parallel cross-entropy on Triton, with the gradient written over the logits.

`cross_entropy` is the differentiable function; the functions before it are its steps, which
`dlm_kernels.triton_linear_cross_entropy` uses on chunks of rows. All run without a host synchronisation.

Bytes moved for [rows, V] logits: the statistics read them once, the gradient reads and writes them, which is the least
where the statistics of several ranks must meet in between. `loss_and_gradient` on a whole vocabulary reads them from
memory once, as far as the second read finds them in the L2 cache or, for short rows, in registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from dlm_kernels.loss_parts import consume
from dlm_kernels.triton_cross_entropy_kernels import fused_kernel, gradient_kernel, merge_kernel, statistics_kernel
from dlm_kernels.vocab_parallel import VocabShard, accumulator

RESIDENT_BYTES = 65536
"""Longest row that stays in registers: 64 bytes for each of 1024 threads; more would spill."""

LONG_ROW_BYTES = 131072
"""Rows from this length on get one large program per SM, so that the rows in work together fit the L2 cache."""

_LOAD_BYTES = 16
_THREAD_ELEMENTS = 16  # with more the registers leave room for too few programs per SM
_MERGE_ROWS = 256


class MergedRows(NamedTuple):
    """Results of whole rows, [rows] each, and this rank's coefficients of the gradient. 0 where the weight is 0."""

    entropy: Tensor
    correct: Tensor
    """Whether the target has the largest logit, bool."""
    scale: Tensor
    """Weighted probability / exp(logit - the largest of this rank's logits)."""
    missing: Tensor
    """Weight * (1 - probability of the target)."""


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted, vocabulary-parallel cross-entropy in nats. Differentiable in `logits`, once.

    The backward pass writes the gradient over `logits` instead of allocating as much memory again (unless their rows
    overlap or their columns are not adjacent: then over a copy). After it `logits` hold the gradient. The version of
    `logits` is raised, so that autograd refuses another use of their old values, such as the backward pass of an
    operation that saved them.

    Args:
        logits: [rows, vocab_local] bfloat16, float16, float32 or float64; rank r of `group` holds the columns from
            r * vocab_local on.
        targets: [rows] int64, ids in [0, vocab_size). Any other id, as -100 (torch's `ignore_index`), gives its row the
            weight 0.
        weights: [rows]; a row of weight 0 contributes exactly nothing, even if its logits are not finite.
        vocab_size: columns of the whole vocabulary from this one on are padding: they contribute exactly nothing, even
            if they are not finite, and get a gradient of exactly 0. None = no padding.
        group: the tensor-parallel group; None = the logits are whole. One all-gather of [3, rows] in forward.

    Returns:
        Sum of weight * cross-entropy, [] float32 (float64 for float64 logits), bitwise equal on all ranks of `group`;
        cross-entropy [rows] and whether the target has the largest logit [rows] bool, both detached and 0 where the
        weight is 0.

    Raises:
        RuntimeError: in a second backward pass, or if the logits were modified before the first.
    """
    shard = VocabShard.of(logits.shape[1], vocab_size, group)
    # The kernels step through the lists by their index.
    return _CrossEntropy.apply(logits, targets.contiguous(), weights.contiguous(), shard)


def row_statistics(
    logits: Tensor, targets: Tensor, factors: Tensor, shard: VocabShard, out: Tensor | None = None
) -> Tensor:
    """Statistics of this rank's columns: one read of the logits.

    Args:
        logits: [rows, at least shard.columns], adjacent columns. Loads of 16 bytes need rows that begin at multiples of
            16 bytes and a width that is a multiple of 16 columns; `shard.columns` need not be one.
        targets: [rows] int64, ids of the whole vocabulary.
        factors: [rows] float32 (float64 for float64 logits), the weights: result of `VocabShard.factors`.
        shard: this rank's columns.
        out: [3, rows] of the dtype of `factors`, adjacent columns; None = a new tensor.

    Returns:
        [3, rows]: maximum (target included), sum of exp(logit - maximum) without the target, and the target's logit or
        0 where another rank has it.
    """
    rows = logits.shape[0]
    statistics = factors.new_empty(3, rows) if out is None else out
    if rows:
        # One program a row: rows are many, and no sum goes across programs.
        statistics_kernel[(rows,)](
            logits,
            targets,
            factors,
            statistics,
            shard.columns,
            logits.shape[1],
            shard.first,
            logits.stride(0),
            statistics.stride(0),
            **_accumulation(factors.dtype),
            **_tile(shard.columns, logits.element_size(), 8),
        )
    return statistics


def merge_rows(statistics: Tensor, factors: Tensor, shard: VocabShard) -> MergedRows:
    """Combine the statistics [3, rows] of the ranks of the group: one all-gather (none for 0 rows)."""
    rows = factors.shape[0]
    entropy, scale, missing = factors.new_empty(3, rows)
    correct = torch.empty(rows, dtype=torch.bool, device=factors.device)
    if rows:
        gathered, rank = statistics, 0
        if shard.world > 1:
            gathered = statistics.new_empty(shard.world * 3, rows)
            dist.all_gather_into_tensor(gathered, statistics, group=shard.group)
            rank = dist.get_rank(shard.group)
        grid = (triton.cdiv(rows, _MERGE_ROWS),)
        # 256 rows a program, for there are only a few numbers of each.
        outputs = (entropy, correct, scale, missing)
        merge_kernel[grid](gathered, factors, *outputs, rows, rank, WORLD=shard.world, BLOCK=_MERGE_ROWS, num_warps=4)
    return MergedRows(entropy, correct, scale, missing)


def write_gradient(
    logits: Tensor,
    targets: Tensor,
    peak: Tensor,
    merged: MergedRows,
    shard: VocabShard,
    *,
    upstream: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Write weight * (probability - one-hot), times the scalar `upstream`, to `out` or over the logits.

    Args:
        logits, targets, shard: as in `row_statistics`.
        peak: [rows], the first row of this rank's statistics.
        merged: result of `merge_rows`.
        upstream: [] of the dtype of `peak`.
        out: of the shape of `logits`, adjacent columns; None = the logits themselves, whose memory it shares either
            wholly or not at all.

    Returns:
        `out`. Columns from shard.columns on are exactly 0, and so are rows of weight 0.
    """
    rows, width = logits.shape
    out = logits if out is None else out
    if rows and width:
        # The logits are read a second time: keeping exponentials would cost as much memory again.
        gradient_kernel[(rows,)](
            logits,
            out,
            targets,
            peak,
            merged.scale,
            merged.missing,
            upstream,
            shard.columns,
            width,
            shard.first,
            logits.stride(0),
            out.stride(0),
            ACC=_accumulation(peak.dtype)["ACC"],
            **_tile(width, logits.element_size(), 8),
        )
    return out


def loss_and_gradient(
    logits: Tensor, targets: Tensor, factors: Tensor, shard: VocabShard, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropies and the gradient of their weighted sum, which is written to `out` or over the logits.

    On a whole vocabulary both come from one launch; else from three and one all-gather.

    Args and errors as in `row_statistics` and `write_gradient`.

    Returns:
        Cross-entropy [rows] and whether the target has the largest logit [rows] bool; 0 where the weight is 0.
    """
    rows, width = logits.shape
    if shard.world > 1:
        statistics = row_statistics(logits, targets, factors, shard)
        merged = merge_rows(statistics, factors, shard)
        write_gradient(logits, targets, statistics[0], merged, shard, out=out)
        return merged.entropy, merged.correct
    out = logits if out is None else out
    entropy = torch.empty_like(factors)
    correct = torch.empty(rows, dtype=torch.bool, device=factors.device)
    if rows:
        # Short rows stay in registers between the two uses; long ones are read again, if possible from the cache.
        row_bytes = width * logits.element_size()
        # The one tile has a mask, which would split the loads of a row of odd width.
        resident = row_bytes <= RESIDENT_BYTES and width % 16 == 0
        warps = 32 if resident or row_bytes >= LONG_ROW_BYTES else 16
        tile = _tile(width, logits.element_size(), warps, whole=resident)
        fused_kernel[(rows,)](
            logits,
            out,
            targets,
            factors,
            entropy,
            correct,
            shard.columns,
            width,
            logits.stride(0),
            out.stride(0),
            **_accumulation(factors.dtype),
            **tile,
            RESIDENT=resident,
        )
    return entropy, correct


def _tile(width: int, element_size: int, warps: int, whole: bool = False) -> dict[str, int]:
    """Lanes and columns per lane of a tile, and warps: 16 elements per thread.

    Args:
        width: columns of a row.
        element_size: in bytes.
        warps: the most that a program gets.
        whole: whether the tile holds the whole row, with more elements per thread if need be.
    """
    columns = _LOAD_BYTES // element_size
    # A warp at least; as many lanes as the row has loads of 16 bytes.
    lanes = max(triton.next_power_of_2(triton.cdiv(width, columns)), 32)
    per_warp = 32 * _THREAD_ELEMENTS // columns
    if not whole:
        lanes = min(lanes, warps * per_warp)
    return {"R": lanes, "K": columns, "num_warps": min(max(lanes // per_warp, 1), warps)}


def _accumulation(dtype: torch.dtype) -> dict[str, Any]:
    return {"LOWEST": torch.finfo(dtype).min, "ACC": tl.float64 if dtype == torch.float64 else tl.float32}


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor, shard: VocabShard
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The kernels step along adjacent columns; overlapping rows would overwrite each other's gradients.
        values = logits if logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1] else logits.contiguous()
        factors = shard.factors(weights, targets, accumulator(logits.dtype))
        statistics = row_statistics(values, targets, factors, shard)
        merged = merge_rows(statistics, factors, shard)
        ctx.save_for_backward(values, targets, statistics[0], *merged)
        ctx.shard, ctx.consumed = shard, False
        ctx.mark_non_differentiable(merged.entropy, merged.correct)
        return (merged.entropy.double() * factors).sum().to(factors.dtype), merged.entropy, merged.correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        consume(ctx, "cross_entropy")
        values, targets, peak, *merged = ctx.saved_tensors
        values = values.detach()
        write_gradient(values, targets, peak, MergedRows(*merged), ctx.shard, upstream=upstream)
        # A kernel's write is invisible to autograd: without this a later use of the old values would go unnoticed.
        torch.autograd.graph.increment_version(values)
        return values, None, None, None
