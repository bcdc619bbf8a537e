"""Noise levels of a global batch, and the linear schedule, in integers.

A level u in (0, 1) is held as the uint32 U with u = (U + 1/2) / 2**32. Its complement 1 - u is then exactly ~U, so an
antithetic pair of sequences of equal length L masks exactly L + 1 tokens. Host, reference and kernels compute the same
integers, so shapes are known on the host without reading anything back from the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dlm_kernels.philox import MASK32, Integers, Purpose, Stream, permute, random_bits
from dlm_kernels.types import NoiseMode


def draw(
    sample_ids: Integers,
    mode: NoiseMode,
    *,
    seed: int,
    step: int,
    global_batch_size: int,
    purpose: Purpose = Purpose.TRAIN,
) -> Integers:
    """Noise levels of the given sequences of one global batch; any subset of the batch may be asked for.

    Modes, for B sequences in the global batch:

    - `stratified_antithetic`: neighbours form B // 2 pairs; the pair with stratum p (a keyed permutation, fresh each
      step) draws u in [p / B, (p + 1) / B), and a keyed bit says which row takes u and which 1 - u. For odd B the row
      left over draws from the middle, [(B - 1) / 2B, (B + 1) / 2B); the row that is left over rotates by key, so that
      every row's level stays uniform over the steps.
    - `stratified`: one jittered level per stratum [p / B, (p + 1) / B), in permuted order.
    - `antithetic`: neighbours take u and 1 - u.
    - `iid`: independent levels.

    Args:
        sample_ids: int, or int64 array or tensor; position in the global batch = sample id - step * global_batch_size.
        mode: see above.
        seed: 64 bits.
        step: training step; 0 for validation, whose sample ids are indices in the set.
        global_batch_size: B, or the number of sequences in the validation set.
        purpose: training or validation.

    Returns:
        Levels U in [0, 2**32), of the shape and kind of `sample_ids`.

    Raises:
        ValueError: a sample id is not in the global batch of `step`, or the mode is unknown.
    """
    size = global_batch_size
    # Sample ids count through the run, so their place in the batch needs no layout.
    position: Any = sample_ids - step * size
    _require_inside(position, size, step)
    if mode == "iid":
        return random_bits(seed, Stream.NOISE_LEVEL, position, step, purpose)
    if mode == "stratified":
        stratum = permute(position, size, seed, Stream.STRATUM, step, purpose)
        # (stratum + jitter) / size in integers: below 2**31 * 2**32, no overflow, and the same on every device.
        return (stratum * (1 << 32) + random_bits(seed, Stream.NOISE_LEVEL, position, step, purpose)) // size
    if mode == "antithetic":
        level = random_bits(seed, Stream.NOISE_LEVEL, position >> 1, step, purpose)
        # The odd neighbour takes the complement, 1 - u, which is every bit flipped.
        return level ^ ((position & 1) * MASK32)
    if mode != "stratified_antithetic":
        raise ValueError(f"unknown noise level mode {mode!r}")

    # In an odd batch one row is left over, another one every step: the places are rotated by a keyed number.
    if size % 2:
        position = (position + permute(0, size, seed, Stream.STRATUM, step, purpose)) % size
    pairs, pair = size // 2, position >> 1
    stratum = permute(pair % max(pairs, 1), max(pairs, 1), seed, Stream.STRATUM, step, purpose)
    # That row's stratum is the middle one, whose upper half is its own complement.
    stratum = stratum + (pair == pairs) * (pairs - stratum)
    # stratum * 2**32 + jitter is uniform over [0, B * 2**32) and its complement there is B times the complement of U.
    level = (stratum * (1 << 32) + random_bits(seed, Stream.NOISE_LEVEL, pair, step, purpose)) // size
    flip = random_bits(seed, Stream.FLIP, pair, step, purpose) & 1
    return level ^ (((position & 1) ^ flip) * MASK32)


def draw_pairs(
    sample_ids: Integers,
    mode: NoiseMode,
    *,
    seed: int,
    step: int,
    global_batch_size: int,
    purpose: Purpose = Purpose.TRAIN,
) -> Integers:
    """Noise levels of complementary pairs: rows 2j and 2j + 1 of the global batch get the same level.

    The antithetic modes take the even row's level of `draw` over all B rows: what the odd row would take is what a
    complement has anyway. The others draw over the B / 2 pairs.

    Args:
        sample_ids, mode, seed, step, global_batch_size, purpose: as for `draw`; global_batch_size counts rows.

    Raises:
        ValueError: as `draw`, or the global batch size is odd.
    """
    if global_batch_size % 2:
        raise ValueError(f"complementary pairs need an even global batch, not {global_batch_size} rows")
    pairs: Any = sample_ids >> 1
    if mode in ("stratified_antithetic", "antithetic"):
        return draw(pairs * 2, mode, seed=seed, step=step, global_batch_size=global_batch_size, purpose=purpose)
    return draw(pairs, mode, seed=seed, step=step, global_batch_size=global_batch_size // 2, purpose=purpose)


def linear_count(levels: Any, eligible: Any) -> Any:
    """Exact-count masking, linear schedule: k = floor(u * L) + 1 of L = `eligible` tokens (below 2**22); 0 of none."""
    return (((2 * levels + 1) * eligible) >> 33) + (eligible > 0) * 1


def linear_pair_count(levels: Any, eligible: Any) -> Any:
    """Complementary pairs, linear schedule: k = floor(u * (L + 1)) in 0..L of L = `eligible` tokens (below 2**22).

    The first row masks k tokens and the second the other L - k, so that both counts are uniform on 0..L.
    """
    return ((2 * levels + 1) * (eligible + 1)) >> 33


def linear_threshold(levels: Any, eps: float) -> Any:
    """Bernoulli masking, linear schedule: p = (1 - eps) u + eps as the integer p * 2**32, rounded, in [1, 2**32].

    A token is masked where its 32-bit key is below the threshold.

    Raises:
        ValueError: eps is not in [0, 0.25), where the integer arithmetic cannot overflow.
    """
    if not 0 <= eps < 0.25:
        raise ValueError(f"eps must be in [0, 0.25), got {eps}")
    floor = max(round(eps * 2**32), 1)
    return levels + floor + 1 + ((-(2 * levels + 1) * floor) >> 33)


def _require_inside(position: Any, size: int, step: int) -> None:
    if torch.is_tensor(position):
        if position.is_cuda or position.numel() == 0:  # reading a device value back would stall the step
            return
    elif np.size(position) == 0:
        return
    low, high = (position, position) if isinstance(position, int) else (int(position.min()), int(position.max()))
    if low < 0 or high >= size:
        first = step * size
        raise ValueError(
            f"sample ids {first + low}..{first + high} are not all in the global batch of step {step} "
            f"({first}..{first + size - 1}): pass the step and global batch size they belong to"
        )
