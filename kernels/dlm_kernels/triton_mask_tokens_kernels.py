"""Device code of `dlm_kernels.triton_mask_tokens`.

Names in capitals are pointers, or constants of the compilation. A pointer that is None leaves its case out of the
compiled kernel. Token indices are flat, in int64; counts of tokens fit in int32.
"""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from dlm_kernels.philox import MASK32, TOKEN_POSITION_BITS
from dlm_kernels.triton_philox import linear_count, linear_threshold, noise_level, token_keys
from dlm_kernels.triton_threshold import first_candidates, is_below, narrow, unpacked

_ALL_ONES = tl.constexpr(MASK32)
_TWO_TO_32 = tl.constexpr(2.0**32)
_POSITION_BITS = tl.constexpr(TOKEN_POSITION_BITS)
_TILE = tl.constexpr(1024)  # counts of blocks that are added up at a time

# What may change from call to call: specialising on it would compile again and again.
CHANGING = ("batch", "first_id", "capacity", "mask_token_id", "seed_low", "seed_high", "step", "size", "floor")


@triton.jit
def _sample_ids(rows, SAMPLE_IDS, first_id):
    """int64 sample ids of a row, or of a block of rows: loaded, or consecutive from `first_id`."""
    if SAMPLE_IDS is None:
        return first_id + rows.to(tl.int64)
    else:
        return tl.load(SAMPLE_IDS + rows).to(tl.int64)


@triton.jit
def _selected(
    rows, eligible, SAMPLE_IDS, LEVELS, first_id, seed_low, seed_high, step, size,
    MODE: tl.constexpr, ODD: tl.constexpr, PURPOSE: tl.constexpr,
):  # fmt: skip
    """Exact count: how many of the `eligible` tokens of each of a block of rows are selected, int32."""
    if MODE is None:
        level = tl.load(LEVELS + rows)
        count = tl.minimum(tl.maximum(level, 0), eligible)
    else:
        ids = _sample_ids(rows, SAMPLE_IDS, first_id)
        count = linear_count(noise_level(ids, size, seed_low, seed_high, step, MODE, ODD, PURPOSE), eligible)
    return count.to(tl.int32)


@triton.jit
def _keys(seed_low, seed_high, sample_id, position, can, PURPOSE: tl.constexpr):
    """Keys of the tokens that can be masked; all others get the largest key, which is below no candidate."""
    keys = token_keys(seed_low, seed_high, sample_id, position, PURPOSE)
    return tl.where(can, keys, _ALL_ONES)


@triton.jit
def _can_be_masked(ELIGIBLE, start, position, inside):
    """Which tokens of the row that starts at the flat index `start` are `inside` and eligible."""
    if ELIGIBLE is None:
        return inside
    else:
        return inside & (tl.load(ELIGIBLE + start + position, mask=inside, other=0) != 0)


@triton.jit
def _complement_of_row(COMPLEMENT, row):
    return tl.load(COMPLEMENT + row) != 0


