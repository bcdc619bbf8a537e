"""Cross-entropy and its gradient over a vocabulary that is split over the ranks of a tensor-parallel group.

Three steps: exponentials and statistics of this rank's columns, one merge of the statistics over the group, and the
gradient, which overwrites the exponentials.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary: `columns` real columns from `first` on; the rest is padding."""

    first: int
    columns: int
    vocabulary: int
    """Real columns of all shards."""
    group: ProcessGroup | None
    world: int

    @staticmethod
    def of(vocab_local: int, vocab_size: int | None, group: ProcessGroup | None) -> VocabShard:
        world = 1 if group is None else dist.get_world_size(group)
        first = 0 if group is None else dist.get_rank(group) * vocab_local
        # The last ranks may hold padding in part, or nothing else.
        end = vocab_local * world if vocab_size is None else vocab_size
        return VocabShard(first, min(max(end - first, 0), vocab_local), end, group, world)

    def factors(self, weights: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights [rows] in `dtype`, and 0 where the target is `ignore_index` or any other id out of range.

        Without this such a target would be on no rank, and its row would count as if its logit were 0. One comparison
        serves both ends of the range: it is a launch less on a GPU.
        """
        known = targets == targets.clamp(0, self.vocabulary - 1)
        return torch.where(known, weights.to(dtype), 0.0)

    def locate(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of the targets in this shard (clamped), and which targets are in it; both [rows, 1]."""
        # Clamped, so that a target of another rank reads something that is then not used.
        local = targets[:, None] - self.first
        return local.clamp(0, self.columns - 1), (local >= 0) & (local < self.columns)


def exponentials_(logits: Tensor, targets: Tensor, shard: VocabShard) -> Tensor:
    """Overwrite logits [rows, columns] with exp(logit - row maximum), but 0 at the target.

    Returns (maximum, sum, target logit) [3, rows]. The target is left out of the sum because a confident one, 1, would
    absorb the others, and with them the small loss and gradient that it still has.
    """
    lowest = torch.finfo(logits.dtype).min
    if shard.columns == 0:
        statistics = logits.new_zeros(3, logits.shape[0])
        statistics[0] = lowest
        return statistics
    peak = logits.amax(1).clamp(min=lowest)  # finite, so that -inf minus the maximum is -inf
    # The target's logit is taken out before the sum, and -inf in its place adds exactly 0.
    index, own = shard.locate(targets)
    at_index = logits.gather(1, index)
    logits.scatter_(1, index, torch.where(own, -torch.inf, at_index))
    logits.sub_(peak[:, None]).exp_()
    return torch.stack((peak, logits.sum(1), torch.where(own, at_index, 0.0).view(-1)))


class RowStatistics(NamedTuple):
    """Statistics of whole rows, [rows] each."""

    entropy: Tensor
    correct: Tensor
    """Whether the target has the largest logit."""
    missing: Tensor
    """1 - probability of the target."""
    scale: Tensor
    """Probability / exponential of this shard's columns."""


def merge(statistics: Tensor, shard: VocabShard) -> RowStatistics:
    """Combine the statistics of the shards, in the same order on every rank."""
    peak, others, target = local = statistics
    if shard.world > 1 and statistics.numel():
        # Three numbers a row from every rank, not its columns.
        gathered = statistics.new_empty(shard.world * 3, statistics.shape[1])
        dist.all_gather_into_tensor(gathered, statistics, group=shard.group)
        peaks, sums, owned = gathered.view(shard.world, 3, -1).unbind(1)
        peak = peaks.amax(0)
        # Each rank's sum is relative to its own peak; it is brought to the common one.
        others = (sums * (peaks - peak).exp()).sum(0)
        target = owned.sum(0)
    # Not log-sum-exp minus target: at logits of 1e4 the rounding of either would be as large as the loss.
    margin = peak - target
    # The whole sum of exponentials with the target's; where others is small, log1p keeps its digits.
    total = others + (-margin).exp()
    entropy = torch.log1p(others + torch.expm1(-margin)) + margin
    return RowStatistics(entropy, margin == 0, others / total, (local[0] - peak).exp() / total)


def gradient_(
    exponentials: Tensor, targets: Tensor, factors: Tensor, merged: RowStatistics, shard: VocabShard
) -> Tensor:
    """Overwrite the exponentials with factor * (probability - one-hot)."""
    if shard.columns == 0:
        return exponentials
    index, own = shard.locate(targets)
    # One factor a row: weight, and from exponentials to probabilities. The target's column is still 0.
    exponentials.mul_((merged.scale * factors)[:, None])
    return exponentials.scatter_add_(1, index, torch.where(own, -(merged.missing * factors)[:, None], 0.0))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
