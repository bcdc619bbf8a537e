"""Counter-based random numbers: Philox4x32-10 on numpy arrays, torch tensors and Python ints, bit for bit the same.

Every random decision of a run is a pure function of (seed, stream, counter), so it does not depend on the layout, on
the micro-batch size, or on what was computed before, and resuming needs no generator state.

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

MASK32 = 0xFFFFFFFF
TOKEN_POSITION_BITS = 22

# Multipliers minus 2**32: the product of one with a uint32 fits in a signed 64-bit integer, so nothing ever wraps.
_MULTIPLIER_A = 0xD2511F53 - 2**32
_MULTIPLIER_B = 0xCD9E8D57 - 2**32
_WEYL_A = 0x9E3779B9
_WEYL_B = 0xBB67AE85
_ROUNDS = 10

# Two passes with a rotation after each: a single Feistel network of 12 rounds over 3 bits is visibly not uniform.
_PERMUTATION_PASSES = 2
_PERMUTATION_ROUNDS = 8
_MIX_A = 0x85EBCA6B - 2**32
_MIX_B = 0xC2B2AE35 - 2**32

Integers = TypeVar("Integers", int, np.ndarray, Tensor)


class Stream(IntEnum):
    """What a random number is for. Two streams never share a counter."""

    TOKEN_KEY = 0
    NOISE_LEVEL = 1
    STRATUM = 2
    FLIP = 3
    RANDOM_LENGTH = 4
    INPUT_MASK = 5
    DATA_OFFSET = 6
    DATA_ORDER = 7
    BLEND = 8
    DOCUMENT_SHUFFLE = 9
    INITIALIZATION = 10
    DROPOUT = 11
    SAMPLING = 12


class Purpose(IntEnum):
    """Separates the random numbers of training from those of validation."""

    TRAIN = 0
    VALIDATION = 1


def philox4x32(seed: int, c0: Any, c1: Any = 0, c2: Any = 0, c3: Any = 0) -> tuple[Any, Any, Any, Any]:
    """Philox4x32 with 10 rounds.

    Args:
        seed: key, 64 bits.
        c0, c1, c2, c3: the counter, uint32 values held in int64 arrays, int64 tensors or ints; they broadcast.

    Returns:
        Four words of the broadcast shape, uint32 values held in int64.

    Raises:
        TypeError: an array or tensor is not int64.
    """
    for counter in (c0, c1, c2, c3):
        _require_int64(counter)
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(_ROUNDS):
        # Both words of two 64-bit products. The multipliers lack 2**32, so the high words lack c0 and c2, added below.
        product_a = c0 * _MULTIPLIER_A
        product_b = c2 * _MULTIPLIER_B
        c0, c1, c2, c3 = (
            ((product_b >> 32) + c2) ^ c1 ^ k0,
            product_b & MASK32,
            ((product_a >> 32) + c0) ^ c3 ^ k1,
            product_a & MASK32,
        )
        k0 = (k0 + _WEYL_A) & MASK32
        k1 = (k1 + _WEYL_B) & MASK32
    return c0, c1, c2, c3


def random_words(
    seed: int, stream: Stream, counter: Any, step: int = 0, purpose: Purpose = Purpose.TRAIN
) -> tuple[Any, Any, Any, Any]:
    """Four independent uint32 words (held in int64) for each non-negative 64-bit `counter`, of its shape."""
    _require_int64(counter)
    return philox4x32(seed, counter & MASK32, counter >> 32, step, (purpose << 16) | stream)


def random_bits(
    seed: int, stream: Stream, counter: Integers, step: int = 0, purpose: Purpose = Purpose.TRAIN
) -> Integers:
    """One uint32 value (held in int64) for each non-negative 64-bit `counter`, of its shape and kind.

    Args:
        seed: 64 bits.
        stream: what the numbers are for.
        counter: int, or int64 array or tensor; for tokens see `token_counter`.
        step: below 2**32; 0 where the counter alone identifies the number.
        purpose: training or validation.
    """
    return random_words(seed, stream, counter, step, purpose)[0]


def token_counter(sample_id: Any, position: Any) -> Any:
    """Counter of the token at `position` (below 2**22) of the sequence `sample_id` (below 2**41); they broadcast."""
    return sample_id * (1 << TOKEN_POSITION_BITS) + position


def permute(
    index: Integers, n: int, seed: int, stream: Stream, step: int = 0, purpose: Purpose = Purpose.TRAIN
) -> Integers:
    """Image of `index` under a keyed pseudo-random permutation of [0, n): random access, no memory.

    Each of two passes is an unbalanced Feistel network over ceil(log2 n) bits, walked along its cycles until it lands
    in [0, n), followed by a keyed rotation modulo n, which makes the image of any one index uniform over the keys.

    Args:
        index: int, or int64 array or tensor, all in [0, n).
        n: size of the permuted set, 1 <= n < 2**48.
        seed, stream, step, purpose: the key, as in `random_bits`; `n` is part of it too.

    Raises:
        ValueError: n is out of range.
    """
    if not 1 <= n < 2**48:
        raise ValueError(f"permute needs 1 <= n < 2**48, got {n}")
    _require_int64(index)
    c3 = (purpose << 16) | stream
    # Round keys and turns are words of Philox blocks of their own; n is in the counter, so sizes do not share keys.
    keys: list[int] = []
    for block in range(_PERMUTATION_PASSES * (_PERMUTATION_ROUNDS + 2) // 4):
        keys += philox4x32(seed, block | (n >> 32) << 8, n & MASK32, step, c3)
    # Fewer than half of the images are outside [0, n), so walking on takes two rounds at most on average.
    bits = (n - 1).bit_length()
    image: Any = index
    for _ in range(_PERMUTATION_PASSES):
        # 64 bits modulo n below 2**48: the bias is below 2**-16, and the next pass stirs it.
        rotation = (keys.pop() << 32 | keys.pop()) % n
        rounds = [keys.pop() for _ in range(_PERMUTATION_ROUNDS)]
        image = (_walk(image, n, bits, rounds) + rotation) % n
    return image


def _walk(index: Any, n: int, bits: int, keys: list[int]) -> Any:
    """Apply the Feistel network until the image lies in [0, n)."""
    image = _feistel(index, bits, keys)
    if isinstance(image, (int, np.integer)):
        while image >= n:
            image = _feistel(image, bits, keys)
        return image
    # Only the elements that are still outside go on: fewer and fewer.
    outside = image >= n
    while outside.any():
        image[outside] = _feistel(image[outside], bits, keys)
        outside = image >= n
    return image


def _feistel(index: Any, bits: int, keys: list[int]) -> Any:
    """A keyed bijection of [0, 2**bits): the two parts of the index take turns in being changed by the other."""
    # Two parts that differ by one bit where their number is odd; each round is undone by itself, so this is a
    # bijection.
    low_bits = (bits + 1) // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    low, high = index & low_mask, index >> low_bits
    for i in range(0, len(keys), 2):
        high = high ^ (_mix(low ^ keys[i]) & high_mask)
        low = low ^ (_mix(high ^ keys[i + 1]) & low_mask)
    return high * (1 << low_bits) + low


def _mix(word: Any) -> Any:
    """Avalanche of a uint32 held in int64 (the finaliser of MurmurHash3)."""
    word = ((word ^ (word >> 16)) * _MIX_A) & MASK32
    word = ((word ^ (word >> 13)) * _MIX_B) & MASK32
    return word ^ (word >> 16)


def _require_int64(value: Any) -> None:
    if not isinstance(value, int) and str(value.dtype) not in ("int64", "torch.int64"):
        raise TypeError(f"random numbers need int64 counters, got {value.dtype}: convert with .to(torch.int64)")