@triton.jit
def _pairs(BLOCK: tl.constexpr):
    """0 to BLOCK - 1 as [BLOCK // 2, 2] int32.

    A thread that holds pairs of neighbours loads and stores their int64 tokens as 16 bytes. Taken apart into the even
    and the odd ones, they are where a scan and stores to the list want them, so that nothing moves between threads.
    """
    return 2 * tl.arange(0, BLOCK // 2)[:, None] + tl.arange(0, 2)[None, :]


@triton.jit
def _known_even(seq, EVEN: tl.constexpr):
    """`seq`; where it is even, the compiler sees it: only then do all rows begin at a multiple of 16 bytes."""
    if EVEN:
        return seq // 2 * 2
    else:
        return seq


@triton.jit
def _split_flags(flags):
    """`tl.split` of booleans."""
    even, odd = tl.split(flags.to(tl.int32))
    return even != 0, odd != 0


@triton.jit
def _running_counts(even, odd):
    """How many flags are set up to and including each even and each odd one, int32."""
    up_to_odd = tl.cumsum(even.to(tl.int32) + odd.to(tl.int32), axis=0)
    return up_to_odd - odd.to(tl.int32), up_to_odd


@triton.jit
def _write(
    NOISED, ROWS, TARGETS, ROW_WEIGHTS,
    tokens, start, position, inside, even, odd, before, weight, capacity, mask_token_id,
):  # fmt: skip
    """Store a block of noised tokens, and its chosen ones in the list after the `before` ones of earlier blocks.

    Args:
        tokens, position, inside: as `_pairs`.
        start: int64 scalar, the flat index of the first token of the row; `position` counts from there.
        even, odd: [BLOCK // 2] bool, which tokens are chosen.
    """
    even_token, odd_token = tl.split(tokens)
    noised = tl.join(tl.where(even, mask_token_id, even_token), tl.where(odd, mask_token_id, odd_token))
    tl.store(NOISED + start + position, noised, mask=inside)
    even_index, odd_index = tl.split(start.to(tl.int32) + position)
    even_count, odd_count = _running_counts(even, odd)
    _list(
        ROWS, TARGETS, ROW_WEIGHTS, before + even_count - 1, even, even_index, even_token, weight, capacity
    )  # fmt: skip
    _list(ROWS, TARGETS, ROW_WEIGHTS, before + odd_count - 1, odd, odd_index, odd_token, weight, capacity)


@triton.jit
def _list(ROWS, TARGETS, ROW_WEIGHTS, place, chosen, index, token, weight, capacity):
    """Store the chosen tokens at their places in the list, as far as it reaches."""
    listed = chosen & (place < capacity)
    tl.store(ROWS + place, index, mask=listed)
    tl.store(TARGETS + place, token, mask=listed)
    tl.store(ROW_WEIGHTS + place, tl.zeros(place.shape, tl.float32) + weight, mask=listed)


@triton.jit
def _finish(ROWS, TARGETS, ROW_WEIGHTS, OVERFLOW, COUNT, total, capacity, filler, BLOCK: tl.constexpr):
    """Fill the list beyond its `total` entries, all programs together; the first one stores what is known of it."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    first = total.to(tl.int64) + program.to(tl.int64) * BLOCK
    while first < capacity:
        place = first + lane
        beyond = place < capacity
        tl.store(ROWS + place, tl.zeros((BLOCK,), tl.int32) + filler.to(tl.int32), mask=beyond)
        tl.store(TARGETS + place, tl.zeros((BLOCK,), tl.int64), mask=beyond)
        tl.store(ROW_WEIGHTS + place, tl.zeros((BLOCK,), tl.float32), mask=beyond)
        first += tl.num_programs(0).to(tl.int64) * BLOCK
    if program == 0:
        tl.store(OVERFLOW, total > capacity)
        if COUNT is not None:
            tl.store(COUNT, total)


@triton.jit
def count_eligible(ELIGIBLE, ELIGIBLE_COUNTS, seq, BLOCK: tl.constexpr):
    """One program per row: how many of its tokens are eligible, int32."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * seq
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, seq, BLOCK):
        position = first + lane
        counts += _can_be_masked(ELIGIBLE, start, position, position < seq).to(tl.int32)
    tl.store(ELIGIBLE_COUNTS + row, tl.sum(counts, axis=0))


