"""Arguments and results shared by the reference implementations and the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dlm_kernels.philox import TOKEN_POSITION_BITS

Masking = Literal["exact_count", "bernoulli"]
NoiseMode = Literal["stratified_antithetic", "stratified", "antithetic", "iid"]


@dataclass(frozen=True)
class NoiseDraw:
    """How `mask_tokens` draws the noise levels of a linear schedule by itself.

    Attributes:
        mode: rule of `dlm_kernels.noise_levels.draw`.
        step: training step; 0 for validation.
        global_batch_size: sequences in the global batch, or in the validation set.
        eps: Bernoulli masking only: the mask probability is (1 - eps) u + eps, 0 <= eps < 0.25.
    """

    mode: NoiseMode
    step: int
    global_batch_size: int
    eps: float = 1.0e-3


@dataclass(frozen=True)
class MaskedTokens:
    """Noised sequences and the compacted list of their masked positions.

    Attributes:
        tokens: [batch, seq] int64, xt.
        rows: [capacity] int32, ascending flat indices into [batch * seq]; padding rows hold batch * seq.
        targets: [capacity] int64, the clean tokens at `rows`; 0 in padding.
        weights: [capacity] float32, loss weights; 0 in padding.
        overflow: [] bool, whether more tokens were masked than `capacity` rows hold.
    """

    tokens: Tensor
    rows: Tensor
    targets: Tensor
    weights: Tensor
    overflow: Tensor


def require_consistent(
    seq: int, draw: NoiseDraw | None, levels: Tensor | None, weights: Tensor | None, complement: Tensor | None
) -> None:
    """Raise ValueError where the arguments of `mask_tokens` that say how much is masked do not fit together."""
    if (draw is None) == (levels is None) or (levels is None) != (weights is None):
        raise ValueError("mask_tokens needs either draw, or levels and weights")
    if draw is not None and complement is not None:
        raise ValueError("mask_tokens needs levels and weights where it is given a complement")
    if seq >= 1 << TOKEN_POSITION_BITS:
        raise ValueError(f"sequences of {seq} tokens are too long: the counter holds positions below 2**22")
