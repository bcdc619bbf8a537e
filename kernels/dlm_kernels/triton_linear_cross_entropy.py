"""The LM head and the weighted cross-entropy of some rows of the hidden states, chunk by chunk: cuBLAS and Triton.

For each chunk of rows h (compacted), with the head W:

    Z = h W^T;   entropies and G = weight * (softmax(Z) - one-hot), over Z;   dh = G W;   dW += G^T h

Three products and no recomputation: the gradient exists while the chunk's logits do. See
`dlm_kernels.triton_cross_entropy` for the second step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from dlm_kernels.loss_parts import (
    add_to_main_grad,
    consume,
    gather_hidden,
    require_equal_lengths,
    require_main_grad,
    start_reduction,
    weight_gradient,
)
from dlm_kernels.triton_cross_entropy import loss_and_gradient, merge_rows, row_statistics
from dlm_kernels.vocab_parallel import VocabShard, accumulator

_ROW_MULTIPLE = 128  # of a chunk's rows
_COLUMN_MULTIPLE = 64  # of the width of the logits: keeps accesses of 16 bytes aligned for any vocabulary


@dataclass(frozen=True)
class _Options:
    shard: VocabShard
    sequence_parallel: bool
    chunk_size: int
    fp32_logits: bool
    need_hidden: bool
    need_weight: bool
    into_main_grad: bool


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    *,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_size: int = 4096,
    fp32_logits: bool = False,
    accumulate_into_main_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cross_entropy` of `hidden[rows] @ weight.T`, computed for these rows only and chunk by chunk.

    The gradients are computed in the forward pass, while a chunk's logits exist (only if they are needed), and scaled
    in the backward pass. Differentiable in `hidden` and `weight`, once. No host synchronisation.

    Memory beside the results, at the peak: the logits of a chunk (4096 rows of 131072 bfloat16 columns: 1 GiB; with
    fp32_logits 3 GiB, for their gradient is kept in half precision), the gradient of the head in float32 (131072 x
    4096: 2 GiB, until the backward pass) and that of all hidden states. A smaller chunk saves logits; but every chunk
    after the first reads and writes the float32 gradient of the head once more, and short chunks slow its product.

    Args:
        hidden: [tokens, hidden_size] bfloat16, float16, float32 or float64; under `sequence_parallel` this rank's
            [tokens / TP, hidden_size].
        weight: [vocab_local, hidden_size], of the dtype of `hidden`; rank r holds the columns from r * vocab_local on.
        rows: [n] int, which of all the tokens are scored, without repetition; the value `tokens` marks a padding row
            (of weight 0). The same on all ranks of `group`. None = every token, in order.
        targets: [n] int64; ids out of range are ignored as in `cross_entropy`.
        weights: [n]; a row of weight 0 contributes exactly nothing, even if it is not finite.
        vocab_size: columns of the whole vocabulary from this one on are padding: their rows of the head are never
            read, and get a gradient of exactly 0. None = no padding.
        group: the tensor-parallel group; None = the head is whole. All-gathers of [3, rows]: one per chunk, or one in
            all where no gradient is needed; one all-reduce of the gradient of `hidden`.
        sequence_parallel: all-gather `hidden` over `group`, and reduce-scatter its gradient instead.
        chunk_size: rows whose logits exist at a time, at most.
        fp32_logits: keep the logits of half-precision operands in float32, as they were accumulated.
        accumulate_into_main_grad: in the backward pass, add the gradient of `weight` to `weight.main_grad` (float32)
            instead of returning it, as megatron-core's gradient_accumulation_fusion does: `weight` is then the
            parameter itself. See `dlm_kernels.loss_parts.add_to_main_grad`.

    Returns:
        Sum of weight * cross-entropy, [] float32 (float64 for float64 operands), bitwise equal on all ranks of
        `group`; cross-entropy [rows] and whether the target has the largest logit [rows] bool, both detached and 0
        where the weight is 0. The gradient of `hidden` is summed over `group`, and exactly 0 in rows that are not
        scored; that of `weight` is accumulated in float32.

    Raises:
        ValueError: rows, targets and weights differ in length, or `weight` has no suitable `main_grad` though its
            gradient is to be added to it.
        RuntimeError: in a second backward pass.
    """
    grad = torch.is_grad_enabled()
    options = _Options(
        VocabShard.of(weight.shape[0], vocab_size, group),
        sequence_parallel,
        chunk_size,
        fp32_logits,
        need_hidden=grad and hidden.requires_grad,
        need_weight=grad and weight.requires_grad,
        into_main_grad=accumulate_into_main_grad,
    )
    if options.into_main_grad and options.need_weight:
        require_main_grad(weight)
    # The kernels step through the lists by their index.
    return _LinearCrossEntropy.apply(hidden, weight, rows, targets.contiguous(), weights.contiguous(), options)


