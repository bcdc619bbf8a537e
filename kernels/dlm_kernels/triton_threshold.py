"""Device functions: the search for the key that separates the tokens with the smallest keys from the others.

Each pass counts the keys below four candidates and waits for a sum over the whole program; bit by bit there would be 32
of them. As keys are uniform, the first candidates can be placed well: about sqrt(tokens) keys stay in the bracket, and
each further pass leaves a fifth. The search is over when `low` separates the selected keys from the others: simulated
at 4096 tokens, after 3.6 passes on average and 6.4 for the slowest of 32 rows; with any keys at all, after at most 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dlm_kernels.philox import MASK32

_ALL_ONES = tl.constexpr(MASK32)


@triton.jit
def first_candidates(count, eligible):
    """Four uint32 among which the threshold probably is: keys are uniform, so its distribution is known.

    Whatever this returns, the search ends at the same threshold.
    """
    # The expected k-th smallest of n uniform keys, and candidates at its sides: the first pass narrows to a few keys.
    p = (count + 0.5) / (eligible + 1.0)
    gap = 1.5 * tl.sqrt(p * (1.0 - p) / (eligible + 1.0))
    return _scaled(p - 1.5 * gap), _scaled(p - 0.5 * gap), _scaled(p + 0.5 * gap), _scaled(p + 1.5 * gap)


@triton.jit
def _scaled(p):
    # The largest float32 below 2**32 is 2**32 - 256.
    return tl.minimum(tl.maximum(p * 4294967296.0, 0.0), 4294967040.0).to(tl.uint32)


@triton.jit
def is_below(keys, c0, c1, c2, c3):
    """Whether each key is below each of four candidates: an int64 with a bit in each of four fields of 16 bits.

    So one sum, most of whose cost is waiting, answers four questions; there must be fewer than 2**15 keys.
    """
    # Two counts share an int32 and two of those an int64; no field can carry into the next.
    low = (keys < c0).to(tl.int32) + ((keys < c1).to(tl.int32) << 16)
    high = (keys < c2).to(tl.int32) + ((keys < c3).to(tl.int32) << 16)
    return low.to(tl.int64) + (high.to(tl.int64) << 32)


@triton.jit
def unpacked(counts):
    """The four numbers in a sum of `is_below`, int32."""
    low, high = counts.to(tl.int32), (counts >> 32).to(tl.int32)
    return low & 0xFFFF, low >> 16, high & 0xFFFF, high >> 16


@triton.jit
def narrow(n0, n1, n2, n3, c0, c1, c2, c3, count, low, top, below):
    """Move the bracket [low, top] of the threshold, given that n0 keys are below the candidate c0, and so on.

    The threshold is the largest uint32 with at most `count` keys below it; `below` is the number of keys below `low`.
    The new candidates divide the bracket evenly and are all above `low`, so that every step narrows it.
    """
    # The highest candidate with at most `count` keys below it is the new lower end ...
    below = tl.where(n0 <= count, n0, below)
    below = tl.where(n1 <= count, n1, below)
    below = tl.where(n2 <= count, n2, below)
    below = tl.where(n3 <= count, n3, below)
    low = tl.where(n0 <= count, c0, low)
    low = tl.where(n1 <= count, c1, low)
    low = tl.where(n2 <= count, c2, low)
    low = tl.where(n3 <= count, c3, low)
    # ... and the lowest with more is the upper one.
    top = tl.where(n3 > count, c3 - 1, top)
    top = tl.where(n2 > count, c2 - 1, top)
    top = tl.where(n1 > count, c1 - 1, top)
    top = tl.where(n0 > count, c0 - 1, top)
    # By the high half of a product: a division of uint32 would cost more.
    width = top - low
    fifth: tl.constexpr = (1 << 32) // 5
    c0 = low + 1 + tl.umulhi(width, fifth)
    c1 = low + 1 + tl.umulhi(width, 2 * fifth)
    c2 = low + 1 + tl.umulhi(width, 3 * fifth)
    c3 = low + 1 + tl.umulhi(width, 4 * fifth)
    return low, top, below, c0, c1, c2, c3
