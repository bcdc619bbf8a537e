"""Held-out NELBO in nats per token, with fixed noise, the same at every layout."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_dlm.model.pipeline import MicroBatch, run_pipeline
from megatron_dlm.model.transformer import TokenLosses
from megatron_dlm.parallel.topology import Topology
from megatron_dlm.training.batches import BatchStream

_NORMAL_95 = 1.96


class HeldOut(NamedTuple):
    """Held-out figures in nats per token."""

    nelbo: float
    """Negative evidence lower bound; the exact negative log-likelihood for the autoregressive objective."""
    ci95: float
    """Half-width of the 95 % interval."""
    sequences: int


@torch.no_grad()
def held_out_nelbo(chunks: list[Any], stream: BatchStream, topology: Topology, *, num_sequences: int) -> HeldOut:
    """Estimate the NELBO on the first ``num_sequences`` sequences of the stream; collective.

    The noise depends on the validation purpose and on the index in the set alone, so that values of
    different steps, layouts and runs compare. The interval takes pairs of neighbouring sequences as
    independent units, since the noise levels within a pair are antithetic; stratification over the pairs
    makes the true interval narrower, so this one is cautious.
    """
    for chunk in chunks:
        chunk.eval()
    totals = torch.zeros(num_sequences, dtype=torch.float64, device=topology.device)
    outputs = run_pipeline(
        chunks,
        lambda reads_tokens: stream.validation(num_sequences, reads_tokens=reads_tokens),
        _sequence_totals,
        num_microbatches=stream.validation_microbatches(num_sequences),
        seq_length=stream.dataset.sequence_length,
        micro_batch_size=stream.micro_batch_size,
        forward_only=True,
    )
    if topology.reports_loss:
        for sample_ids, values in outputs:
            inside = sample_ids >= 0
            totals.index_add_(0, sample_ids[inside], values[inside])
    topology.sum_over_world(totals)
    return summarize((totals / stream.dataset.sequence_length).cpu().numpy())


def summarize(nelbo: np.ndarray) -> HeldOut:
    """Mean and 95 % interval of per-sequence estimates, [sequences] nats per token, neighbours paired."""
    units = nelbo[: len(nelbo) // 2 * 2].reshape(-1, 2).mean(axis=1) if len(nelbo) >= 4 else nelbo
    ci95 = _NORMAL_95 * float(units.std(ddof=1)) / math.sqrt(len(units)) if len(units) > 1 else math.inf
    return HeldOut(nelbo=float(nelbo.mean()), ci95=ci95, sequences=len(nelbo))


def _sequence_totals(micro_batch: MicroBatch, losses: TokenLosses) -> tuple[Tensor, Tensor]:
    """(sample ids [micro_batch], weighted cross-entropy per sequence [micro_batch] fp64)."""
    batch = micro_batch.batch
    assert batch is not None
    device = losses.cross_entropy.device
    weighted = torch.where(batch.weights != 0, batch.weights.double() * losses.cross_entropy.double(), 0.0)
    values = torch.zeros(len(micro_batch.sample_ids), dtype=torch.float64, device=device)
    values.index_add_(0, batch.sample_index, weighted)
    return torch.from_numpy(micro_batch.sample_ids).to(device), values


def unigram_cross_entropy(train_counts: np.ndarray, sequences: np.ndarray) -> float:
    """Cross-entropy of held-out tokens under the training unigram distribution, in nats per token.

    Add-one smoothing. A model that falls to this value has learned token frequencies and nothing else.

    Args:
        train_counts: [vocab] int64, how often each id occurs in training data.
        sequences: [sequences, seq] int64, the held-out tokens.
    """
    log_probability = np.log(train_counts + 1.0) - math.log(float(train_counts.sum() + len(train_counts)))
    return float(-log_probability[sequences].mean())
