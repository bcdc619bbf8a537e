"""Loss and accuracy by noise level: where a denoiser is good, and where a change helps."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dlm.diffusion.objective import Batch
from megatron_dlm.model.transformer import TokenLosses

BUCKETS = 10


def sums_by_mask_ratio(batch: Batch, losses: TokenLosses) -> Tensor:
    """Sums over the scored tokens of a micro-batch, by the share of their sequence that is scored.

    Bucket i has the ratios in [i/10, (i+1)/10), and the last one 1.0 too. Reads nothing back from the device. Tokens
    of weight 0, whose loss was not computed, count in the ratio but not in the sums.

    Returns:
        [3, 10] fp64: tokens, their cross-entropy (unweighted, nats), correct predictions.
    """
    size, seq = batch.inputs.shape
    device = losses.cross_entropy.device
    scored = batch.is_scored().double()
    per_sequence = torch.zeros(size, dtype=torch.float64, device=device).index_add_(0, batch.sample_index, scored)
    lengths = torch.full((size,), seq) if batch.lengths is None else batch.lengths
    ratio = per_sequence / lengths.to(device, non_blocking=True)
    bucket = (ratio * BUCKETS).long().clamp(max=BUCKETS - 1)[batch.sample_index]
    known = (batch.weights != 0).double()
    values = torch.stack([known, losses.cross_entropy.double() * known, losses.correct.double() * known])
    return torch.zeros(3, BUCKETS, dtype=torch.float64, device=device).index_add_(1, bucket, values)


def means_by_mask_ratio(sums: list[list[float]]) -> dict[str, list[float | None]]:
    """Mean cross-entropy (nats) and accuracy of every bucket; None where a bucket has no token.

    Args:
        sums: [3][10], global sums of ``sums_by_mask_ratio``.
    """
    count, loss, correct = sums
    return {
        "loss_by_mask_ratio": [a / n if n else None for a, n in zip(loss, count, strict=True)],
        "accuracy_by_mask_ratio": [a / n if n else None for a, n in zip(correct, count, strict=True)],
    }
