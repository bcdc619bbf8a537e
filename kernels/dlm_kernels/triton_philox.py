"""Device functions with the bits of `dlm_kernels.philox` and `dlm_kernels.noise_levels`.

The seed travels as two uint32 words, counters as int64; every function works on scalars and on blocks, if it does not
say otherwise. The constants are those of the plain-torch twins.
"""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from dlm_kernels import philox
from dlm_kernels.philox import MASK32, TOKEN_POSITION_BITS, Stream

_MULTIPLIER_A = tl.constexpr(philox._MULTIPLIER_A & MASK32)
_MULTIPLIER_B = tl.constexpr(philox._MULTIPLIER_B & MASK32)
_WEYL_A = tl.constexpr(philox._WEYL_A)
_WEYL_B = tl.constexpr(philox._WEYL_B)
_ROUNDS = tl.constexpr(philox._ROUNDS)
_MIX_A = tl.constexpr(philox._MIX_A & MASK32)
_MIX_B = tl.constexpr(philox._MIX_B & MASK32)
_POSITION_BITS = tl.constexpr(TOKEN_POSITION_BITS)
_TOKEN_KEY = tl.constexpr(int(Stream.TOKEN_KEY))
_NOISE_LEVEL = tl.constexpr(int(Stream.NOISE_LEVEL))
_STRATUM = tl.constexpr(int(Stream.STRATUM))
_FLIP = tl.constexpr(int(Stream.FLIP))
_ALL_ONES = tl.constexpr(MASK32)

# `permute` spells out which words of five Philox blocks are the keys of which round.
assert (philox._PERMUTATION_PASSES, philox._PERMUTATION_ROUNDS) == (2, 8)


