"""Damaged corpora, tokenizers and texts: what is read is what was written, or the error is one line. Seeded."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import struct
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import tokenizers

from megatron_dlm.config.tree import SourceConfig
from megatron_dlm.data.dataset import Dataset
from megatron_dlm.data.token_file import Metadata, TokenFile
from megatron_dlm.data.tokenizer import load_tokenizer
from megatron_dlm.errors import DataError
from megatron_dlm.preparation.documents import find_inputs, read_documents
from megatron_dlm.preparation.sentencepiece_training import train_sentencepiece
from tests.quick.test_tokenizer import byte_level_bpe

pytestmark = pytest.mark.time_limit(120)
T = TypeVar("T")
TEXT = "hello world, pieces of words 123\n"
TEXTS = [f"document {i}\n" * (1 + i % 3) + "\u00fc" for i in range(40)]
JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 1.5, 2**31, 2**63, 10**30, float("nan"), float("inf")),
    *("", "x", "float32", "\ud800", [], [1], [[]], {}, {"type": "BPE"}, {"a": {"b": []}}),
)
# Whole files that are something else.
HOSTILE = (
    *(b"", b"\n", b"[]", b"null", b'"text"', b"{}", b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 100_000, b"\0" * 4096),
    *(b'{"documents": ' + b"9" * 5000 + b"}", b'{"documents": 1e999}', b"PK\x03\x04", b"\x1f\x8b\x08\0"),
)


def mutate(content: bytes, source: random.Random) -> bytes:
    """Bytes that are flipped, cut off, left out, put in, or all of another file."""
    found, at = bytearray(content), source.randrange(len(content))
    match source.randrange(6):
        case 0:
            del found[at:]
        case 1:
            del found[at : at + source.randint(1, 64)]
        case 2:
            found[at:at] = source.randbytes(source.randint(1, 64))
        case 3:
            return source.choice(HOSTILE)
        case _:
            for _ in range(source.randint(1, 4)):
                found[source.randrange(len(found))] ^= source.randint(1, 255)
    return bytes(found)


def mutate_json(content: bytes, source: random.Random) -> bytes:
    """A value anywhere in it that is replaced or left out."""
    whole = node = json.loads(content)
    for depth in range(source.randint(1, 5)):
        if not isinstance(node, dict | list) or not node:
            break
        parent, key = node, source.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = parent[key]
        if source.random() < 0.3 * depth:
            break
    if source.random() < 0.2:
        del parent[key]
    else:
        parent[key] = source.choice(JUNK)
    return json.dumps(whole).encode()


def outcome(action: Callable[[], T], what: str) -> T | None:
    """What the action gives, or None after an error of one line; any other fails the test."""
    try:
        return action()
    except DataError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 1000, what
        return None
    except Exception as error:
        pytest.fail(f"{what}: {error!r}")


def fuzz(path: Path, count: int, read: Callable[[], Any], *, accept: Callable[[Any], bool]) -> None:
    """Read ``count`` damaged versions of ``path``: each is refused, or gives something to accept."""
    content, refused = path.read_bytes(), 0
    assert accept(outcome(read, "undamaged"))
    for number in range(count):
        source = random.Random(f"{path.name} {number}")
        by_value = path.suffix == ".json" and source.random() < 0.6
        path.write_bytes((mutate_json if by_value else mutate)(content, source))
        found = outcome(read, f"mutation {number} of {path.name}")
        refused += found is None
        assert found is None or accept(found), f"mutation {number} of {path.name} gives something else"
    assert refused > count / 4
    path.write_bytes(content)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The prefix of a prepared corpus of 40 documents."""
    lengths = np.arange(20, 60, dtype=np.int32)
    tokens = np.random.default_rng(0).integers(0, 256, int(lengths.sum())).astype(np.uint16)
    starts = 2 * (np.cumsum(lengths, dtype=np.int64) - lengths)
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 40, 41) + lengths.tobytes() + starts.tobytes()
    contents = {"bin": tokens.tobytes(), "idx": index + np.arange(41, dtype=np.int64).tobytes()}
    for suffix, content in contents.items():
        (tmp_path / f"a.{suffix}").write_bytes(content)
    sizes = {f"{suffix}_bytes": len(content) for suffix, content in contents.items()}
    digests = {f"{suffix}_sha256": hashlib.sha256(content).hexdigest() for suffix, content in contents.items()}
    counts = {"documents": 40, "tokens": len(tokens), "bytes": 3 * len(tokens), "vocab_size": 258}
    ids = {"mask_token_id": 257, "end_of_document_id": 256, "max_token_id": 256}
    request = {"inputs": [["/a.txt", 1, 2]], "seed": 1}
    made = Metadata(**counts, **ids, **sizes, **digests, dtype="uint16", tokenizer_fingerprint="f", request=request)
    made.write(tmp_path / "a.json")
    return tmp_path / "a"


