"""Noise schedules: the mask probability p(t) of a token at diffusion time t in (0, 1], and the weight of its loss.

- `linear`: p = t.
- `cosine`: p = cos(pi/2 (1 - t)), as in the dllm and duo code bases.
- `cosine_mdlm`: p = (1 - eps)(1 - cos(pi t / 2)), as in MDLM (Sahoo et al., 2024).
- `polynomial`: p = t**2.
- `geometric`: p = 1 - exp(-sigma), sigma = sigma_min**(1 - t) * sigma_max**t, as in SEDD (Lou et al., 2024).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from dlm_kernels.noise_levels import linear_count, linear_threshold
from megatron_dlm.config import DiffusionConfig

_EXPONENT = 2.0
_SIGMA_MIN, _SIGMA_MAX = 1.0e-4, 20.0


def mask_probability(name: str, t: Any, eps: float = 1.0e-3) -> Any:
    """Mask probability p(t).

    Args:
        name: one of the schedules above.
        t: diffusion time in (0, 1]: float, or float64 array or tensor.
        eps: the part of p that `cosine_mdlm` leaves out at t = 1.

    Returns:
        p(t), of the shape and kind of `t`.

    Raises:
        ValueError: unknown schedule.
    """
    xp: Any = torch if torch.is_tensor(t) else np
    if name == "linear":
        return t
    if name == "cosine":
        return xp.sin(math.pi / 2 * t)
    if name == "cosine_mdlm":
        return (1 - eps) * 2 * xp.sin(math.pi / 4 * t) ** 2
    if name == "polynomial":
        return t**_EXPONENT
    if name == "geometric":
        return -xp.expm1(-_sigma(t))
    raise ValueError(f"unknown noise schedule {name!r}")


def elbo_weight(name: str, t: Any) -> Any:
    """Weight of the cross-entropy of a masked token in the ELBO at time t: p'(t) / p(t) = -alpha'(t) / (1 - alpha(t)).

    Args:
        name: one of the schedules above.
        t: diffusion time in (0, 1]: float, or float64 array or tensor.

    Raises:
        ValueError: unknown schedule.
    """
    xp: Any = torch if torch.is_tensor(t) else np
    if name == "linear":
        return 1 / t
    if name == "cosine":
        return math.pi / 2 / xp.tan(math.pi / 2 * t)
    if name == "cosine_mdlm":
        return math.pi / 2 / xp.tan(math.pi / 4 * t)
    if name == "polynomial":
        return _EXPONENT / t
    if name == "geometric":
        return math.log(_SIGMA_MAX / _SIGMA_MIN) * _sigma(t) / xp.expm1(_sigma(t))
    raise ValueError(f"unknown noise schedule {name!r}")


def levels_and_weights(
    config: DiffusionConfig, u_levels: np.ndarray, eligible_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Masking level and loss weight of each sequence.

    Exact count: k = floor(p(u) L) + 1 of L eligible tokens (at most L) and the weight p'(u) L / k, which is unbiased
    for every schedule that covers p from 0 to 1. Bernoulli: with t = (1 - eps) u + eps the threshold p(t) * 2**32 and
    the weight p'(t) / p(t). The linear schedule uses the integers of `dlm_kernels.noise_levels`.

    Args:
        config: masking, schedule and eps.
        u_levels: [batch] int64, levels U of `noise_levels.draw`.
        eligible_counts: [batch] int64, L.

    Returns:
        Counts or thresholds [batch] int64, and weights [batch] float64.
    """
    u = (u_levels + 0.5) * 2.0**-32
    if config.masking == "exact_count":
        if config.schedule == "linear":
            counts = linear_count(u_levels, eligible_counts)
            return counts, eligible_counts / np.maximum(counts, 1)
        p = mask_probability(config.schedule, u, config.eps)
        counts = np.minimum(np.floor(p * eligible_counts).astype(np.int64) + 1, eligible_counts)
        slope = elbo_weight(config.schedule, u) * p
        return counts, slope * eligible_counts / np.maximum(counts, 1)
    if config.schedule == "linear":
        thresholds = linear_threshold(u_levels, config.eps)
        return thresholds, 2.0**32 / thresholds
    t = (1 - config.eps) * u + config.eps
    thresholds = np.rint(mask_probability(config.schedule, t, config.eps) * 2.0**32).astype(np.int64)
    return thresholds, elbo_weight(config.schedule, t)


def _sigma(t: Any) -> Any:
    return _SIGMA_MIN * (_SIGMA_MAX / _SIGMA_MIN) ** t
