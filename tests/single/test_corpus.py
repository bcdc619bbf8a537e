"""The embedded corpus and the readers of text: the same documents from every format, one-line errors."""

from __future__ import annotations

import gzip
import itertools
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from megatron_dlm.errors import DataError
from megatron_dlm.preparation.documents import EMBEDDED_PARTS, embedded_documents, find_inputs, read_documents

TEXTS = ["first\r\n  document\n", "", "\u00fcber \u4f60\u597d\n\ttab", "line\u2028separator\x85in a text", "last"]


def as_jsonl(folder: Path) -> Path:
    path = folder / "data.jsonl"
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(TEXTS)]
    path.write_bytes("\n\n".join(lines).encode())
    return path


def as_gzip(folder: Path) -> Path:
    path = folder / "data.json.gz"
    path.write_bytes(gzip.compress(as_jsonl(folder).read_bytes()))
    return path


def as_text(folder: Path) -> Path:
    inside = folder / "texts"
    (inside / "b").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (inside / ("b" if i > 2 else "") / f"{i}.txt").write_bytes(text.encode())
    (inside / ".hidden").write_bytes(b"\xff")
    return inside


def as_parquet(folder: Path) -> Path:
    path = folder / "data.parquet"
    parquet.write_table(pyarrow.table({"text": TEXTS, "other": list(range(len(TEXTS)))}), path)
    return path


def as_dataset(folder: Path) -> Path:
    path = folder / "dataset"
    Dataset.from_dict({"text": TEXTS}).save_to_disk(str(path))
    return path


FORMATS: list[Callable[[Path], Path]] = [as_jsonl, as_gzip, as_text, as_parquet, as_dataset]


