"""Random numbers: known answers, the same bits in every representation, and permutations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dlm_kernels.philox import Purpose, Stream, permute, philox4x32, random_bits, random_words, token_counter

ONES = 2**32 - 1
# Key and counter, and the answers of the Random123 distribution (kat_vectors, philox4x32 10 rounds).
KNOWN = [
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (2**64 - 1, (ONES,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        0x299F31D0A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("seed", "counter", "words"), KNOWN)
def test_known_answers(seed: int, counter: tuple[int, ...], words: tuple[int, ...]) -> None:
    assert philox4x32(seed, *counter) == words
    assert tuple(int(word[0]) for word in philox4x32(seed, *(np.array([c]) for c in counter))) == words
    assert tuple(word.item() for word in philox4x32(seed, *(torch.tensor(c) for c in counter))) == words
    with np.errstate(all="raise"):  # nothing may rely on wrapping
        assert tuple(int(word) for word in philox4x32(seed, *(np.int64(c) for c in counter))) == words


def test_numpy_torch_and_int_give_the_same_bits() -> None:
    counters = np.random.default_rng(0).integers(0, 2**63 - 1, 300)
    for seed, stream, step, purpose in [
        (0, Stream.TOKEN_KEY, 0, Purpose.TRAIN),
        (2**64 - 3, Stream.SAMPLING, ONES, Purpose.VALIDATION),
    ]:
        array = random_bits(seed, stream, counters, step, purpose)
        tensor = random_bits(seed, stream, torch.from_numpy(counters), step, purpose)
        assert array.dtype == np.int64 and tensor.dtype == torch.int64
        assert array.min() >= 0 and array.max() <= ONES
        np.testing.assert_array_equal(array, tensor.numpy())
        assert array.tolist() == [random_bits(seed, stream, int(c), step, purpose) for c in counters]


def test_every_part_of_the_key_and_counter_matters() -> None:
    reference = random_bits(1, Stream.TOKEN_KEY, 5, 7)
    variants = [
        random_bits(2, Stream.TOKEN_KEY, 5, 7),
        random_bits(1 + 2**32, Stream.TOKEN_KEY, 5, 7),
        random_bits(1, Stream.FLIP, 5, 7),
        random_bits(1, Stream.TOKEN_KEY, 6, 7),
        random_bits(1, Stream.TOKEN_KEY, 5 + 2**32, 7),
        random_bits(1, Stream.TOKEN_KEY, 5, 8),
        random_bits(1, Stream.TOKEN_KEY, 5, 7, Purpose.VALIDATION),
    ]
    assert len({reference, *variants}) == 8
    assert len(set(Stream)) == 13 and max(Stream) < 2**16
    assert len(set(random_words(1, Stream.TOKEN_KEY, 5, 7))) == 4


def test_token_counters_do_not_overlap() -> None:
    assert token_counter(3, 2**22 - 1) + 1 == token_counter(4, 0)
    assert token_counter(np.arange(2)[:, None], np.arange(3)).tolist() == [[0, 1, 2], [2**22, 2**22 + 1, 2**22 + 2]]


def test_narrow_counters_are_refused() -> None:
    with pytest.raises(TypeError, match="int64"):
        random_bits(0, Stream.TOKEN_KEY, np.arange(3, dtype=np.int32))
    with pytest.raises(TypeError, match="int64"):
        random_bits(0, Stream.TOKEN_KEY, torch.arange(3, dtype=torch.int32))


def test_permute_is_a_bijection_for_every_size_up_to_1000() -> None:
    for n in range(1, 1001):
        image = permute(np.arange(n), n, seed=n, stream=Stream.DATA_ORDER, step=n % 3)
        assert np.bincount(image, minlength=n).tolist() == [1] * n


def test_permute_agrees_between_numpy_torch_and_int() -> None:
    for n in (2, 37, 2**33 + 5):
        index = np.arange(min(n, 40)) * (n // min(n, 40))
        before = index.copy()
        image = permute(index, n, 9, Stream.BLEND, 4, Purpose.VALIDATION)
        np.testing.assert_array_equal(index, before)
        tensor = permute(torch.from_numpy(index), n, 9, Stream.BLEND, 4, Purpose.VALIDATION)
        np.testing.assert_array_equal(image, tensor.numpy())
        assert image.tolist() == [permute(int(i), n, 9, Stream.BLEND, 4, Purpose.VALIDATION) for i in index]
        assert 0 <= image.min() and image.max() < n


def test_permute_is_keyed_by_everything() -> None:
    index = np.arange(500)
    images = [
        permute(index, 500, 1, Stream.DATA_ORDER),
        permute(index, 500, 2, Stream.DATA_ORDER),
        permute(index, 500, 1, Stream.BLEND),
        permute(index, 500, 1, Stream.DATA_ORDER, 1),
        permute(index, 500, 1, Stream.DATA_ORDER, 0, Purpose.VALIDATION),
        permute(index, 501, 1, Stream.DATA_ORDER),
    ]
    for a, b in itertools.combinations(images, 2):
        assert np.bincount((a - b) % 500).max() < 20  # not even up to a rotation


@pytest.mark.parametrize("n", [2, 3, 5, 6, 8, 13])
def test_permute_is_uniform_over_keys(n: int) -> None:
    """Chi-square of the image of one index, and of the images of two, over 2000 keys, at 5 sigma."""
    images = np.stack([permute(np.arange(n), n, 7, Stream.STRATUM, step) for step in range(2000)])
    for i in range(n):
        assert _chi_square_sigmas(np.bincount(images[:, i], minlength=n)) < 5
    pairs = np.bincount(images[:, 0] * n + images[:, n - 1], minlength=n * n).reshape(n, n)
    assert _chi_square_sigmas(pairs[~np.eye(n, dtype=bool)]) < 5


def test_permute_has_no_serial_correlation() -> None:
    image = permute(np.arange(50_000), 50_000, 3, Stream.DATA_ORDER)
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 5 / np.sqrt(50_000)
    assert abs(np.corrcoef(np.arange(50_000), image)[0, 1]) < 5 / np.sqrt(50_000)


@pytest.mark.parametrize("n", [0, -3, 2**48])
def test_permute_refuses_sizes_out_of_range(n: int) -> None:
    with pytest.raises(ValueError, match="permute needs"):
        permute(0, n, 0, Stream.BLEND)


def _chi_square_sigmas(counts: np.ndarray) -> float:
    expected, degrees = counts.mean(), len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees))
