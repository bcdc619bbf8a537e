"""One training step: the only place where diffusion meets the pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from megatron_dlm.model.pipeline import MicroBatch, run_pipeline
from megatron_dlm.model.transformer import TokenLosses
from megatron_dlm.training.mask_ratio import means_by_mask_ratio
from megatron_dlm.training.progress import Progress
from megatron_dlm.training.state import Training
from megatron_dlm.training.sums import Sums


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


def train_step(training: Training, progress: Progress, *, stop_requested: bool = False) -> StepReport:
    """Take the step behind ``progress``: noise, forward, backward, one global normalisation, update; collective."""
    topology, stream = training.topology, training.train_stream
    micro_batches = accumulate_gradients(
        training,
        lambda reads_tokens: stream.training(progress, reads_tokens=reads_tokens),
        step=progress.step,
        num_microbatches=stream.num_microbatches,
    )
    # megatron has divided the summed gradient by the summed divisor of all micro-batches and data-parallel ranks.
    update = training.optimizer.step(progress.step)
    # Tensor-parallel ranks have the same losses: one of them counts.
    sums = Sums.total(micro_batches if topology.reports_loss else [], topology.device)
    sums.stop_requests += float(stop_requested)
    # The one place of a step where the host waits for the device's figures.
    sums = Sums.unpack(topology.sum_over_world(sums.pack()).cpu())
    tokens, _, correct = sums.by_mask_ratio.sum(dim=1).tolist()
    return StepReport(
        loss=float(sums.loss) / max(float(sums.divisor), 1.0),
        grad_norm=update.grad_norm,
        lr=update.lr,
        applied=update.applied,
        eligible_tokens=int(sums.eligible_tokens),
        scored_tokens=int(sums.scored_tokens),
        accuracy=correct / max(tokens, 1.0),
        by_mask_ratio=means_by_mask_ratio(sums.by_mask_ratio.tolist()),
        stop_requested=bool(sums.stop_requests > 0),
    )


def accumulate_gradients(
    training: Training, batches: Callable[[bool], Iterator[MicroBatch]], *, step: int, num_microbatches: int
) -> list[Sums]:
    """Forward and backward of micro-batches into cleared gradient buffers, with the dropout of ``step``; collective.

    Args:
        batches: as for ``run_pipeline``.
        step: decides the dropout masks.

    Returns:
        The sums of every micro-batch on the last stage, an empty list elsewhere.
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


def _training_output(micro_batch: MicroBatch, losses: TokenLosses) -> tuple[Tensor, Tensor, Sums]:
    """What megatron differentiates, what it divides the gradient by when it has summed it, and what is reported."""
    batch = micro_batch.batch
    assert batch is not None
    return losses.loss_sum, batch.divisor.int(), Sums.of_micro_batch(batch, losses)