def texts_of(*inputs: Path, **options: object) -> list[str]:
    return [document.text for document in read_documents(find_inputs(inputs), **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_same_documents(write: Callable[[Path], Path], tmp_path: Path) -> None:
    assert texts_of(write(tmp_path)) == TEXTS


def test_inputs_are_read_in_the_order_given(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.py").write_text(name, encoding="utf-8")
    assert texts_of(tmp_path / "c.py", tmp_path / "a.py") == ["c", "a"]
    assert texts_of(tmp_path) == ["a", "b", "c"]


def test_blank_lines_separate_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n \none\ntwo\n\n\n  three\n\t\nfour")
    assert texts_of(path, split_on_blank_lines=True) == ["one\ntwo\n", "  three\n", "four"]
    origins = [d.origin for d in read_documents([path], split_on_blank_lines=True)]
    assert origins == [f"{path} line {n}" for n in (3, 7, 9)]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "b.txt").write_bytes(mark + b"c\n\n" + mark + b"d")
    assert texts_of(tmp_path / "a.jsonl", tmp_path / "b.txt") == ["a", "b", "c\n\n\ufeffd"]
    assert texts_of(tmp_path / "b.txt", split_on_blank_lines=True) == ["c\n", "\ufeffd"]


def test_what_is_too_long_for_a_document_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"short\n\n" + b"a line\n" * 20)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\0" * 10**6))
    assert len(texts_of(tmp_path / "a.txt", split_on_blank_lines=True)) == 2
    monkeypatch.setattr("megatron_dlm.preparation.records._LONGEST", 100)
    for name, split, where in (("a.txt", False, "a.txt"), ("a.txt", True, "a.txt line 3"), ("b.jsonl.gz", 0, "line 1")):
        with pytest.raises(DataError, match=f"{where} is longer than the 100 bytes .*--split-on-blank-lines"):
            texts_of(tmp_path / name, split_on_blank_lines=split)


def test_text_key(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "x", "text": "y"}\n', encoding="utf-8")
    assert texts_of(path, text_key="content") == ["x"]


def test_embedded_corpus() -> None:
    documents = list(embedded_documents())
    names = [document.origin for document in documents]
    assert documents == list(embedded_documents())
    assert sum(len(document.text) for document in documents) > 9_000_000
    assert all(document.text for document in documents) and len(set(names)) == len(names)
    assert not any("/test/" in name or "site-packages" in name for name in names)
    assert any(name.endswith("/argparse.py") for name in names)
    assert "the language reference on 'while'" in names
    assert not any(sys.prefix in document.text for document in documents)


def test_parts_of_the_embedded_corpus() -> None:
    documents = list(embedded_documents())
    source, reference = (list(embedded_documents([part])) for part in EMBEDDED_PARTS)
    assert source + reference == documents and source
    assert all(document.origin.startswith("the language reference on ") for document in reference)
    assert 400_000 < sum(len(document.text) for document in reference) < 1_000_000


def write_invalid_utf8(folder: Path) -> Path:
    path = folder / "a.txt"
    path.write_bytes(b"good\nb\xe9d\n")
    return path


def write_invalid_utf8_lines(folder: Path) -> Path:
    path = folder / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n{"text": "b\xe9d"}\n')
    return path


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_lines(*lines: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "a.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


def write_parquet_without_column(folder: Path) -> Path:
    path = folder / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    return path


def write_parquet_of_numbers(folder: Path) -> Path:
    path = folder / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    return path


def write_broken_parquet(folder: Path) -> Path:
    path = folder / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    return path


def write_truncated_gzip(folder: Path) -> Path:
    path = as_gzip(folder)
    path.write_bytes(path.read_bytes()[:-12])
    return path


def write_dataset_of_splits(folder: Path) -> Path:
    DatasetDict({"train": Dataset.from_dict({"text": ["x"]})}).save_to_disk(str(folder / "splits"))
    return folder / "splits"


def write_dataset_without_column(folder: Path) -> Path:
    Dataset.from_dict({"body": ["x"]}).save_to_disk(str(folder / "dataset"))
    return folder / "dataset"


def write_dataset_with_a_wrong_offset(folder: Path) -> Path:
    """The end of the third text is 2 GB behind its beginning, where no file is."""
    (path,) = as_dataset(folder).glob("*.arrow")
    ends = list(itertools.accumulate(len(text.encode()) for text in TEXTS))
    before = struct.pack(f"<{len(TEXTS) + 1}i", 0, *ends)
    content = path.read_bytes()
    assert content.count(before) == 1
    ends[2] = 2**31 - 1
    path.write_bytes(content.replace(before, struct.pack(f"<{len(TEXTS) + 1}i", 0, *ends)))
    return path.parent


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_invalid_utf8, r"a\.txt is not UTF-8 at byte 6 \(0xe9\)"),
        (write_invalid_utf8_lines, r"a\.jsonl line 2 is not UTF-8 at byte 11 \(0xe9\)"),
        (write_lines('{"text": "a"}', "{oops"), r"a\.jsonl line 2 is not JSON"),
        (write_lines('["text"]'), "line 1 is not a JSON object"),
        (write_lines('{"body": "a", "id": 1}'), r"line 1 has no 'text': .*--text-key \(there are: body, id\)"),
        (write_lines('{"text": null}'), "line 1: 'text' holds NoneType, not text"),
        (write_parquet_without_column, "has no column 'text': .*there are: body"),
        (write_parquet_of_numbers, "row 1: 'text' holds int"),
        (write_broken_parquet, "no readable parquet file"),
        (write_truncated_gzip, "is damaged; copy it again"),
        (write_lines("[" * 100_000), "line 1 is not JSON"),
        (lambda folder: write_bytes(folder / "a.txt.gz", b"no gzip"), "is damaged; copy it again"),
        (lambda folder: write_bytes(folder / "a.jsonl.gz", gzip.compress(b'{"text": 1}')[:12]), "is damaged"),
        (write_dataset_of_splits, r"holds several splits \(train\): give one, such as .*splits/train"),
        (write_dataset_without_column, "has no column 'text'"),
        (write_dataset_with_a_wrong_offset, "is not a readable dataset folder .*: save it again"),
        (lambda folder: folder / "absent", "absent does not exist"),
        (lambda folder: folder / ("x" * 300), "cannot read the input .*File name too long"),
        (lambda folder: Path("/dev/zero"), "/dev/zero is a pipe or a device, which may have no end"),
        (lambda folder: "", "an input is an empty text: give the path"),  # type: ignore[arg-type, return-value]
        (lambda folder: folder, "has no files"),
    ],
)
def test_errors_are_one_sentence(write: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as raised:
        texts_of(write(tmp_path))
    assert "\n" not in str(raised.value)
