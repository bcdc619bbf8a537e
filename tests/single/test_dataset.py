"""The data order: each epoch a partition, a pure function of the sample id, exact blends, nested prefixes; errors."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import megatron_dlm.parallel  # noqa: F401  (prepares the machine before megatron is imported)
from dlm_kernels.philox import Purpose
from megatron_dlm.config.tree import SourceConfig
from megatron_dlm.data.blend import Blend, blend_counts
from megatron_dlm.data.dataset import Dataset
from megatron_dlm.data.token_file import Metadata, TokenFile
from megatron_dlm.errors import DataError


def write(prefix: Path, content: np.ndarray, document: int = 100, **changes: object) -> SourceConfig:
    """A prepared corpus of the given tokens, cut into documents of one length."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    dtype = np.uint16 if content.max() < 2**16 else np.int32
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    parts = [content[i : i + document] for i in range(0, len(content), document)]
    for part in parts:
        builder.add_document(part, [len(part)])
    builder.finalize(f"{prefix}.idx")
    metadata = Metadata(
        documents=len(parts),
        tokens=len(content),
        bytes=3 * len(content),
        dtype=np.dtype(dtype).name,
        vocab_size=int(content.max()) + 3,
        mask_token_id=int(content.max()) + 2,
        end_of_document_id=int(content.max()) + 1,
        max_token_id=int(content.max()),
        tokenizer_fingerprint="f" * 64,
        bin_bytes=os.path.getsize(f"{prefix}.bin"),
        idx_bytes=os.path.getsize(f"{prefix}.idx"),
    )
    replace(metadata, **changes).write(Path(f"{prefix}.json"))  # type: ignore[arg-type]
    return SourceConfig(str(prefix))


def numbered(prefix: Path, n: int, first: int = 0) -> SourceConfig:
    """A corpus in which every token is another one, so that it tells where it was read."""
    return write(prefix, np.arange(first, first + n))


def one_epoch(dataset: Dataset, epoch: int = 0) -> np.ndarray:
    n = dataset.samples_per_epoch
    return dataset.sequences(np.arange(epoch * n, (epoch + 1) * n))


