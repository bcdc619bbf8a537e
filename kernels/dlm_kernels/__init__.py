"""Kernels of masked diffusion training: noise and masking, weighted cross-entropy, and the LM head on masked rows.

`mask_tokens`, `cross_entropy` and `linear_cross_entropy` take `impl="auto" | "triton" | "torch"`: auto is Triton on a
GPU, else the plain-torch twin of `dlm_kernels.reference`, which is the specification. Needs torch; Triton is optional.
"""

from __future__ import annotations

from dlm_kernels.implementation import Implementation, cross_entropy, linear_cross_entropy, mask_tokens
from dlm_kernels.types import MaskedTokens, NoiseDraw

__all__ = ["Implementation", "MaskedTokens", "NoiseDraw", "cross_entropy", "linear_cross_entropy", "mask_tokens"]
