"""Plain-torch twins of the kernels: the specification that the kernels are tested against, and the CPU path.

The two losses share the steps of `dlm_kernels.vocab_parallel`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from dlm_kernels import noise_levels
from dlm_kernels.loss_parts import (
    add_to_main_grad,
    consume,
    gather_hidden,
    require_equal_lengths,
    require_main_grad,
    start_reduction,
    weight_gradient,
)
from dlm_kernels.philox import TOKEN_POSITION_BITS, Purpose, Stream, random_bits, token_counter
from dlm_kernels.types import MaskedTokens, Masking, NoiseDraw, require_consistent
from dlm_kernels.vocab_parallel import RowStatistics, VocabShard, accumulator, exponentials_, gradient_, merge


def mask_tokens(
    tokens: Tensor,
    sample_ids: np.ndarray | Tensor,
    *,
    seed: int,
    mask_token_id: int,
    masking: Masking = "exact_count",
    draw: NoiseDraw | None = None,
    levels: Tensor | None = None,
    weights: Tensor | None = None,
    complement: Tensor | None = None,
    eligible: Tensor | None = None,
    capacity: int | None = None,
    purpose: Purpose = Purpose.TRAIN,
) -> MaskedTokens:
    """Replace a random subset of the eligible tokens by [MASK] and list the replaced positions.

    Whether a token is masked depends on its sequence's noise level and on the key of (seed, sample id, position) only,
    so any split of a batch gives the same result. Exact count masks the k eligible tokens with the smallest 32-bit
    keys (ties: the earlier position first); Bernoulli masks the tokens with key < threshold.

    The levels come either from `draw` (linear schedule, loss weights L/k and 1/p) or from `levels` and `weights`.

    Args:
        tokens: [batch, seq] int64, clean tokens; seq < 2**22.
        sample_ids: [batch] int64.
        seed: 64 bits.
        mask_token_id: id of [MASK].
        masking: "exact_count" or "bernoulli".
        draw: how to draw the noise levels of a linear schedule.
        levels: [batch] int64, on the device of `tokens`: the counts k, or the thresholds p * 2**32.
        weights: [batch] float32, the loss weight of each masked token of a sequence.
        complement: [batch] bool, the sequences in which those eligible tokens are masked that otherwise would stay;
            goes with `levels`, which still count the tokens that otherwise would be masked. None = no sequence.
        eligible: [batch, seq] bool, what may be masked; None = everything.
        capacity: length of the list of positions; None = as many as were masked, which reads the number back.
        purpose: training or validation.

    Raises:
        ValueError: not exactly one of `draw` and (`levels`, `weights`) is given, `complement` comes with `draw`, or
            seq is too long.
    """
    batch, seq = tokens.shape
    require_consistent(seq, draw, levels, weights, complement)
    device = tokens.device
    if draw is not None:
        levels, weights = _linear_levels(draw, sample_ids, seed, masking, eligible, seq, purpose, device)
    assert levels is not None and weights is not None

    # [batch, seq] keys of 32 bits, whatever the batch: a token's key is its own.
    positions = torch.arange(seq, device=device)
    counters = token_counter(torch.as_tensor(sample_ids, device=device)[:, None], positions)
    if device.type == "cpu":  # the same bits; numpy has a third of torch's cost per operation on small arrays
        keys = torch.from_numpy(random_bits(seed, Stream.TOKEN_KEY, counters.numpy(), 0, purpose))
    else:
        keys = random_bits(seed, Stream.TOKEN_KEY, counters, 0, purpose)
    if masking == "exact_count":
        # 54 bits: the position decides between equal keys, so no two are equal.
        keys = (keys << TOKEN_POSITION_BITS) | positions
        if eligible is not None:
            # Behind all others, so that the k smallest are eligible ones.
            keys = keys.masked_fill(~eligible, torch.iinfo(torch.int64).max)
        # Everything up to the k-th smallest; where k is 0, nothing.
        limits = keys.sort(dim=1).values.gather(1, (levels - 1).clamp(min=0)[:, None])
        masked = (keys <= limits) & (levels > 0)[:, None]
    else:
        masked = keys < levels[:, None]
    if complement is not None:
        # The second row of a pair: what the first leaves visible, of what may be masked at all.
        masked ^= complement[:, None]
    if eligible is not None:
        masked &= eligible

    total = batch * seq
    flat = masked.view(-1)
    if capacity is None:
        rows = flat.nonzero().view(-1)
    else:
        # Without reading the number back: every masked token writes its index at its place in the list.
        place = flat.cumsum(0) - 1
        # What is not masked, or does not fit, goes to one slot behind the end, which is cut off.
        slots = torch.where(flat & (place < capacity), place, capacity)
        rows = torch.full((capacity + 1,), total, device=device)
        rows = rows.scatter_(0, slots, torch.arange(total, device=device))[:capacity]
    # Padding rows read the last token, and then are set to 0.
    inside = rows < total
    source = rows.clamp(max=total - 1)
    return MaskedTokens(
        tokens=tokens.masked_fill(masked, mask_token_id),
        rows=rows.to(torch.int32),
        targets=tokens.reshape(-1)[source] * inside,
        weights=torch.where(inside, weights[source // seq], 0.0),
        overflow=flat.sum() > rows.numel(),
    )


def _linear_levels(
    draw: NoiseDraw,
    sample_ids: np.ndarray | Tensor,
    seed: int,
    masking: Masking,
    eligible: Tensor | None,
    seq: int,
    purpose: Purpose,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Levels [batch] int64 and loss weights [batch] float32 of the linear schedule."""
    ids: Any = sample_ids
    drawn = noise_levels.draw(
        ids,
        draw.mode,
        seed=seed,
        step=draw.step,
        global_batch_size=draw.global_batch_size,
        purpose=purpose,
    )
    uniform = torch.as_tensor(drawn, device=device)
    if masking == "exact_count":
        # L/k and 1/p in fp64, rounded once.
        counts = torch.full_like(uniform, seq) if eligible is None else eligible.sum(1)
        levels = noise_levels.linear_count(uniform, counts)
        return levels, (counts.double() / levels.clamp(min=1)).float()
    levels = noise_levels.linear_threshold(uniform, draw.eps)
    return levels, (2.0**32 / levels.double()).float()


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted, vocabulary-parallel cross-entropy in nats. Differentiable in `logits`, once.

    With Triton the backward pass writes the gradient over `logits`, and autograd refuses another use of their values
    (of a leaf it cannot: do not use one again); with torch they stay as they are.

    Args:
        logits: [rows, vocab_local]; rank r of `group` holds the columns from r * vocab_local on.
        targets: [rows] int64, ids in [0, vocab_size). Any other id, as -100 (torch's `ignore_index`), gives its row the
            weight 0.
        weights: [rows]; a row of weight 0 contributes exactly nothing, even if its logits are not finite.
        vocab_size: columns of the whole vocabulary from this one on are padding: they are left out of the softmax and
            get a gradient of exactly 0. None = no padding.
        group: the tensor-parallel group; None = the logits are whole.

    Returns:
        Sum of weight * cross-entropy, [] float32 (float64 for float64 logits), bitwise equal on all ranks of `group`;
        cross-entropy [rows] and whether the target has the largest logit [rows] bool, both detached and 0 where the
        weight is 0.

    Raises:
        RuntimeError: in a second backward pass.
    """
    shard = VocabShard.of(logits.shape[1], vocab_size, group)
    return _CrossEntropy.apply(logits, targets, weights, shard)


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
    in the backward pass. Differentiable in `hidden` and `weight`, once.

    Args:
        hidden: [tokens, hidden_size]; under `sequence_parallel` this rank's [tokens / TP, hidden_size].
        weight: [vocab_local, hidden_size], of the dtype of `hidden`; rank r holds the columns from r * vocab_local on.
        rows: [n] int, which of all the tokens are scored, without repetition; the value `tokens` marks a padding row
            (of weight 0). The same on all ranks of `group`. None = every token, in order.
        targets: [n] int64; ids out of range are ignored as in `cross_entropy`.
        weights: [n]; a row of weight 0 contributes exactly nothing, even if it is not finite.
        vocab_size, group: as in `cross_entropy`.
        sequence_parallel: gather `hidden` over `group`, and reduce-scatter its gradient.
        chunk_size: rows whose logits exist at a time.
        fp32_logits: compute the logits of half-precision operands in float32.
        accumulate_into_main_grad: in the backward pass, add the gradient of `weight` to `weight.main_grad` (float32)
            instead of returning it, as megatron-core's gradient_accumulation_fusion does: `weight` is then the
            parameter itself. See `dlm_kernels.loss_parts.add_to_main_grad`.

    Returns:
        As `cross_entropy`. The gradient of `hidden` is summed over `group`, and exactly 0 in rows that are not scored;
        that of `weight` is accumulated in float32.

    Raises:
        ValueError: rows, targets and weights differ in length, or `weight` has no suitable `main_grad` though its
            gradient is to be added to it.
        RuntimeError: in a second backward pass.
    """
    shard = VocabShard.of(weight.shape[0], vocab_size, group)
    need_grad = torch.is_grad_enabled()
    need = (need_grad and hidden.requires_grad, need_grad and weight.requires_grad)
    into_main_grad = accumulate_into_main_grad and need[1]
    if into_main_grad:
        require_main_grad(weight)
    return _LinearCrossEntropy.apply(
        hidden, weight, rows, targets, weights, shard, sequence_parallel, chunk_size, fp32_logits, need, into_main_grad
    )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor, shard: VocabShard
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = accumulator(logits.dtype)
        factors = shard.factors(weights, targets, dtype)
        scored = factors != 0
        # A copy without the rows of weight 0, because 0 * NaN is NaN.
        # [rows, columns] in the accumulating precision; the padding columns are cut off, and so cannot matter.
        values = torch.where(scored[:, None], logits[:, : shard.columns].to(dtype), 0.0)
        merged = merge(exponentials_(values, targets, shard), shard)
        entropy, correct = torch.where(scored, merged.entropy, 0.0), merged.correct & scored
        # The exponentials, which the gradient overwrites: no second copy of the logits.
        ctx.save_for_backward(values, targets, factors, *merged)
        ctx.shard, ctx.shape, ctx.dtype, ctx.consumed = shard, logits.shape, logits.dtype, False
        ctx.mark_non_differentiable(entropy, correct)
        return (entropy.double() * factors).sum().to(dtype), entropy, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        consume(ctx, "cross_entropy")
        values, targets, factors, *merged = ctx.saved_tensors
        gradient = gradient_(values, targets, factors * upstream, RowStatistics(*merged), ctx.shard)
        padding = ctx.shape[1] - ctx.shard.columns
        return torch.nn.functional.pad(gradient.to(ctx.dtype), (0, padding)), None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        shard: VocabShard,
        sequence_parallel: bool,
        chunk_size: int,
        fp32_logits: bool,
        need: tuple[bool, bool],
        into_main_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        full = gather_hidden(hidden, sequence_parallel, shard)
        tokens = full.shape[0]
        count = require_equal_lengths(tokens, rows, targets, weights)
        dtype = accumulator(hidden.dtype)
        real_weight = weight[: shard.columns]
        # A half-precision product rounds its logits; in fp32 it does not.
        logit_weight = real_weight.to(dtype) if fp32_logits else real_weight
        factors = shard.factors(weights, targets, dtype)
        scored = factors != 0
        rows = torch.arange(tokens, device=hidden.device) if rows is None else rows.long()
        # One row more than there are tokens: padding rows point at it.
        d_hidden = hidden.new_zeros(tokens + 1, hidden.shape[1]) if need[0] else None
        # Chunks add up in fp32, and are rounded once at the end.
        d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if need[1] else None
        entropy = torch.zeros(count, dtype=dtype, device=hidden.device)
        correct = torch.zeros(count, dtype=torch.bool, device=hidden.device)
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, count, chunk_size):
            part = slice(start, start + chunk_size)
            source, target, factor = rows[part], targets[part], factors[part]
            # Rows of weight 0 become 0 here, where that is cheap, because 0 * NaN is NaN.
            chunk = full.index_select(0, source.clamp(max=tokens - 1)).masked_fill_(~scored[part, None], 0.0)
            # [chunk, columns]; the gradient overwrites it before the next chunk needs the memory.
            values = ((chunk.to(dtype) if fp32_logits else chunk) @ logit_weight.t()).to(dtype)
            merged = merge(exponentials_(values, target, shard), shard)
            entropy[part] = torch.where(scored[part], merged.entropy, 0.0)
            correct[part] = merged.correct & scored[part]
            loss += (entropy[part].double() * factor).sum()
            if d_hidden is not None or d_weight is not None:
                gradient = gradient_(values, target, factor, merged, shard).to(hidden.dtype)
                if d_hidden is not None:
                    # Every row once, so copying is enough; padding rows all land on the one behind the last token.
                    d_hidden.index_copy_(0, source, gradient @ real_weight)
                if d_weight is not None:
                    d_weight[: shard.columns].addmm_(gradient.to(dtype).t(), chunk.to(dtype))
        if d_hidden is not None:
            d_hidden, reduction = start_reduction(d_hidden[:tokens], sequence_parallel, shard)
            if reduction is not None:
                reduction.wait()
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight, ctx.into_main_grad, ctx.consumed = weight, into_main_grad, False
        ctx.mark_non_differentiable(entropy, correct)
        return loss.to(dtype), entropy, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        consume(ctx, "linear_cross_entropy")
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            # Of one dimension or more, or it would be rounded to the gradient's half precision before the product.
            d_hidden = torch.mul(d_hidden, upstream.view(1, 1), out=d_hidden)
        if d_weight is not None:
            finish = add_to_main_grad if ctx.into_main_grad else weight_gradient
            d_weight = finish(ctx.weight, d_weight, upstream)
        return d_hidden, d_weight, *(None,) * 9
