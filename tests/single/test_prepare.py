"""`prepare`: readable by megatron-core, the same whatever the format and the workers, nothing left after a failure."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from datasets import Dataset as HubDataset
from pyarrow import parquet

import megatron_dlm.preparation.prepare as prepare_module
from megatron_dlm.cli import main
from megatron_dlm.commands import prepare as command
from megatron_dlm.config.load import parse_config
from megatron_dlm.data.token_file import Metadata, TokenFile
from megatron_dlm.data.tokenizer import ByteTokenizer, load_tokenizer
from megatron_dlm.errors import DataError
from megatron_dlm.preparation.documents import Document
from megatron_dlm.preparation.prepare import PrepareOptions, prepare
from megatron_dlm.preparation.selection import document_key, held_out, training_sample

TEXTS = [f"document {i}\n" + "word " * (i % 7) + "\u00fc\n" for i in range(200)]
END = ByteTokenizer().end_of_document_id


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("input") / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def options(jsonl: Path, output: Path, **changes: Any) -> PrepareOptions:
    return replace(PrepareOptions(output, [jsonl], tokenizer="byte", valid_fraction=0.1), **changes)


def contents(folder: Path) -> dict[str, bytes]:
    """The files that do not name the input."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".json"}


def decoded(prefix: Path) -> list[str]:
    tokens = TokenFile(prefix).tokens
    ends = np.flatnonzero(tokens == END)
    assert ends[-1] == len(tokens) - 1
    return [ByteTokenizer().decode(part.tolist()) for part in np.split(tokens, ends[:-1] + 1)]


def test_megatron_reads_what_is_written(jsonl: Path, tmp_path: Path) -> None:
    prepared = prepare(options(jsonl, tmp_path / "out"))
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    seen: list[str] = []
    for name, split in prepared.splits.items():
        indexed = IndexedDataset(str(tmp_path / "out" / name))
        assert len(indexed) == split.documents == len(indexed.document_indices) - 1
        documents = [indexed[i] for i in range(len(indexed))]
        assert all(document.dtype == np.uint16 and document[-1] == END for document in documents)
        assert np.array_equal(np.concatenate(documents), TokenFile(tmp_path / "out" / name).tokens)
        texts = [ByteTokenizer().decode(document.tolist()) for document in documents]
        assert texts == decoded(tmp_path / "out" / name)
        assert split.tokens == sum(map(len, documents))
        assert split.bytes == sum(len(text.encode()) for text in texts) == split.tokens - split.documents
        seen += texts
    assert sorted(seen) == sorted(TEXTS)
    assert prepared.splits["valid"].documents == 20


def test_metadata(jsonl: Path, tmp_path: Path) -> None:
    prepared = prepare(options(jsonl, tmp_path))
    tokenizer = ByteTokenizer()
    stored = json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))
    assert prepared.splits["train"] == Metadata.read(tmp_path / "train.json")
    assert stored["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert (stored["vocab_size"], stored["mask_token_id"], stored["end_of_document_id"]) == (258, 257, 256)
    assert (stored["dtype"], stored["max_token_id"]) == ("uint16", 256)
    assert stored["bin_bytes"] == (tmp_path / "train.bin").stat().st_size == 2 * stored["tokens"]
    assert stored["idx_bytes"] == (tmp_path / "train.idx").stat().st_size
    assert {path.name for path in prepared.files} == {path.name for path in tmp_path.iterdir()}


def test_output_does_not_depend_on_workers(jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_dlm.preparation.tokenization._BATCH_DOCUMENTS", 7)
    for workers in (1, 2, 3):
        prepare(options(jsonl, tmp_path / str(workers), tokenizer=None, train_sentencepiece=300), workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_the_seed_decides_order_and_split(jsonl: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("again", 1), ("b", 2)):
        prepare(options(jsonl, tmp_path / name, seed=seed))
    assert contents(tmp_path / "a") == contents(tmp_path / "again")
    orders = {name: decoded(tmp_path / name / "train") for name in "ab"}
    assert orders["a"] != [text for text in TEXTS if text in set(orders["a"])]  # shuffled
    shared = set(orders["a"]) & set(orders["b"])
    assert [t for t in orders["a"] if t in shared] != [t for t in orders["b"] if t in shared]
    assert set(decoded(tmp_path / "a" / "valid")) != set(decoded(tmp_path / "b" / "valid"))


def test_every_format_gives_the_same_output(jsonl: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03}.txt").write_bytes(text.encode())
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "data.parquet")
    HubDataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "dataset"))
    outputs = []
    for i, source in enumerate((jsonl, folder, tmp_path / "data.parquet", tmp_path / "dataset")):
        prepare(options(source, tmp_path / f"out{i}"))
        outputs.append(contents(tmp_path / f"out{i}"))
    assert all(output == outputs[0] for output in outputs)