@triton.jit(do_not_specialize=CHANGING)
def mask_rows(
    TOKENS, ELIGIBLE, ELIGIBLE_COUNTS, SAMPLE_IDS, LEVELS, WEIGHTS, COMPLEMENT,
    NOISED, ROWS, TARGETS, ROW_WEIGHTS, OVERFLOW, COUNT,
    batch: tl.int32, seq, first_id: tl.int64, capacity: tl.int32, mask_token_id: tl.int64,
    seed_low: tl.int64, seed_high: tl.int64, step: tl.int64, size: tl.int64,
    MODE: tl.constexpr, ODD: tl.constexpr, PURPOSE: tl.constexpr,
    EVEN: tl.constexpr, BATCH_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Exact count, one program per row of at most BLOCK tokens, which stay in registers.

    Where a row's part of the list begins is the sum of what all earlier rows mask. Each program works that out for all
    rows by itself: by estimate about a microsecond of arithmetic, while another launch would cost one or two.
    """
    row = tl.program_id(0)
    seq = _known_even(seq, EVEN)
    seed_low, seed_high = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    before = tl.full((), 0, tl.int32)
    total = tl.full((), 0, tl.int32)
    count = tl.full((), 0, tl.int32)
    for first in range(0, batch, BATCH_BLOCK):
        valid = first + tl.arange(0, BATCH_BLOCK) < batch
        rows = tl.where(valid, first + tl.arange(0, BATCH_BLOCK), 0)  # lanes without a row look at the first one
        if ELIGIBLE is None:
            available = tl.full((BATCH_BLOCK,), 0, tl.int64) + seq
        else:
            available = tl.load(ELIGIBLE_COUNTS + rows).to(tl.int64)
        selected = _selected(
            rows, available, SAMPLE_IDS, LEVELS, first_id, seed_low, seed_high, step, size, MODE, ODD, PURPOSE
        )  # fmt: skip
        count += tl.sum(tl.where(valid & (rows == row), selected, 0), axis=0)
        if COMPLEMENT is not None:
            odd = tl.load(COMPLEMENT + rows) != 0
            selected = tl.where(odd, available.to(tl.int32) - selected, selected)
        before += tl.sum(tl.where(valid & (rows < row), selected, 0), axis=0)
        total += tl.sum(tl.where(valid, selected, 0), axis=0)

    eligible = tl.full((), 0, tl.int32) + seq
    if ELIGIBLE is not None:
        eligible = tl.load(ELIGIBLE_COUNTS + row)

    # The tokens arrive while the keys are made. Loaded before all else, they would make registers spill.
    position = _pairs(BLOCK)
    inside = position < seq
    start = row.to(tl.int64) * seq
    tokens = tl.load(TOKENS + start + position, mask=inside, other=0)
    can = _can_be_masked(ELIGIBLE, start, position, inside)
    sample_id = _sample_ids(row, SAMPLE_IDS, first_id)
    even_keys, odd_keys = tl.split(_keys(seed_low, seed_high, sample_id, position, can, PURPOSE))
    even_can, odd_can = _split_flags(can)

    low = tl.full((), 0, tl.uint32)
    top = tl.full((), _ALL_ONES, tl.uint32)
    below = tl.full((), 0, tl.int32)
    c0, c1, c2, c3 = first_candidates(count, eligible)
    while (below < count) & (low < top):
        below_any = is_below(even_keys, c0, c1, c2, c3) + is_below(odd_keys, c0, c1, c2, c3)
        n0, n1, n2, n3 = unpacked(tl.sum(below_any, axis=0))
        low, top, below, c0, c1, c2, c3 = narrow(n0, n1, n2, n3, c0, c1, c2, c3, count, low, top, below)
    even, odd = even_keys < low, odd_keys < low
    if below < count:  # several keys are equal at the threshold: the earlier positions go first
        even_tied, odd_tied = even_can & (even_keys == low), odd_can & (odd_keys == low)
        even_count, odd_count = _running_counts(even_tied, odd_tied)
        even = even | (even_tied & (even_count <= count - below))
        odd = odd | (odd_tied & (odd_count <= count - below))
    if COMPLEMENT is not None:
        flip = _complement_of_row(COMPLEMENT, row)
        even, odd = even_can & (even ^ flip), odd_can & (odd ^ flip)

    if MODE is None:
        weight = tl.load(WEIGHTS + row)
    else:
        weight = (eligible.to(tl.float64) / tl.maximum(count, 1).to(tl.float64)).to(tl.float32)
    _write(
        NOISED, ROWS, TARGETS, ROW_WEIGHTS,
        tokens, start, position, inside, even, odd, before, weight, capacity, mask_token_id,
    )  # fmt: skip
    _finish(ROWS, TARGETS, ROW_WEIGHTS, OVERFLOW, COUNT, total, capacity, batch.to(tl.int64) * seq, BLOCK)


@triton.jit(do_not_specialize=CHANGING)
def select_rows(
    ELIGIBLE, SAMPLE_IDS, LEVELS, LIMITS, WEIGHTS,
    seq, first_id: tl.int64, seed_low: tl.int64, seed_high: tl.int64, step: tl.int64, size: tl.int64,
    MODE: tl.constexpr, ODD: tl.constexpr, PURPOSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Exact count in rows of any length: the limit below which the (key, position) of a masked token lies.

    One program per row goes through it block by block, once per pass, making the keys anew. With MODE it stores the
    weight of the row, too.
    """
    row = tl.program_id(0)
    seed_low, seed_high = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    start = row.to(tl.int64) * seq
    lane = tl.arange(0, BLOCK)
    sample_id = _sample_ids(row, SAMPLE_IDS, first_id)
    eligible = tl.full((), 0, tl.int32) + seq
    if ELIGIBLE is not None:
        seen = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, seq, BLOCK):
            position = first + lane
            seen += _can_be_masked(ELIGIBLE, start, position, position < seq).to(tl.int32)
        eligible = tl.sum(seen, axis=0)
    # All lanes of a block hold this row: `noise_level` wants a block.
    rows = tl.zeros((32,), tl.int32) + row
    selected = _selected(
        rows, eligible.to(tl.int64), SAMPLE_IDS, LEVELS, first_id, seed_low, seed_high, step, size,
        MODE, ODD, PURPOSE,
    )  # fmt: skip
    count = tl.max(selected, axis=0)

    low = tl.full((), 0, tl.uint32)
    top = tl.full((), _ALL_ONES, tl.uint32)
    below = tl.full((), 0, tl.int32)
    c0, c1, c2, c3 = first_candidates(count, eligible)
    while (below < count) & (low < top):
        n0 = tl.full((), 0, tl.int32)
        n1 = tl.full((), 0, tl.int32)
        n2 = tl.full((), 0, tl.int32)
        n3 = tl.full((), 0, tl.int32)
        for first in range(0, seq, BLOCK):
            position = first + lane
            can = _can_be_masked(ELIGIBLE, start, position, position < seq)
            keys = _keys(seed_low, seed_high, sample_id, position, can, PURPOSE)
            m0, m1, m2, m3 = unpacked(tl.sum(is_below(keys, c0, c1, c2, c3), axis=0))
            n0 += m0
            n1 += m1
            n2 += m2
            n3 += m3
        low, top, below, c0, c1, c2, c3 = narrow(n0, n1, n2, n3, c0, c1, c2, c3, count, low, top, below)

    limit = low.to(tl.int64) << _POSITION_BITS
    if below < count:  # several keys are equal at the threshold: the limit is behind the last one that is taken
        missing = count - below
        for first in range(0, seq, BLOCK):
            position = first + lane
            can = _can_be_masked(ELIGIBLE, start, position, position < seq)
            keys = token_keys(seed_low, seed_high, sample_id, position, PURPOSE)
            tied = ((keys == low) & can).to(tl.int32)
            last = tl.where((tied > 0) & (tl.cumsum(tied, axis=0) == missing), position + 1, 0)
            limit += tl.max(last, axis=0).to(tl.int64)
            missing -= tl.sum(tied, axis=0)
    tl.store(LIMITS + row, limit)
    if MODE is not None:
        weight = (eligible.to(tl.float64) / tl.maximum(count, 1).to(tl.float64)).to(tl.float32)
        tl.store(WEIGHTS + row, weight)