@pytest.mark.parametrize(("n", "s"), [(1000, 10), (1003, 10), (17, 16), (16, 16), (999, 7)])
def test_each_epoch_is_a_partition(n: int, s: int, tmp_path: Path) -> None:
    dataset = Dataset([numbered(tmp_path / "a", n)], sequence_length=s, seed=3)
    assert dataset.samples_per_epoch == n // s
    for epoch in range(3):
        rows = one_epoch(dataset, epoch)
        assert rows.shape == (n // s, s) and rows.dtype == np.int64
        assert len(np.unique(rows)) == rows.size
        # Within a sequence the stream goes on, around the end too.
        assert np.array_equal((rows[:, 1:] - rows[:, :-1]) % n, np.ones_like(rows[:, 1:]))


def test_the_next_epoch_has_the_same_tokens_in_another_order_with_other_boundaries(tmp_path: Path) -> None:
    dataset = Dataset([numbered(tmp_path / "a", 1000)], sequence_length=10, seed=3)
    first, second = one_epoch(dataset, 0), one_epoch(dataset, 1)
    assert np.array_equal(np.sort(first.ravel()), np.sort(second.ravel()))
    assert {row[0] % 10 for row in first.tolist()} != {row[0] % 10 for row in second.tolist()}
    orders = [np.array([dataset.locate(i).sequence for i in range(e * 100, e * 100 + 100)]) for e in (0, 1)]
    assert np.mean(orders[0] == orders[1]) < 0.1
    assert np.mean(np.diff(orders[0]) == 1) < 0.1


def test_what_an_epoch_leaves_out_changes(tmp_path: Path) -> None:
    dataset = Dataset([numbered(tmp_path / "a", 109)], sequence_length=10, seed=3)
    left_out = [frozenset(range(109)) - set(one_epoch(dataset, epoch).ravel().tolist()) for epoch in range(8)]
    assert all(len(tokens) == 9 for tokens in left_out) and len(set(left_out)) > 4


def two_sources(folder: Path, **arguments: object) -> Dataset:
    sources = [numbered(folder / "a", 700), numbered(folder / "b", 330, first=1000)]
    sources[0].weight, sources[1].weight = 0.7, 0.3
    return Dataset(sources, sequence_length=10, seed=11, **arguments)  # type: ignore[arg-type]


def test_random_access_equals_sequential_at_any_split(tmp_path: Path) -> None:
    dataset = two_sources(tmp_path)
    ids = np.arange(320)
    rows = dataset.sequences(ids)
    again = two_sources(tmp_path)
    shuffled = np.random.default_rng(0).permutation(ids)
    assert np.array_equal(again.sequences(shuffled), rows[shuffled])
    for data_parallel, micro_batch in ((2, 4), (4, 1), (1, 8)):
        split = ids.reshape(-1, data_parallel, micro_batch)
        for rank in range(data_parallel):
            parts = [dataset.sequences(part) for part in split[:, rank]]
            assert np.array_equal(np.concatenate(parts), rows[split[:, rank].ravel()])
    assert dataset.sequences(np.array([], dtype=np.int64)).shape == (0, 10)


def test_locate_agrees_with_sequences_and_far_ids_work(tmp_path: Path) -> None:
    dataset = two_sources(tmp_path)
    ids = [0, 1, 999, 10**9, 2**38]
    rows = dataset.sequences(np.array(ids))
    for sample_id, row in zip(ids, rows.tolist(), strict=True):
        source, epoch, sequence = dataset.locate(sample_id)
        assert (row[0] >= 1000) == (source == 1)
        assert 0 <= sequence < (70, 33)[source]
        assert dataset.locate(sample_id) == (source, epoch, sequence)
    with pytest.raises(ValueError, match="negative"):
        dataset.locate(-1)


def test_seed_and_source_change_the_order(tmp_path: Path) -> None:
    source, twin = numbered(tmp_path / "a", 1000), numbered(tmp_path / "b", 1000, first=1000)
    rows = [one_epoch(Dataset([source], sequence_length=10, seed=seed)) for seed in (0, 1, 2**63)]
    assert len({row.tobytes() for row in rows}) == 3
    dataset = Dataset([source, twin], sequence_length=997, seed=0)
    starts: list[dict[int, int]] = [{}, {}]
    for i, row in enumerate(dataset.sequences(np.arange(64))):
        where = dataset.locate(i)
        starts[where.source][where.epoch] = int(row[0]) % 1000
    shared = starts[0].keys() & starts[1].keys()
    assert len(shared) >= 4 and all(starts[0][epoch] != starts[1][epoch] for epoch in shared)


def test_blend_is_exact_in_every_block_and_mixed_within(tmp_path: Path) -> None:
    dataset = two_sources(tmp_path)
    counts = dataset.blend.counts
    size = int(counts.sum())
    assert counts.tolist() == [49, 21]
    orders = []
    for block in range(3):
        sources = [dataset.locate(i)[0] for i in range(block * size, (block + 1) * size)]
        assert Counter(sources) == {0: 49, 1: 21}
        orders.append(tuple(sources))
    assert len(set(orders)) == 3
    # Each source goes through its own epochs, every sequence once in each.
    seen = Counter(dataset.locate(i) for i in range(3 * size))
    assert max(seen.values()) == 1
    assert sum(location.source == 0 and location.epoch == 0 for location in seen) == 70
    assert sum(location.source == 1 and location.epoch == 0 for location in seen) == 33


@pytest.mark.parametrize(
    "weights",
    [[1, 1], [0.7, 0.2, 0.1], [1, 2, 3, 4], [1 / 3, 2 / 3], [0.9995, 0.0005], [0.123, 0.456, 0.421], [1, 1e-5]],
)
def test_blend_counts_keep_weights(weights: list[float]) -> None:
    counts = blend_counts(weights)
    shares = np.array(weights) / sum(weights)
    assert counts.min() > 0 and counts.sum() <= 2**20
    assert np.max(np.abs(counts / counts.sum() / shares - 1)) < (1e-3 if min(shares) > 1e-3 else 0.06)


def test_blend_counts_of_round_weights_are_small_and_bad_weights_refused() -> None:
    assert blend_counts([5.0]).tolist() == [1]
    assert blend_counts([1, 1]).tolist() == [32, 32]
    assert blend_counts([0.7, 0.2, 0.1]).tolist() == [49, 14, 7]
    for weights in ([1, 0], [1, -1], [1, float("nan")], [1, float("inf")]):
        with pytest.raises(DataError, match="each must be a positive number"):
            blend_counts(weights)
    with pytest.raises(DataError, match="differ too much"):
        blend_counts([1, 1e-9])


def test_unique_tokens_are_nested_prefixes_in_proportion(tmp_path: Path) -> None:
    seen = []
    for unique in (200, 500, 1000):
        dataset = two_sources(tmp_path, unique_tokens=unique)
        assert dataset.num_tokens == 1030
        assert dataset.unique_tokens == unique
        assert dataset.samples_per_epoch == unique // 10
        assert dataset.epoch(unique // 20) == pytest.approx(0.5)
        tokens = set(dataset.sequences(np.arange(8 * dataset.samples_per_epoch)).ravel().tolist())
        assert tokens == set(range(unique * 7 // 10)) | set(range(1000, 1000 + unique * 3 // 10))
        seen.append(tokens)
    assert seen[0] < seen[1] < seen[2]
    with pytest.raises(DataError, match=r"\(1500\) takes 1050 tokens of .*a, which has 700: use at most 1000"):
        two_sources(tmp_path, unique_tokens=1500)
    with pytest.raises(DataError, match=r"b has 9 tokens as its share of unique_tokens \(30\), less than one sequence"):
        two_sources(tmp_path, unique_tokens=30)


def test_validation_is_in_file_order_and_ends(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a", 105)
    made = [Dataset([source], sequence_length=10, seed=seed, purpose=Purpose.VALIDATION) for seed in (1, 2)]
    for dataset in made:
        assert dataset.samples_per_epoch == 10
        assert np.array_equal(dataset.sequences(np.arange(10)).ravel(), np.arange(100))
    with pytest.raises(ValueError, match="has only 10 sequences"):
        dataset.sequences(np.array([10]))


def test_validation_of_a_blend_takes_a_prefix_of_each_source(tmp_path: Path) -> None:
    dataset = two_sources(tmp_path, purpose=Purpose.VALIDATION)
    n = dataset.samples_per_epoch
    assert 90 <= n < 103
    rows = dataset.sequences(np.arange(n))
    for source, first in ((0, 0), (1, 1000)):
        mine = rows[(rows[:, 0] >= 1000) == source]
        assert np.array_equal(mine.ravel(), np.arange(first, first + mine.size))
    # One more would need a sequence that one of the sources no longer has.
    assert 700 in rows + 1 or 1330 in rows + 1
    with pytest.raises(ValueError, match="validation set has only"):
        dataset.locate(n)
    tiny = [numbered(tmp_path / "c", 10), numbered(tmp_path / "d", 10)]
    assert Dataset(tiny, sequence_length=10, seed=0, purpose=Purpose.VALIDATION).samples_per_epoch >= 1


def test_blend_of_training_permutes_whole_blocks() -> None:
    blend = Blend([3, 1], seed=5)
    source, index = blend.locate(np.arange(10 * blend.block_size))
    for s, count in enumerate(blend.counts.tolist()):
        assert np.array_equal(np.sort(index[source == s]), np.arange(10 * count))


def test_unigram_counts_and_bytes_per_token(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 5, 1000)
    source = write(tmp_path / "a", tokens)
    dataset = Dataset([source], sequence_length=10, seed=0)
    assert np.array_equal(dataset.unigram_counts(8), np.bincount(tokens, minlength=8))
    assert np.array_equal(dataset.unigram_counts(8, max_tokens=300), np.bincount(tokens[:300], minlength=8))
    prefix = Dataset([source], sequence_length=10, seed=0, unique_tokens=100)
    assert np.array_equal(prefix.unigram_counts(8), np.bincount(tokens[:100], minlength=8))
    assert dataset.bytes_per_token == 3.0
    with pytest.raises(DataError, match="outside the vocabulary of 4"):
        dataset.unigram_counts(4)

    ones, twos = write(tmp_path / "ones", np.full(300, 1)), write(tmp_path / "twos", np.full(100, 2), bytes=500)
    ones.weight, twos.weight = 1.0, 3.0
    blend = Dataset([ones, twos], sequence_length=10, seed=0)
    assert blend.unigram_counts(3).tolist() == [0, 100, 300]
    assert blend.bytes_per_token == pytest.approx(0.25 * 3 + 0.75 * 5)


def test_int32_tokens(tmp_path: Path) -> None:
    dataset = Dataset([numbered(tmp_path / "a", 100, first=70_000)], sequence_length=10, seed=0, vocab_size=70_100)
    assert TokenFile(tmp_path / "a").tokens.dtype == np.int32
    assert np.array_equal(np.sort(one_epoch(dataset).ravel()), np.arange(70_000, 70_100))


def open_damaged(prefix: Path, suffix: str, content: bytes | None, **changes: object) -> None:
    """Write a corpus, replace one of its files (None removes it), and open it."""
    write(prefix, np.arange(500), **changes)
    path = Path(f"{prefix}.{suffix}")
    if content is None:
        path.unlink()
    elif content != b"keep":
        path.write_bytes(content)
    Dataset([SourceConfig(str(prefix))], sequence_length=10, seed=0, vocab_size=600, tokenizer_fingerprint="f" * 64)


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        ("bin", None, r"a\.bin is missing: prepare the data again"),
        ("idx", None, r"a\.idx is missing"),
        ("json", None, r"a\.json is missing: give the prefix of a corpus that `megatron-dlm prepare` completed"),
        ("bin", b"\0" * 998, r"a\.bin is truncated \(998 bytes, expected 1000\)"),
        ("bin", b"", r"a\.bin is empty"),
        ("bin", b"\0" * 1002, r"a\.bin does not belong to its \.json"),
        ("idx", b"\0" * 10, r"a\.idx is truncated"),
        ("idx", b"", r"a\.idx is empty"),
        ("idx", b"\0" * (34 + 12 * 5 + 8 * 6), r"a\.idx is not an index of megatron-core"),
        ("json", b"{", r"a\.json is not JSON"),
        ("json", b"[1]", r"a\.json is not a JSON object; prepare"),
        ("json", b'{"documents": 5}', r"a\.json lacks tokens"),
    ],
)
def test_damaged_files_are_one_sentence(suffix: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as raised:
        open_damaged(tmp_path / "a", suffix, content)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": 6}, r"a\.idx does not match the \.bin and \.json"),
        ({"dtype": "int32", "tokens": 250}, r"a\.idx does not match"),
        ({"dtype": "float32"}, r"a\.json: dtype is 'float32', not uint16 or int32: prepare"),
        ({"tokens": 499}, r"counts 499 tokens"),
        ({"tokenizer_fingerprint": "e" * 64}, r"prepared with another tokenizer \(eeeeeeeeeeee\) than data.tokenizer"),
        ({"vocab_size": 700, "max_token_id": 600}, r"has ids up to 600, outside the vocabulary of 600"),
    ],
)
def test_metadata_that_does_not_fit_is_one_sentence(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as raised:
        open_damaged(tmp_path / "a", "bin", b"keep", **changes)
    assert "\n" not in str(raised.value)


def test_index_of_another_corpus_of_the_same_size(tmp_path: Path) -> None:
    write(tmp_path / "a", np.arange(500), document=100)
    write(tmp_path / "b", np.arange(450), document=100)
    (tmp_path / "a.idx").write_bytes((tmp_path / "b.idx").read_bytes())
    with pytest.raises(DataError, match=r"a\.idx does not match"):
        TokenFile(tmp_path / "a")


def test_damaged_token_is_found_when_read(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a", 500)
    content = np.fromfile(tmp_path / "a.bin", dtype=np.uint16)
    content[321] = 60_000
    content.tofile(tmp_path / "a.bin")
    dataset = Dataset([source], sequence_length=10, seed=0, vocab_size=502)
    with pytest.raises(DataError, match=r"a\.bin has the id 60000 at token 321, outside the vocabulary of 502"):
        for epoch in range(2):
            one_epoch(dataset, epoch)


def test_truncation_under_a_run_is_one_sentence_and_replacement_is_nothing(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a", 500_000)
    dataset = Dataset([source], sequence_length=1000, seed=0)
    rows = one_epoch(dataset)
    numbered(tmp_path / "b", 1000)
    (tmp_path / "b.bin").replace(tmp_path / "a.bin")  # the file that was opened lives on
    assert np.array_equal(one_epoch(dataset), rows)
    with open(f"/proc/self/fd/{dataset.files[0]._handle}", "r+b") as file:
        file.truncate(1_000_000)
    with pytest.raises(DataError, match=r"a\.bin was truncated while it was in use \(1000000 of 2000000 bytes\); rest"):
        one_epoch(dataset)


def test_the_same_corpus_twice_is_one_sentence(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a", 100)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"link/a is given twice: name it once, with the sum of the weights"):
        Dataset([source, SourceConfig(str(tmp_path / "link" / "a"))], sequence_length=10, seed=0)


def test_too_little_data_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a has 99 tokens, less than one sequence of 100: give more data"):
        Dataset([numbered(tmp_path / "a", 99)], sequence_length=100, seed=0)
    with pytest.raises(DataError, match="no data source is given"):
        Dataset([], sequence_length=100, seed=0)


def test_metadata_survives_writing(tmp_path: Path) -> None:
    numbered(tmp_path / "a", 100)
    metadata = Metadata.read(tmp_path / "a.json")
    metadata.write(tmp_path / "b.json")
    assert Metadata.read(tmp_path / "b.json") == metadata
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["tokens"] == 100