def test_copies_of_a_held_out_document_are_held_out(tmp_path: Path) -> None:
    path = tmp_path / "copies.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 3), encoding="utf-8")
    prepared = prepare(options(path, tmp_path / "out"))
    train, valid = decoded(tmp_path / "out/train"), decoded(tmp_path / "out/valid")
    assert not set(train) & set(valid)
    assert 60 <= prepared.splits["valid"].documents <= 62


def test_held_out_is_at_least_one_and_not_all() -> None:
    keys = np.array([5, 3, 9, 3], dtype=np.uint64)
    assert held_out(keys, 0.0).tolist() == [False] * 4
    assert held_out(keys, 0.01).tolist() == [False, True, False, True]
    with pytest.raises(DataError, match="leaves none to train on"):
        held_out(np.array([7, 7], dtype=np.uint64), 0.01)


def test_tokenizer_sample_is_bounded_and_without_held_out_text() -> None:
    documents = [Document(text, "") for text in TEXTS]
    keys = np.array([document_key(text.encode(), 1) for text in TEXTS], dtype=np.uint64)
    valid = {text for text, out in zip(TEXTS, held_out(keys, 0.3), strict=True) if out}
    everything = list(training_sample(documents, 1, 0.3))
    assert sorted(everything) == sorted(set(TEXTS) - valid)
    bounded = list(training_sample(documents, 1, 0.3, max_bytes=1000))
    assert bounded == everything[: len(bounded)]
    assert 1000 <= sum(len(text.encode()) for text in bounded) < 1000 + max(map(len, TEXTS))
    assert list(training_sample(documents[::-1], 1, 0.3, max_bytes=1000)) == bounded


def test_trained_tokenizer_is_saved_and_used(jsonl: Path, tmp_path: Path) -> None:
    prepared = prepare(options(jsonl, tmp_path, tokenizer=None, train_sentencepiece=300))
    assert prepared.tokenizer == str(tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(prepared.tokenizer)
    assert prepared.splits["train"].tokenizer_fingerprint == tokenizer.fingerprint
    tokens = TokenFile(tmp_path / "train").tokens
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.end_of_document_id)[:-1] + 1)
    assert {tokenizer.decode(document.tolist()) for document in documents} <= set(TEXTS)
    assert tokenizer.mask_token_id not in tokens
    # Another tokenizer of the same name in the same process.
    prepare(options(jsonl, tmp_path, tokenizer=None, train_sentencepiece=285), overwrite=True)
    tokens = TokenFile(tmp_path / "train").tokens
    assert load_tokenizer(str(tmp_path)).decode(tokens[:40].tolist()).startswith("document ")