@pytest.mark.parametrize("suffix", ["bin", "idx", "json"])
def test_damaged_corpora(suffix: str, corpus: Path) -> None:
    def read(verify: bool = True) -> np.ndarray:
        dataset = Dataset([SourceConfig(str(corpus))], sequence_length=32, seed=3, vocab_size=258)
        for record in dataset.files[0].recorded() if verify else ():
            record.verify()
        return dataset.sequences(np.arange(2 * dataset.samples_per_epoch))

    rows = read()
    fuzz(Path(f"{corpus}.{suffix}"), 200, read, accept=lambda found: np.array_equal(found, rows))
    fuzz(Path(f"{corpus}.{suffix}"), 200, lambda: read(verify=False), accept=lambda found: found.shape == rows.shape)


def test_every_field_of_a_description(corpus: Path) -> None:
    path = Path(f"{corpus}.json")
    values = json.loads(path.read_bytes())
    for item in fields(Metadata):
        kind = int if item.type.startswith("int") else dict if item.name == "request" else str
        for junk in JUNK:
            path.write_text(json.dumps({**values, item.name: junk}), encoding="utf-8")
            if junk is None and item.default is None:
                assert TokenFile(corpus)
            elif type(junk) is not kind or junk == "" or (kind is int and not 0 <= junk < 2**63):
                with pytest.raises(
                    DataError, match=rf"^\S+a\.json: {item.name} is .*: prepare the data again"
                ) as raised:
                    TokenFile(corpus)
                assert "\n" not in str(raised.value)
            else:
                outcome(lambda: TokenFile(corpus), f"{item.name}: {junk!r}")
    for content in HOSTILE:
        path.write_bytes(content)
        assert outcome(lambda: TokenFile(corpus), repr(content[:20])) is None


def word_level(folder: Path) -> Path:
    words = {"[UNK]": 0, "[MASK]": 1, "hello": 2, "</s>": 3, "world": 4}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.normalizer = tokenizers.normalizers.NFKC()
    model.add_special_tokens(["[UNK]", "[MASK]"])
    model.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def sentencepiece(folder: Path) -> Path:
    train_sentencepiece([TEXT * 10], 290, folder / "tokenizer.model")
    return folder / "tokenizer.model"


def settings(folder: Path) -> Path:
    byte_level_bpe(folder, special=("<end>", "<hole>"))
    content = {"eos_token": "<end>", "mask_token": {"content": "<hole>", "special": True}, "added_tokens_decoder": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "tokenizer_config.json"


MAKERS = [word_level, sentencepiece, settings, lambda folder: byte_level_bpe(folder) / "tokenizer.json"]


@pytest.mark.parametrize("make", MAKERS, ids=["words", "sentencepiece", "settings", "bytes"])
def test_damaged_tokenizers(make: Callable[[Path], Path], tmp_path: Path) -> None:
    def read() -> bool:
        tokenizer = load_tokenizer(str(tmp_path))
        ids = tokenizer.encode(TEXT)
        tokenizer.decode([*ids, *range(tokenizer.vocab_size), -1])
        return bool(ids) and max(ids) < tokenizer.vocab_size and tokenizer.mask_token_id not in ids

    # A tokenizer has no digest, so one that is still whole passes; even one that has no token for the text.
    fuzz(make(tmp_path), 100, read, accept=lambda found: found is not None)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl", "a.txt.gz"])
def test_damaged_texts(name: str, tmp_path: Path) -> None:
    content = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS) if "json" in name else TEXT * 99 + "\u00fc"
    packed = name.endswith(".gz")
    (tmp_path / name).write_bytes(gzip.compress(content.encode(), mtime=0) if packed else content.encode())

    def read() -> list[str]:
        return [document.text for document in read_documents([tmp_path / name])]

    texts = read()
    # A checksum decides, or nothing is left to have one; without, what is JSON still may be another text.
    fuzz(tmp_path / name, 100, read, accept=lambda found: not packed or found in (texts, [], [""]))


@pytest.mark.parametrize("name", ["a.bin", "a.idx", "a.json", "tokenizer.json", "tokenizer.model", "text.txt"])
def test_pipes_and_folders_in_place_of_files(name: str, corpus: Path) -> None:
    path = corpus.parent / name
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path, path)):
        path.unlink(missing_ok=True)
        make(path)
        if name.startswith("a."):
            assert outcome(lambda: TokenFile(corpus), name) is None
        elif name.startswith("tokenizer"):
            assert outcome(lambda: load_tokenizer(str(path)), name) is None
        else:
            assert outcome(lambda: find_inputs([path]), name) is None
        path.rmdir() if path.is_dir() else path.unlink()