@triton.jit
def philox4x32(seed_low, seed_high, c0, c1, c2, c3):
    """Philox4x32-10 of uint32 seed words and counters, which broadcast; four uint32 words.

    Counters of another width would make other bits without a complaint, hence the check.
    """
    tl.static_assert(c0.dtype == tl.uint32 and c1.dtype == tl.uint32)
    tl.static_assert(c2.dtype == tl.uint32 and c3.dtype == tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        # The high half of a product is an instruction here, so the multipliers are whole.
        a = c0
        b = c2
        c0 = tl.umulhi(b, _MULTIPLIER_B) ^ c1 ^ seed_low
        c1 = b * _MULTIPLIER_B
        c2 = tl.umulhi(a, _MULTIPLIER_A) ^ c3 ^ seed_high
        c3 = a * _MULTIPLIER_A
        seed_low = seed_low + _WEYL_A
        seed_high = seed_high + _WEYL_B
    return c0, c1, c2, c3


@triton.jit
def random_bits(seed_low, seed_high, counter, step, STREAM: tl.constexpr, PURPOSE: tl.constexpr):
    """`philox.random_bits`: one uint32 for each int64 `counter`; `step` is int64."""
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    third = step.to(tl.uint32)
    fourth = tl.full((), PURPOSE << 16, tl.uint32) | STREAM
    word, _, _, _ = philox4x32(seed_low, seed_high, low, high, third, fourth)
    return word


@triton.jit
def token_keys(seed_low, seed_high, sample_id, position, PURPOSE: tl.constexpr):
    """uint32 keys of the tokens at int32 `position` of the sequence with the int64 scalar `sample_id`.

    A position never carries into the high word of the counter, which therefore is one scalar for all tokens, and the
    compiler drops the part of the first two rounds that does not depend on the position.
    """
    # The two words of `philox.token_counter`, made from 32-bit pieces.
    low = (sample_id.to(tl.uint32) << _POSITION_BITS) | position.to(tl.uint32)
    high = (sample_id >> (32 - _POSITION_BITS)).to(tl.uint32)
    third = tl.full((), 0, tl.uint32)
    fourth = tl.full((), PURPOSE << 16, tl.uint32) | _TOKEN_KEY
    key, _, _, _ = philox4x32(seed_low, seed_high, low, high, third, fourth)
    return key


@triton.jit
def bit_length(value):
    """Bits of a non-negative int64 scalar, int32; 0 of 0."""
    lane = tl.arange(0, 32).to(tl.int64)
    # Each lane looks at two of the 64 bits: as many are reached as the number is long.
    reached = ((value >> lane) > 0).to(tl.int32) + ((value >> (lane + 32)) > 0).to(tl.int32)
    return tl.sum(reached, axis=0)


@triton.jit
def permute(index, n, seed_low, seed_high, step, STREAM: tl.constexpr, PURPOSE: tl.constexpr):
    """`philox.permute` of a block of int64, all in [0, n): another index might be walked along for ever.

    Args:
        index: [block] int64.
        n: int64 scalar, 1 <= n < 2**48.
        step: int64 scalar.
    """
    # Lane i computes block i of the keys: as scalars, every thread would go through all five blocks.
    lane = tl.arange(0, 32)
    first = ((n >> 32) << 8).to(tl.uint32) | lane.to(tl.uint32)
    fourth = tl.full((), PURPOSE << 16, tl.uint32) | STREAM
    w0, w1, w2, w3 = philox4x32(seed_low, seed_high, first, n.to(tl.uint32), step.to(tl.uint32), fourth)
    bits = bit_length(n - 1)
    image = _walk_and_rotate(
        index,
        n,
        bits,
        _of_lane(w3, lane, 4),
        _of_lane(w2, lane, 4),
        _of_lane(w1, lane, 4),
        _of_lane(w0, lane, 4),
        _of_lane(w3, lane, 3),
        _of_lane(w2, lane, 3),
        _of_lane(w1, lane, 3),
        _of_lane(w0, lane, 3),
        _of_lane(w3, lane, 2),
        _of_lane(w2, lane, 2),
    )
    return _walk_and_rotate(
        image,
        n,
        bits,
        _of_lane(w1, lane, 2),
        _of_lane(w0, lane, 2),
        _of_lane(w3, lane, 1),
        _of_lane(w2, lane, 1),
        _of_lane(w1, lane, 1),
        _of_lane(w0, lane, 1),
        _of_lane(w3, lane, 0),
        _of_lane(w2, lane, 0),
        _of_lane(w1, lane, 0),
        _of_lane(w0, lane, 0),
    )


@triton.jit
def _of_lane(word, lane, LANE: tl.constexpr):
    """The scalar that one lane of `word` holds."""
    return tl.sum(tl.where(lane == LANE, word, 0), axis=0)


@triton.jit
def _walk_and_rotate(index, n, bits, high_turn, low_turn, k0, k1, k2, k3, k4, k5, k6, k7):
    """Apply the Feistel network until every image lies in [0, n); then add the turn modulo n."""
    image = index
    # At first all of them; later only those that are still out of range.
    outside = index >= 0
    while tl.max(outside.to(tl.int32), axis=0) > 0:
        image = tl.where(outside, _feistel(image, bits, k0, k1, k2, k3, k4, k5, k6, k7), image)
        outside = image >= n
    turn = (high_turn.to(tl.uint64) << 32) | low_turn.to(tl.uint64)
    # 64 bits of turn, as unsigned: a signed remainder could be negative.
    image += (turn % n.to(tl.uint64)).to(tl.int64)
    return tl.where(image >= n, image - n, image)


@triton.jit
def _feistel(index, bits, k0, k1, k2, k3, k4, k5, k6, k7):
    """The keyed bijection of [0, 2**bits) of `philox._feistel`, bits <= 48."""
    low_bits = (bits + 1) // 2
    one = tl.full((), 1, tl.int64)
    low_mask = ((one << low_bits) - 1).to(tl.uint32)
    high_mask = ((one << (bits - low_bits)) - 1).to(tl.uint32)
    low = index.to(tl.uint32) & low_mask
    high = (index >> low_bits).to(tl.uint32)
    high ^= _mix(low ^ k0) & high_mask
    low ^= _mix(high ^ k1) & low_mask
    high ^= _mix(low ^ k2) & high_mask
    low ^= _mix(high ^ k3) & low_mask
    high ^= _mix(low ^ k4) & high_mask
    low ^= _mix(high ^ k5) & low_mask
    high ^= _mix(low ^ k6) & high_mask
    low ^= _mix(high ^ k7) & low_mask
    return (high.to(tl.int64) << low_bits) + low.to(tl.int64)


@triton.jit
def _mix(word):
    """Avalanche of a uint32."""
    word = (word ^ (word >> 16)) * _MIX_A
    word = (word ^ (word >> 13)) * _MIX_B
    return word ^ (word >> 16)


@triton.jit
def noise_level(
    sample_ids, size, seed_low, seed_high, step, MODE: tl.constexpr, ODD: tl.constexpr, PURPOSE: tl.constexpr
):
    """`noise_levels.draw`: int64 levels in [0, 2**32) of a block of int64 sample ids.

    An id that is not in the global batch gets the level of some other row, so that lanes without a row do no harm.

    Args:
        sample_ids: [block] int64.
        size: int64 scalar, sequences in the global batch, below 2**31.
        step: int64 scalar.
        MODE: a `NoiseMode`.
        ODD: whether `size` is odd; the even case then needs no second permutation.
    """
    position = sample_ids - step * size
    # A lane without a row must stay in range, or its walk would have no end.
    position = tl.where((position >= 0) & (position < size), position, 0)
    if MODE == "iid":
        level = random_bits(seed_low, seed_high, position, step, _NOISE_LEVEL, PURPOSE).to(tl.int64)
    elif MODE == "antithetic":
        level = random_bits(seed_low, seed_high, position >> 1, step, _NOISE_LEVEL, PURPOSE).to(tl.int64)
        level ^= (position & 1) * _ALL_ONES
    elif MODE == "stratified":
        stratum = permute(position, size, seed_low, seed_high, step, _STRATUM, PURPOSE)
        level = _jittered(stratum, position, size, seed_low, seed_high, step, PURPOSE)
    else:
        tl.static_assert(MODE == "stratified_antithetic", "unknown noise level mode")
        if ODD:
            left_over = permute(position * 0, size, seed_low, seed_high, step, _STRATUM, PURPOSE)
            position += left_over
            position = tl.where(position >= size, position - size, position)
        pairs = size >> 1
        pair = position >> 1
        domain = tl.maximum(pairs, 1)
        stratum = permute(tl.where(pair < pairs, pair, 0), domain, seed_low, seed_high, step, _STRATUM, PURPOSE)
        stratum = tl.where(pair < pairs, stratum, pairs)
        level = _jittered(stratum, pair, size, seed_low, seed_high, step, PURPOSE)
        flip = random_bits(seed_low, seed_high, pair, step, _FLIP, PURPOSE).to(tl.int64)
        level ^= ((position ^ flip) & 1) * _ALL_ONES
    return level


@triton.jit
def _jittered(stratum, counter, size, seed_low, seed_high, step, PURPOSE: tl.constexpr):
    """A level in [stratum / size, (stratum + 1) / size)."""
    jitter = random_bits(seed_low, seed_high, counter, step, _NOISE_LEVEL, PURPOSE)
    scaled = (stratum.to(tl.uint64) << 32) + jitter.to(tl.uint64)
    return (scaled // size.to(tl.uint64)).to(tl.int64)


@triton.jit
def linear_count(level, eligible):
    """`noise_levels.linear_count` of int64."""
    return (((2 * level + 1) * eligible) >> 33) + (eligible > 0).to(tl.int64)


@triton.jit
def linear_pair_count(level, eligible):
    """`noise_levels.linear_pair_count` of int64."""
    return ((2 * level + 1) * (eligible + 1)) >> 33


@triton.jit
def linear_threshold(level, floor):
    """`noise_levels.linear_threshold` of int64, given the threshold `floor` of level 0 instead of eps."""
    return level + floor + 1 + ((-(2 * level + 1) * floor) >> 33)
