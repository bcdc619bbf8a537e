"""A predictor small enough that the ELBO can be computed by enumerating every mask."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

SEQ, VOCAB, MASK_ID = 4, 3, 3


class TinyPredictor:
    """Fixed random logits for every possible noised sequence of 4 tokens from a vocabulary of 3 and [MASK].

    The clean tokens are the more likely the more of the sequence is visible, so that a bias in the noise level shows.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.clean = torch.tensor([2, 0, 1, 1])
        noised = torch.cartesian_prod(*[torch.arange(VOCAB + 1)] * SEQ).flip(1)
        self.logits = torch.randn(len(noised), SEQ, VOCAB, generator=generator, dtype=torch.float64)
        visible = (noised != MASK_ID).sum(1).double()
        self.logits += visible[:, None, None] * torch.nn.functional.one_hot(self.clean, VOCAB)

    def cross_entropy(self, noised: Tensor) -> Tensor:
        """Cross-entropy of the clean tokens, [batch, 4] float64, given noised tokens [batch, 4]."""
        index = (noised * (VOCAB + 1) ** torch.arange(SEQ)).sum(1)
        return -self.logits[index].log_softmax(-1).gather(2, self.clean.expand(len(noised), SEQ)[..., None])[..., 0]

    def masked_sums(self) -> tuple[np.ndarray, np.ndarray]:
        """For each of the 16 masks: the number of masked tokens, and the sum of their cross-entropies."""
        masks = torch.tensor([[mask >> i & 1 for i in range(SEQ)] for mask in range(2**SEQ)], dtype=torch.bool)
        losses = self.cross_entropy(self.clean.expand(2**SEQ, SEQ).masked_fill(masks, MASK_ID))
        return masks.sum(1).numpy(), (losses * masks).sum(1).numpy()

    def mean_by_count(self) -> np.ndarray:
        """Mean over the masks of k tokens of the sum of their cross-entropies, [5]."""
        counts, sums = self.masked_sums()
        return np.array([sums[counts == k].mean() for k in range(SEQ + 1)])

    def negative_elbo(self) -> float:
        """Integral over p in (0, 1) of E[sum of masked cross-entropies | Bernoulli(p)] / p, in nats per sequence.

        The mask M has the coefficient Beta(k, 4 - k + 1) = (k - 1)! (4 - k)! / 4!.
        """
        counts, sums = self.masked_sums()
        return sum(
            math.factorial(k - 1) * math.factorial(SEQ - k) / math.factorial(SEQ) * total
            for k, total in zip(counts.tolist(), sums.tolist(), strict=True)
            if k
        )
