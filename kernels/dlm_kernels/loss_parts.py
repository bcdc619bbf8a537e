"""What the two implementations of the losses share: checks, collectives of the hidden states, the head's gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dlm_kernels.vocab_parallel import VocabShard


def consume(ctx: Any, name: str) -> None:
    """Allow one backward pass: it works in place."""
    if ctx.consumed:
        raise RuntimeError(f"{name}: its gradient was consumed by an earlier backward pass: call the forward again")
    ctx.consumed = True


def require_equal_lengths(tokens: int, rows: Tensor | None, targets: Tensor, weights: Tensor) -> int:
    """Number of scored rows. Raises ValueError if the lists differ in length."""
    count = tokens if rows is None else rows.numel()
    if not count == targets.numel() == weights.numel():
        raise ValueError(
            f"linear_cross_entropy: {count} rows, {targets.numel()} targets and {weights.numel()} weights must be "
            "equally many"
        )
    return count


def gather_hidden(hidden: Tensor, sequence_parallel: bool, shard: VocabShard) -> Tensor:
    """[tokens, hidden]: under sequence parallelism the parts of all ranks (one all-gather), else `hidden` itself."""
    if not sequence_parallel or shard.world == 1:
        return hidden
    full = hidden.new_empty(hidden.shape[0] * shard.world, hidden.shape[1])
    dist.all_gather_into_tensor(full, hidden.contiguous(), group=shard.group)
    return full


def start_reduction(d_hidden: Tensor, sequence_parallel: bool, shard: VocabShard) -> tuple[Tensor, dist.Work | None]:
    """Start to sum the gradient of the hidden states over the group: one all-reduce or reduce-scatter.

    Returns:
        The sum, or this rank's part of it under sequence parallelism, and what to wait for before either it or
        `d_hidden` is used (None on one rank).
    """
    if shard.world == 1:
        return d_hidden, None
    if not sequence_parallel:
        return d_hidden, dist.all_reduce(d_hidden, group=shard.group, async_op=True)
    part = d_hidden.new_empty(d_hidden.shape[0] // shard.world, d_hidden.shape[1])
    return part, dist.reduce_scatter_tensor(part, d_hidden, group=shard.group, async_op=True)


def require_main_grad(weight: Tensor) -> None:
    """Raise ValueError unless the head has megatron-core's buffer of accumulated gradients."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or main_grad.shape != weight.shape:
        raise ValueError(
            "linear_cross_entropy: accumulate_into_main_grad needs a weight with a buffer `main_grad` of its shape; "
            "megatron-core's DistributedDataParallel makes one"
        )


def weight_gradient(weight: Tensor, d_weight: Tensor, upstream: Tensor) -> Tensor:
    """upstream * d_weight in the shape and dtype of the head, rounded once; 0 in the padding rows.

    Args:
        weight: [vocab_local, hidden]; only its shape, dtype and device matter.
        d_weight: [columns, hidden] float32 (float64 for float64 weights), of the real rows.
        upstream: [] of the dtype of `d_weight`, on its device.
    """
    # Multiplied and rounded in one pass; only the padding rows, which nothing computes, are zeroed.
    gradient = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    columns = d_weight.shape[0]
    torch.mul(d_weight, upstream, out=gradient[:columns])
    gradient[columns:].zero_()
    return gradient


def add_to_main_grad(weight: Tensor, d_weight: Tensor, upstream: Tensor) -> Tensor | None:
    """Add upstream * d_weight to `weight.main_grad`, and return what autograd is to take for the gradient.

    This is the contract of megatron-core's gradient_accumulation_fusion. A weight with `grad_added_to_main_grad` gets a
    gradient of the right shape, so that its hooks run on the thread of the backward pass; the flag tells
    DistributedDataParallel to ignore the content, unless `zero_out_wgrad` says that another use of the weight (the
    embedding) adds a gradient of its own to it, which is then added to `main_grad` as a whole. A weight without the
    flag gets None.

    Args:
        weight: [vocab_local, hidden], the parameter itself.
        d_weight, upstream: as in `weight_gradient`.
    """
    # In fp32 and in place: neither a copy nor a rounding to the parameter's precision.
    holder: Any = weight
    holder.main_grad[: d_weight.shape[0]].addcmul_(d_weight, upstream)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    holder.grad_added_to_main_grad = True
    make = torch.zeros if getattr(weight, "zero_out_wgrad", False) else torch.empty
    return make(weight.shape, dtype=weight.dtype, device=weight.device)
