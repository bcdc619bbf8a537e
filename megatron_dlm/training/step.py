"""One training step: the only place where diffusion meets the pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dlm.model.pipeline import MicroBatch, run_pipeline
from megatron_dlm.model.transformer import TokenLosses
from megatron_dlm.training.mask_ratio import BUCKETS, means_by_mask_ratio, sums_by_mask_ratio
from megatron_dlm.training.state import Training


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


def _training_output(micro_batch: MicroBatch, losses: TokenLosses) -> tuple[Tensor, Tensor, Tensor]:
    batch = micro_batch.batch
    assert batch is not None
    loss_sum = losses.loss_sum.detach().double()
    eligible = torch.full_like(loss_sum, batch.num_eligible)  # a fill: copying the number to the device would stall
    counts = torch.stack([loss_sum, batch.divisor, eligible, batch.is_scored().sum()])
    report = torch.cat([counts, sums_by_mask_ratio(batch, losses).flatten()])
    return losses.loss_sum, batch.divisor.int(), report