@triton.jit
def _chosen_below(limit, seed_low, seed_high, sample_id, position, can, COMPLEMENT, row, PURPOSE: tl.constexpr):
    """Which tokens are masked: those whose (key, position), as one integer, is below the limit; or the others."""
    keys = token_keys(seed_low, seed_high, sample_id, position, PURPOSE)
    chosen = ((keys.to(tl.int64) << _POSITION_BITS) | position) < limit
    if COMPLEMENT is not None:
        chosen = chosen ^ _complement_of_row(COMPLEMENT, row)
    return chosen & can


@triton.jit(do_not_specialize=CHANGING)
def count_blocks(
    ELIGIBLE, SAMPLE_IDS, LEVELS, WEIGHTS, COMPLEMENT, COUNTS,
    seq, first_id: tl.int64, seed_low: tl.int64, seed_high: tl.int64, step: tl.int64, size: tl.int64, floor: tl.int64,
    MODE: tl.constexpr, ODD: tl.constexpr, PURPOSE: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many tokens of each block of a row are masked; the limit of (key, position) is `level << SHIFT`.

    With MODE the levels are the Bernoulli thresholds of a linear schedule, and are stored with their weights for
    `apply_blocks`.
    """
    blocks = tl.cdiv(seq, BLOCK)
    row = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    seed_low, seed_high = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    sample_id = _sample_ids(row, SAMPLE_IDS, first_id)
    if MODE is None:
        level = tl.load(LEVELS + row)
    else:
        ids = tl.zeros((32,), tl.int64) + sample_id
        u_level = noise_level(ids, size, seed_low, seed_high, step, MODE, ODD, PURPOSE)
        level = linear_threshold(tl.max(u_level, axis=0), floor)
        if block == 0:
            tl.store(LEVELS + row, level)
            tl.store(WEIGHTS + row, (tl.full((), _TWO_TO_32, tl.float64) / level.to(tl.float64)).to(tl.float32))
    position = block * BLOCK + tl.arange(0, BLOCK)
    can = _can_be_masked(ELIGIBLE, row.to(tl.int64) * seq, position, position < seq)
    chosen = _chosen_below(
        level << SHIFT, seed_low, seed_high, sample_id, position, can, COMPLEMENT, row, PURPOSE
    )  # fmt: skip
    tl.store(COUNTS + tl.program_id(0), tl.sum(chosen.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=CHANGING)
def apply_blocks(
    TOKENS, ELIGIBLE, SAMPLE_IDS, LEVELS, WEIGHTS, COMPLEMENT, COUNTS,
    NOISED, ROWS, TARGETS, ROW_WEIGHTS, OVERFLOW, COUNT,
    batch: tl.int32, seq, first_id: tl.int64, capacity: tl.int32, mask_token_id: tl.int64,
    seed_low: tl.int64, seed_high: tl.int64,
    PURPOSE: tl.constexpr, EVEN: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mask the tokens that `count_blocks` counted. The keys are made anew, which is cheaper than to store them."""
    seq = _known_even(seq, EVEN)
    blocks = tl.cdiv(seq, BLOCK)
    program = tl.program_id(0)
    row = program // blocks
    seed_low, seed_high = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    position = (program % blocks) * BLOCK + _pairs(BLOCK)
    inside = position < seq
    start = row.to(tl.int64) * seq
    tokens = tl.load(TOKENS + start + position, mask=inside, other=0)
    can = _can_be_masked(ELIGIBLE, start, position, inside)

    earlier = tl.zeros((_TILE,), tl.int32)
    every = tl.zeros((_TILE,), tl.int32)
    for first in range(0, batch * blocks, _TILE):
        other = first + tl.arange(0, _TILE)
        counts = tl.load(COUNTS + other, mask=other < batch * blocks, other=0)
        earlier += tl.where(other < program, counts, 0)
        every += counts
    before = tl.sum(earlier, axis=0)
    total = tl.sum(every, axis=0)

    sample_id = _sample_ids(row, SAMPLE_IDS, first_id)
    limit = tl.load(LEVELS + row) << SHIFT
    chosen = _chosen_below(limit, seed_low, seed_high, sample_id, position, can, COMPLEMENT, row, PURPOSE)
    even, odd = _split_flags(chosen)
    weight = tl.load(WEIGHTS + row)
    _write(
        NOISED, ROWS, TARGETS, ROW_WEIGHTS,
        tokens, start, position, inside, even, odd, before, weight, capacity, mask_token_id,
    )  # fmt: skip
    _finish(ROWS, TARGETS, ROW_WEIGHTS, OVERFLOW, COUNT, total, capacity, batch.to(tl.int64) * seq, BLOCK)
