"""The figures of a step that are summed over micro-batches and ranks: each has a name, and all travel together.

A new figure is a field here and a line in ``of_micro_batch``; whoever wants it reads it from a step's sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from megatron_dlm.diffusion.objective import Batch
from megatron_dlm.model.transformer import TokenLosses
from megatron_dlm.training.mask_ratio import BUCKETS, sums_by_mask_ratio


def _shape(*sizes: int) -> Tensor:
    return field(metadata={"shape": sizes})


@dataclass
class Sums:
    """fp64 tensors, on the device while they are summed."""

    loss: Tensor = _shape()
    """Weighted cross-entropies (nats)."""
    divisor: Tensor = _shape()
    """What the loss is divided by, once it is the sum over the global batch."""
    eligible_tokens: Tensor = _shape()
    scored_tokens: Tensor = _shape()
    by_mask_ratio: Tensor = _shape(3, BUCKETS)
    """Tokens, their cross-entropies and correct predictions; see ``sums_by_mask_ratio``."""
    stop_requests: Tensor = _shape()
    """Ranks that were asked to stop."""

    @classmethod
    def zeros(cls, device: torch.device | str) -> Sums:
        """Of nothing."""
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in _shapes()))

    @classmethod
    def of_micro_batch(cls, batch: Batch, losses: TokenLosses) -> Sums:
        """Of a micro-batch; reads nothing back from the device."""
        sums = cls.zeros(losses.loss_sum.device)
        sums.loss += losses.loss_sum.detach()
        sums.divisor += batch.divisor
        sums.eligible_tokens += batch.num_eligible  # a number on the host: adding it does not stall
        sums.scored_tokens += batch.is_scored().sum()
        sums.by_mask_ratio += sums_by_mask_ratio(batch, losses)
        return sums

    @classmethod
    def total(cls, parts: Iterable[Sums], device: torch.device | str) -> Sums:
        """Of all parts together; zeros where there are none."""
        total = cls.zeros(device)
        for part in parts:
            for item in fields(cls):
                getattr(total, item.name).add_(getattr(part, item.name))
        return total

    def pack(self) -> Tensor:
        """All figures as one vector, for one all-reduce."""
        return torch.cat([getattr(self, item.name).flatten() for item in fields(self)])

    @classmethod
    def unpack(cls, numbers: Tensor) -> Sums:
        """The inverse of ``pack``; views."""
        shapes = [torch.Size(shape) for shape in _shapes()]
        parts = numbers.split([shape.numel() for shape in shapes])
        return cls(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))


def _shapes() -> list[tuple[int, ...]]:
    return [item.metadata["shape"] for item in fields(Sums)]
