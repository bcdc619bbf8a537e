"""One training step: the only place where diffusion meets the pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from megatron_dlm.model.transformer import DiffusionTransformer, TokenLosses
from megatron_dlm.training.batches import MicroBatch
from megatron_dlm.training.mask_ratio import BUCKETS, means_by_mask_ratio, sums_by_mask_ratio
from megatron_dlm.training.setup import Training

Chunk = DistributedDataParallel | DiffusionTransformer


class StepReport(NamedTuple):
    """One step's global figures, equal on all ranks."""

    loss: float
    """The training loss (nats): the weighted cross-entropy per eligible token, with the ELBO weighting an estimate of
    the NELBO; without weighting the mean over the masked tokens."""
    grad_norm: float
    lr: float
    applied: bool
    eligible_tokens: int
    scored_tokens: int
    """Tokens with a loss: the masked ones, or all of them for the autoregressive objective."""
    accuracy: float
    """Share of the scored tokens whose target has the largest logit."""
    by_mask_ratio: dict[str, list[float | None]]
    """Cross-entropy and accuracy in ten buckets of the sequences' mask ratio."""
    stop_requested: bool
    """Whether any rank was asked to stop; all ranks agree, so that all of them save the same step."""


def train_step(training: Training, *, step: int, stop_requested: bool = False) -> StepReport:
    """Noise, forward, backward, one global normalisation, update; collective."""
    topology, stream = training.topology, training.train_stream
    reports = accumulate_gradients(
        training,
        lambda reads_tokens: stream.training(step, reads_tokens=reads_tokens),
        step=step,
        num_microbatches=stream.num_microbatches,
    )
    update = training.optimizer.step(step)
    totals = torch.zeros(5 + 3 * BUCKETS, dtype=torch.float64, device=topology.device)
    if topology.reports_loss:
        totals[1:] = sum(reports)
    totals[0] = float(stop_requested)
    stop, loss, divisor, eligible, scored, *buckets = topology.sum_over_world(totals).tolist()
    sums = [buckets[i : i + BUCKETS] for i in range(0, 3 * BUCKETS, BUCKETS)]
    return StepReport(
        loss=loss / max(divisor, 1.0),
        grad_norm=update.grad_norm,
        lr=update.lr,
        applied=update.applied,
        eligible_tokens=int(eligible),
        scored_tokens=int(scored),
        accuracy=sum(sums[2]) / max(sum(sums[0]), 1.0),
        by_mask_ratio=means_by_mask_ratio(sums),
        stop_requested=stop > 0,
    )


def accumulate_gradients(
    training: Training, batches: Callable[[bool], Iterator[MicroBatch]], *, step: int, num_microbatches: int
) -> list[Tensor]:
    """Forward and backward of micro-batches into cleared gradient buffers, with the dropout of ``step``; collective.

    Args:
        batches: as for ``run_pipeline``.
        step: decides the dropout masks.

    Returns:
        One report per micro-batch on the last stage, an empty list elsewhere: [4 + 3 * 10] fp64, the weighted loss
        sum, its divisor, the eligible and the scored tokens, and the sums by mask ratio.
    """
    training.topology.seed_dropout(training.config.run.seed, step)
    for chunk in training.chunks:
        chunk.train()
    training.optimizer.zero_grad()
    stream = training.train_stream
    return run_pipeline(
        training.chunks,
        batches,
        _training_output,
        num_microbatches=num_microbatches,
        seq_length=stream.dataset.sequence_length,
        micro_batch_size=stream.micro_batch_size,
    )


def run_pipeline(
    chunks: list[Any],
    batches: Callable[[bool], Iterator[MicroBatch]],
    output: Callable[..., Any],
    *,
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool = False,
) -> list[Any]:
    """Run the micro-batches through megatron's schedule for the layout; collective.

    Args:
        chunks: this rank's chunks, wrapped or bare.
        batches: ``batches(reads_tokens)`` iterates over this rank's micro-batches; called once a chunk.
        output: ``output(micro_batch, model_output)`` on the last stage gives (loss sum, number of tokens,
            report) for training, or with ``forward_only`` anything at all.

    Returns:
        The reports (or the outputs), one per micro-batch, on the last stage; an empty list elsewhere.
    """
    iterators = [batches(_reads_tokens(chunk)) for chunk in chunks]

    def forward_step(iterator: Iterator[MicroBatch], model: Chunk) -> tuple[Any, Callable[..., Any]]:
        micro_batch = next(iterator)
        model_output = model(micro_batch.inputs, micro_batch.lengths, micro_batch.batch)
        if isinstance(model_output, TokenLosses):  # the schedule wants a tensor; the rest goes to our function
            return model_output.loss_sum, partial(_call, output, micro_batch, model_output)
        return model_output, partial(_call, output, micro_batch)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _call(output: Callable[..., Any], micro_batch: MicroBatch, *outputs: Any, non_loss_data: bool = False) -> Any:
    """Adapt ``output(micro_batch, model_output)`` to the schedule, which appends its own tensor to the arguments."""
    return output(micro_batch, outputs[0])


def _reads_tokens(chunk: Chunk) -> bool:
    bare = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
    return bare.pre_process or bare.post_process


def _training_output(micro_batch: MicroBatch, losses: TokenLosses) -> tuple[Tensor, Tensor, Tensor]:
    batch = micro_batch.batch
    assert batch is not None
    loss_sum = losses.loss_sum.detach().double()
    eligible = torch.full_like(loss_sum, batch.num_eligible)  # a fill: copying the number to the device would stall
    counts = torch.stack([loss_sum, batch.divisor, eligible, batch.is_scored().sum()])
    report = torch.cat([counts, sums_by_mask_ratio(batch, losses).flatten()])
    return losses.loss_sum, batch.divisor.int(), report