def multiply(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, where `out` may be float32 and the operands of half precision.

    The GPU then accumulates in float32 and rounds nothing; elsewhere the operands are converted.
    """
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    if a.is_cuda:
        if accumulate:
            return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return multiply(a.to(out.dtype), b.to(out.dtype), out, accumulate)


def _rows_per_chunk(count: int, limit: int) -> int:
    """Rows of the chunks of `count` rows: no more than `limit`, and no short chunk at the end."""
    chunks = max(-(-count // limit), 1)
    even = -(-count // chunks)
    return max(min(-(-even // _ROW_MULTIPLE) * _ROW_MULTIPLE, limit, count), 1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shard = options.shard
        full = gather_hidden(hidden, options.sequence_parallel, shard)
        tokens, hidden_size = full.shape
        count = require_equal_lengths(tokens, rows, targets, weights)
        dtype = accumulator(hidden.dtype)
        factors = shard.factors(weights, targets, dtype)
        unscored = (factors == 0)[:, None]
        sources = None if rows is None else rows.long()
        # Without the padding rows: they are never read, and their gradient is zeroed at the end.
        head = weight[: shard.columns]
        chunk_rows = _rows_per_chunk(count, options.chunk_size)
        # The buffer is a little wider than the vocabulary, for aligned rows; the rest is skipped by the kernels.
        width = -(-shard.columns // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE
        logits_dtype = dtype if options.fp32_logits else hidden.dtype
        # One buffer for all chunks. With fp32 logits the gradient needs another, in the operands' precision.
        logits_buffer = hidden.new_empty(chunk_rows, width, dtype=logits_dtype)
        need_gradient = options.need_hidden or options.need_weight
        gradient_buffer = logits_buffer
        if need_gradient and logits_dtype != hidden.dtype:
            gradient_buffer = hidden.new_empty(chunk_rows, width)
        d_hidden = None
        if options.need_hidden:  # one row more than there are tokens: padding rows point at it
            d_hidden = hidden.new_zeros(tokens + 1, hidden_size)
        d_weight = hidden.new_empty(head.shape, dtype=dtype) if options.need_weight else None
        entropy = factors.new_empty(count)
        correct = torch.empty(count, dtype=torch.bool, device=hidden.device)
        statistics = None if need_gradient else factors.new_empty(3, count)
        reduced, reduction = None, None
        # Without any row one empty chunk is computed: it sets the gradient of the head, and joins the reduction.
        for start in range(0, max(count, 1), chunk_rows):
            part = slice(start, min(start + chunk_rows, count))
            target, factor = targets[part], factors[part]
            if sources is None:
                chunk = full[part].masked_fill(unscored[part], 0.0)
            else:
                chunk = full.index_select(0, sources[part].clamp(max=tokens - 1))
                # Rows of weight 0 become 0 here, where that is cheap, because 0 * NaN is NaN.
                chunk.masked_fill_(unscored[part], 0.0)
            logits, gradient = logits_buffer[: len(chunk)], gradient_buffer[: len(chunk)]
            multiply(chunk, head.t(), logits[:, : shard.columns])
            if statistics is not None:
                row_statistics(logits, target, factor, shard, out=statistics[:, part])
                continue
            entropy[part], correct[part] = loss_and_gradient(logits, target, factor, shard, out=gradient)
            # A view without the buffer's extra columns, as the products want it.
            gradient = gradient[:, : shard.columns]
            if d_hidden is not None:
                if sources is None:
                    multiply(gradient, head, d_hidden[part])
                else:
                    d_hidden.index_copy_(0, sources[part], gradient @ head)
                if part.stop == count:  # complete: summed while the last product below runs
                    reduced, reduction = start_reduction(d_hidden[:tokens], options.sequence_parallel, shard)
            if d_weight is not None:
                multiply(gradient.t(), chunk, d_weight, accumulate=start > 0)
        if statistics is not None:
            entropy, correct, *_ = merge_rows(statistics, factors, shard)
        if reduction is not None:
            reduction.wait()
        ctx.save_for_backward(reduced, d_weight)
        # Not saved: autograd would refuse the backward pass after an update of the weight, whose values it never uses.
        ctx.weight, ctx.into_main_grad, ctx.consumed = weight, options.into_main_grad, False
        ctx.mark_non_differentiable(entropy, correct)
        return (entropy.double() * factors).sum().to(dtype), entropy, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        consume(ctx, "linear_cross_entropy")
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            # Two dimensions, so that half-precision rows do not round the scale to their own precision on a GPU.
            torch.mul(d_hidden, upstream.view(1, 1), out=d_hidden)
        if d_weight is not None:
            finish = add_to_main_grad if ctx.into_main_grad else weight_gradient
            d_weight = finish(ctx.weight, d_weight, upstream)
        return d_hidden, d_weight, *(None,) * 4
