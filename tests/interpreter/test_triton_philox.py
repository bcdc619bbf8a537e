"""Device functions against the plain-torch twins, bit for bit, in the interpreter of Triton."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from dlm_kernels import noise_levels, philox, triton_philox
from dlm_kernels.philox import MASK32, Purpose, Stream
from dlm_kernels.types import NoiseMode

SEED = 0x9E3779B97F4A7C15  # both words are above 2**31
STEP = 3_000_000_000


@triton.jit
def words_kernel(COUNTERS, OUT, seed_low, seed_high, N: tl.constexpr):
    lane = tl.arange(0, N)
    a, b, c, d = triton_philox.philox4x32(
        seed_low.to(tl.uint32),
        seed_high.to(tl.uint32),
        tl.load(COUNTERS + lane).to(tl.uint32),
        tl.load(COUNTERS + N + lane).to(tl.uint32),
        tl.load(COUNTERS + 2 * N + lane).to(tl.uint32),
        tl.load(COUNTERS + 3 * N + lane).to(tl.uint32),
    )
    tl.store(OUT + lane, a.to(tl.int64))
    tl.store(OUT + N + lane, b.to(tl.int64))
    tl.store(OUT + 2 * N + lane, c.to(tl.int64))
    tl.store(OUT + 3 * N + lane, d.to(tl.int64))


@triton.jit
def bits_kernel(COUNTERS, OUT, seed_low, seed_high, step, STREAM: tl.constexpr, PURPOSE: tl.constexpr, N: tl.constexpr):
    lane = tl.arange(0, N)
    low, high = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    bits = triton_philox.random_bits(low, high, tl.load(COUNTERS + lane), step.to(tl.int64), STREAM, PURPOSE)
    tl.store(OUT + lane, bits.to(tl.int64))


@triton.jit
def keys_kernel(IDS, OUT, seed_low, seed_high, first, PURPOSE: tl.constexpr, N: tl.constexpr):
    lane = tl.arange(0, N)
    low, high = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    keys = triton_philox.token_keys(low, high, tl.load(IDS + tl.program_id(0)), first + lane, PURPOSE)
    tl.store(OUT + tl.program_id(0) * N + lane, keys.to(tl.int64))


@triton.jit
def permute_kernel(
    INDEX, OUT, n, seed_low, seed_high, step, STREAM: tl.constexpr, PURPOSE: tl.constexpr, N: tl.constexpr
):
    lane = tl.arange(0, N)
    low, high = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    index = tl.load(INDEX + lane)
    image = triton_philox.permute(index, n.to(tl.int64), low, high, step.to(tl.int64), STREAM, PURPOSE)
    tl.store(OUT + lane, image)


@triton.jit
def levels_kernel(
    IDS, OUT, size, seed_low, seed_high, step,
    MODE: tl.constexpr, ODD: tl.constexpr, PURPOSE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, N)
    low, high = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    ids = tl.load(IDS + lane)
    levels = triton_philox.noise_level(ids, size.to(tl.int64), low, high, step.to(tl.int64), MODE, ODD, PURPOSE)
    tl.store(OUT + lane, levels)


@triton.jit
def linear_kernel(LEVELS, ELIGIBLE, OUT, floor, N: tl.constexpr):
    lane = tl.arange(0, N)
    level = tl.load(LEVELS + lane)
    eligible = tl.load(ELIGIBLE + lane)
    tl.store(OUT + lane, triton_philox.linear_count(level, eligible))
    tl.store(OUT + N + lane, triton_philox.linear_pair_count(level, eligible))
    tl.store(OUT + 2 * N + lane, triton_philox.linear_threshold(level, floor.to(tl.int64)))


def seed_words(seed: int = SEED) -> dict[str, int]:
    return {"seed_low": seed & MASK32, "seed_high": seed >> 32}


def launch(kernel: Any, values: Tensor, *args: Any, **options: Any) -> Tensor:
    """Run one program over [n] or [m, n] int64 values; n is padded to a power of two by repetition."""
    n = values.shape[-1]
    block = triton.next_power_of_2(n)
    padded = values[..., torch.arange(block) % n].contiguous()
    out = torch.empty_like(padded)
    kernel[(1,)](padded, out, *args, **options, N=block)
    return out[..., :n]


def random_integers(bound: int, count: int = 32, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, bound, count))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    low, high = (int(word, 16) for word in key.split())
    counters = torch.tensor([[int(word, 16)] for word in counter.split()])
    words = launch(words_kernel, counters, seed_low=low, seed_high=high)
    assert [f"{word:08x}" for word in words.view(-1).tolist()] == expected.split()


def test_all_four_words_are_those_of_the_twin() -> None:
    counters = random_integers(2**32, 128).view(4, 32)
    expected = torch.stack(philox.philox4x32(SEED, *counters))
    assert torch.equal(launch(words_kernel, counters, **seed_words()), expected)


@pytest.mark.parametrize(("stream", "purpose"), [(Stream.TOKEN_KEY, Purpose.TRAIN), (Stream.FLIP, Purpose.VALIDATION)])
@pytest.mark.parametrize("step", [0, 7, STEP])
def test_random_bits(stream: Stream, purpose: Purpose, step: int) -> None:
    counters = torch.cat((random_integers(2**63 - 1), random_integers(2**33), torch.tensor([0, 2**32 - 1, 2**32])))
    bits = launch(bits_kernel, counters, **seed_words(), step=step, STREAM=int(stream), PURPOSE=int(purpose))
    assert torch.equal(bits, philox.random_bits(SEED, stream, counters, step, purpose))


@pytest.mark.parametrize("purpose", list(Purpose))
def test_token_keys(purpose: Purpose) -> None:
    ids = torch.tensor([0, 1, 1023, 1024, 2**31 + 5, 2**41 - 1])
    for first in (0, 2**22 - 16):
        keys = torch.empty(len(ids), 16, dtype=torch.int64)
        keys_kernel[(len(ids),)](ids, keys, **seed_words(), first=first, PURPOSE=int(purpose), N=16)
        counters = philox.token_counter(ids[:, None], first + torch.arange(16))
        assert torch.equal(keys, philox.random_bits(SEED, Stream.TOKEN_KEY, counters, 0, purpose))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 64, 100, 1000, 2**31 - 1, 2**40 + 9, 2**48 - 1])
def test_permute(n: int) -> None:
    index = torch.arange(min(n, 100)) if n < 2**20 else random_integers(n)
    options = {"n": n, **seed_words(), "step": STEP, "STREAM": int(Stream.STRATUM), "PURPOSE": 1}
    expected = philox.permute(index.clone(), n, SEED, Stream.STRATUM, STEP, Purpose.VALIDATION)
    assert torch.equal(launch(permute_kernel, index, **options), expected)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 33])
@pytest.mark.parametrize("mode", get_args(NoiseMode))
def test_noise_levels(mode: NoiseMode, size: int) -> None:
    for step, purpose in [(0, Purpose.VALIDATION), (12345, Purpose.TRAIN)]:
        ids = step * size + torch.arange(size)
        options = {"size": size, **seed_words(), "step": step, "MODE": mode, "ODD": size % 2 == 1}
        levels = launch(levels_kernel, ids, **options, PURPOSE=int(purpose))
        expected = noise_levels.draw(ids, mode, seed=SEED, step=step, global_batch_size=size, purpose=purpose)
        assert torch.equal(levels, expected)


def test_noise_levels_of_large_batches() -> None:
    size, step = 3_000_001, 999_999
    ids = step * size + random_integers(size)
    options = {"size": size, **seed_words(), "step": step, "MODE": "stratified_antithetic", "ODD": True}
    expected = noise_levels.draw(ids, "stratified_antithetic", seed=SEED, step=step, global_batch_size=size)
    assert torch.equal(launch(levels_kernel, ids, **options, PURPOSE=0), expected)


def test_ids_outside_the_batch_do_no_harm() -> None:
    """They are the lanes without a row: a walk that starts outside the permuted set might never end."""
    ids = torch.tensor([-1, 10, 2**40, 14])
    options = {"size": 5, **seed_words(), "step": 2, "MODE": "stratified_antithetic", "ODD": True, "PURPOSE": 0}
    levels = launch(levels_kernel, ids, **options)
    inside = noise_levels.draw(
        np.array([10, 14]), "stratified_antithetic", seed=SEED, step=2, global_batch_size=5
    )  # fmt: skip
    np.testing.assert_array_equal(levels[[1, 3]].numpy(), inside)


@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.2499])
def test_linear_counts_and_thresholds(eps: float) -> None:
    levels = torch.cat((random_integers(2**32, 60), torch.tensor([0, 1, 2**32 - 2, 2**32 - 1])))
    eligible = torch.cat((random_integers(2**22, 58, seed=1), torch.tensor([0, 1, 2**22 - 1]).repeat(2)))
    out = torch.empty(3, 64, dtype=torch.int64)
    linear_kernel[(1,)](levels, eligible, out, noise_levels.linear_threshold(0, eps), N=64)
    assert torch.equal(out[0], noise_levels.linear_count(levels, eligible))
    assert torch.equal(out[1], noise_levels.linear_pair_count(levels, eligible))
    assert torch.equal(out[2], noise_levels.linear_threshold(levels, eps))