def test_large_vocabularies_are_stored_as_int32(jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wide(spec: str) -> ByteTokenizer:
        tokenizer = ByteTokenizer()
        tokenizer.vocab_size, tokenizer.end_of_document_id = 70_000, 69_999
        tokenizer.fingerprint = "wide"
        return tokenizer

    monkeypatch.setattr(prepare_module, "load_tokenizer", wide)
    monkeypatch.setattr("megatron_dlm.preparation.tokenization.load_tokenizer", wide)
    prepare(options(jsonl, tmp_path))
    file = TokenFile(tmp_path / "train")
    assert file.tokens.dtype == np.int32 and file.tokens[-1] == 69_999 == file.metadata.max_token_id


def test_empty_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    for name, text in (("a", "x"), ("b", ""), ("c", "y")):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    prepared = prepare(options(tmp_path, tmp_path / "out", valid_fraction=0.0))
    assert (prepared.empty_documents, prepared.splits["train"].documents) == (1, 2)
    assert list(prepared.splits) == ["train"] and not (tmp_path / "out/valid.bin").exists()


def test_the_same_request_again_does_nothing(jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = options(jsonl, tmp_path / "out")
    first = prepare(wanted)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_prepare", None)  # would fail
        again = prepare(wanted, workers=2)
    assert again.already_done and again.splits == first.splits and again.tokenizer == "byte"
    with pytest.raises(DataError, match="train.bin exists and is not from this request: use --overwrite"):
        prepare(replace(wanted, seed=5))
    assert not prepare(replace(wanted, seed=5, valid_fraction=0.0), overwrite=True).already_done
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "train.bin", "train.idx", "train.json", "tokenizer.byte"
    }  # fmt: skip


def test_a_part_of_the_embedded_corpus_is_a_request_of_its_own(tmp_path: Path) -> None:
    arguments = ["prepare", "--embedded", "reference", "--tokenizer", "byte", "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert 400_000 < TokenFile(tmp_path / "train").metadata.bytes < 1_000_000
    wanted = PrepareOptions(
        tmp_path, embedded=True, embedded_parts=["reference"], tokenizer="byte", valid_fraction=0.01
    )
    assert prepare(wanted).already_done
    for parts in ("source", "source reference"):
        with pytest.raises(DataError, match="is not from this request"):
            prepare(replace(wanted, embedded_parts=parts.split()))
    with pytest.raises(DataError, match="has no 'sources': name source or reference"):
        prepare(replace(wanted, embedded_parts=["sources"]))


def test_incomplete_output_is_not_taken_for_done(jsonl: Path, tmp_path: Path) -> None:
    prepare(options(jsonl, tmp_path))
    os.truncate(tmp_path / "train.bin", 10)
    with pytest.raises(DataError, match="--overwrite"):
        prepare(options(jsonl, tmp_path))
    assert not prepare(options(jsonl, tmp_path), overwrite=True).already_done
    assert prepare(options(jsonl, tmp_path)).already_done


def test_leftover_of_a_killed_run_is_named(jsonl: Path, tmp_path: Path) -> None:
    (tmp_path / ".prepare").mkdir()
    with pytest.raises(DataError, match="left from a preparation that was killed"):
        prepare(options(jsonl, tmp_path))
    prepare(options(jsonl, tmp_path), overwrite=True)
    assert not (tmp_path / ".prepare").exists()


def fail_with(error: BaseException) -> Any:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


def failing_documents(error: BaseException) -> Any:
    def documents(*args: Any, **kwargs: Any) -> Iterator[Document]:
        for i in range(5000):
            yield Document(f"text {i} " * 20, "")
        raise error

    return documents


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("name", "replacement", "raised", "message"),
    [
        ("prepare.read_documents", failing_documents(DataError("bad input")), DataError, "bad input"),
        ("prepare.read_documents", failing_documents(KeyboardInterrupt()), KeyboardInterrupt, None),
        (
            "prepare.read_documents",
            failing_documents(OSError(errno.EIO, "I/O error", "a.txt")),
            DataError,
            "a.txt: I/O error",
        ),
        ("prepare.indexed_dataset_builder", fail_with(RuntimeError("boom")), RuntimeError, "boom"),
        (
            "prepare.write_split",
            fail_with(OSError(errno.ENOSPC, "No space left on device")),
            DataError,
            "out: No space left",
        ),
        ("splits.Metadata", fail_with(KeyboardInterrupt()), KeyboardInterrupt, None),
        ("prepare.move_into_place", fail_with(KeyboardInterrupt()), KeyboardInterrupt, None),
    ],
)
def test_nothing_is_left_after_a_failure(
    name: str,
    replacement: Any,
    raised: type[BaseException],
    message: str | None,
    workers: int,
    jsonl: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"megatron_dlm.preparation.{name}", replacement)
    with pytest.raises(raised, match=message):
        prepare(options(jsonl, tmp_path / "deep/out"), workers=workers)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_moving_leaves_nothing(jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = Path.replace, []

    def replace_twice(self: Path, target: Path) -> Path:
        calls.append(self.name)
        if len(calls) > 2:
            raise OSError(errno.EIO, "I/O error", str(self))
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace_twice)
    with pytest.raises(DataError, match="I/O error"):
        prepare(options(jsonl, tmp_path / "out"))
    assert len(calls) == 3 and list(tmp_path.iterdir()) == []


def test_a_failure_keeps_what_was_there(jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(options(jsonl, tmp_path))
    before = contents(tmp_path)
    monkeypatch.setattr(prepare_module, "write_split", fail_with(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        prepare(options(jsonl, tmp_path, seed=9), overwrite=True)
    assert contents(tmp_path) == before and prepare(options(jsonl, tmp_path)).already_done


def test_a_killed_worker_is_one_sentence(jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match="was killed, perhaps for lack of memory: use fewer --workers"):
        prepare(options(jsonl, tmp_path / "out"), workers=2)
    assert list(tmp_path.iterdir()) == []


def test_wrong_requests_are_one_sentence(jsonl: Path, tmp_path: Path) -> None:
    surrogate = tmp_path / "surrogate.jsonl"
    surrogate.write_text('{"text": "a\\ud800"}', encoding="utf-8")
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"")
    one = tmp_path / "one.txt"
    one.write_bytes(b"a\n\nb")
    occupied = tmp_path / "file"
    occupied.write_bytes(b"")
    out = tmp_path / "out"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"inputs": []}, "nothing to prepare: give --input, --embedded"),
        ({"tokenizer": None}, "give one of --tokenizer and --train-sentencepiece"),
        ({"train_sentencepiece": 300}, "give one of --tokenizer and --train-sentencepiece"),
        ({"valid_fraction": 1.0}, "--valid-fraction is 1.0"),
        ({"seed": -1}, "--seed is -1"),
        ({"tokenizer": ""}, "the name of the tokenizer is empty"),
        ({"inputs": [one]}, "leaves none to train on: .*, or --split-on-blank-lines where one text holds several"),
        ({"inputs": [surrogate]}, r"surrogate.jsonl line 1 has an unpaired surrogate at character 1"),
        ({"inputs": [empty]}, r"has no text \(1 empty documents\)"),
        ({"inputs": [empty], "tokenizer": None, "train_sentencepiece": 300}, "no text to train a tokenizer"),
        ({"tokenizer": None, "train_sentencepiece": 100_000}, "cannot train a SentencePiece vocabulary of 100000"),
        ({"output": occupied}, "cannot write .*file: "),
    ]
    for changes, message in cases:
        with pytest.raises(DataError, match=message) as raised:
            prepare(replace(options(jsonl, out), **changes))
        assert "\n" not in str(raised.value) and not out.exists()
    with pytest.raises(DataError, match="--workers is 0"):
        prepare(options(jsonl, out), workers=0)


def test_command_prints_a_summary_and_a_next_command_that_parses(
    jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = ["--input", str(jsonl), "--output", str(tmp_path / "my data"), "--tokenizer", "byte", "--workers", "1"]
    assert command.run(parser.parse_args(arguments)) == 0
    printed = capsys.readouterr().out
    for part in ("198 documents", "2 documents", "tokens/s", "bytes/token", "258 ids", "train.idx", "valid.json"):
        assert part in printed
    words = shlex.split(printed.splitlines()[-1])
    assert words[:6] == ["next:", "megatron-dlm", "train", "--config", "CONFIG.yaml", "--data.tokenizer"]
    data = parse_config(words[5:]).data
    assert (data.tokenizer, data.train[0].path, data.valid[0].path) == (
        "byte", str(tmp_path / "my data/train"), str(tmp_path / "my data/valid")
    )  # fmt: skip
    assert command.run(parser.parse_args(arguments)) == 0
    assert "already holds this data" in capsys.readouterr().out
