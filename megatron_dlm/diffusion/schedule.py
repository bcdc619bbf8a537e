"""Noise schedules: the mask probability p(t) of a token at diffusion time t in (0, 1], and the weight of its loss.

- `linear`: p = t.
- `cosine`: p = cos(pi/2 (1 - t)), as in the dllm and duo code bases.
- `cosine_mdlm`: p = (1 - eps)(1 - cos(pi t / 2)), as in MDLM (Sahoo et al., 2024).
- `polynomial`: p = t**polynomial_exponent.
- `geometric`: p = 1 - exp(-sigma), sigma = sigma_min**(1 - t) * sigma_max**t, as in SEDD (Lou et al., 2024).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from dlm_kernels.noise_levels import linear_count, linear_pair_count, linear_threshold
from megatron_dlm.config.tree import DiffusionConfig


def mask_probability(config: DiffusionConfig, t: Any) -> Any:
    """Mask probability p(t).

    Args:
        config: schedule and its parameters: eps (of `cosine_mdlm`), polynomial_exponent, sigma_min and sigma_max.
        t: diffusion time in (0, 1]: float, or float64 array or tensor.

    Returns:
        p(t), of the shape and kind of `t`.

    Raises:
        ValueError: unknown schedule.
    """
    xp: Any = torch if torch.is_tensor(t) else np
    name = config.schedule
    if name == "linear":
        return t
    if name == "cosine":
        # As a sine: cos(pi/2 (1 - t)) would lose the digits of a small p in 1 - t.
        return xp.sin(math.pi / 2 * t)
    if name == "cosine_mdlm":
        # 1 - cos(x) = 2 sin(x/2)**2, without the cancellation near t = 0.
        return (1 - config.eps) * 2 * xp.sin(math.pi / 4 * t) ** 2
    if name == "polynomial":
        return t**config.polynomial_exponent
    if name == "geometric":
        return -xp.expm1(-_sigma(config, t))
    raise ValueError(f"unknown noise schedule {name!r}")


def elbo_weight(config: DiffusionConfig, t: Any) -> Any:
    """Weight of the cross-entropy of a masked token in the ELBO at time t: p'(t) / p(t) = -alpha'(t) / (1 - alpha(t)).

    Args:
        config: schedule and its parameters.
        t: diffusion time in (0, 1]: float, or float64 array or tensor.

    Raises:
        ValueError: unknown schedule.
    """
    xp: Any = torch if torch.is_tensor(t) else np
    name = config.schedule
    if name == "linear":
        return 1 / t
    if name == "cosine":
        return math.pi / 2 / xp.tan(math.pi / 2 * t)
    if name == "cosine_mdlm":
        return math.pi / 2 / xp.tan(math.pi / 4 * t)
    if name == "polynomial":
        return config.polynomial_exponent / t
    if name == "geometric":
        sigma = _sigma(config, t)  # sigma' / expm1(sigma), which would overflow for a large sigma_max
        return math.log(config.sigma_max / config.sigma_min) * sigma * xp.exp(-sigma) / -xp.expm1(-sigma)
    raise ValueError(f"unknown noise schedule {name!r}")


def levels_and_weights(
    config: DiffusionConfig, u_levels: np.ndarray, eligible_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Masking level and ELBO weight of each sequence.

    Exact count: k = floor(p(u) L) + 1 of L eligible tokens (at most L) and the weight p'(u) L / k, which is unbiased
    for every schedule that covers p from 0 to 1. Bernoulli: with t = (1 - eps) u + eps the threshold p(t) * 2**32 and
    the weight p'(t) / p(t). The linear schedule uses the integers of `dlm_kernels.noise_levels`.

    Args:
        config: masking, schedule and its parameters.
        u_levels: [batch] int64, levels U of `noise_levels.draw`.
        eligible_counts: [batch] int64, L.

    Returns:
        Counts or thresholds [batch] int64, and weights [batch] float64.
    """
    u = _uniform(u_levels)
    if config.masking == "exact_count":
        if config.schedule == "linear":
            counts = linear_count(u_levels, eligible_counts)
            return counts, eligible_counts / np.maximum(counts, 1)
        p = mask_probability(config, u)
        # Rounding may bring p to 1, and floor(p L) + 1 would then be L + 1.
        counts = np.minimum(np.floor(p * eligible_counts).astype(np.int64) + 1, eligible_counts)
        # p'(u): with k tokens masked a token is masked with k/L, so that the weight is p'(u) over k/L.
        slope = elbo_weight(config, u) * p
        return counts, slope * eligible_counts / np.maximum(counts, 1)
    if config.schedule == "linear":
        thresholds = linear_threshold(u_levels, config.eps)
        return thresholds, 2.0**32 / thresholds
    # Never below eps: a weight of 1/p would have no finite variance.
    t = (1 - config.eps) * u + config.eps
    thresholds = np.rint(mask_probability(config, t) * 2.0**32).astype(np.int64)
    return thresholds, elbo_weight(config, t)


def pair_levels_and_weights(
    config: DiffusionConfig, u_levels: np.ndarray, eligible_counts: np.ndarray, complement: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Count and ELBO weight of the rows of complementary pairs.

    The first row of a pair masks k = floor(p(u) (L + 1)) of its L eligible tokens, 0 to L, with the weight
    p'(u) (L + 1) / k, and the second the other L - k, with p'(u) (L + 1) / (L - k). Each row alone is unbiased: with p
    uniform its count is uniform on 0..L, and the L counts above 0 then add up to the ELBO. (With k uniform on 1..L the
    second row would be biased.)

    Args:
        config: schedule and its parameters.
        u_levels: [batch] int64, levels U of `noise_levels.draw_pairs`, equal within a pair.
        eligible_counts: [batch] int64, L, equal within a pair.
        complement: [batch] bool, whether a row is the second of its pair.

    Returns:
        k [batch] int64 (of the first row, for both rows), and weights [batch] float64, 0 where nothing is masked.
    """
    u = _uniform(u_levels)
    if config.schedule == "linear":
        counts, slope = linear_pair_count(u_levels, eligible_counts), np.ones(len(u))
    else:
        p = mask_probability(config, u)
        counts = np.minimum(np.floor(p * (eligible_counts + 1)).astype(np.int64), eligible_counts)
        slope = elbo_weight(config, u) * p
    # Each row has the weight of what it masks itself; one of them may mask nothing.
    masked = np.where(complement, eligible_counts - counts, counts)
    return counts, np.where(masked > 0, slope * (eligible_counts + 1) / np.maximum(masked, 1), 0.0)


def _uniform(u_levels: np.ndarray) -> np.ndarray:
    return (u_levels + 0.5) * 2.0**-32


def _sigma(config: DiffusionConfig, t: Any) -> Any:
    return config.sigma_min * (config.sigma_max / config.sigma_min) ** t
