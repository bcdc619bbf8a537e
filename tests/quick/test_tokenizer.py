"""Tokenizers: exact round trips, control ids that no text produces, fingerprints, errors."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from megatron_dlm.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from megatron_dlm.errors import DataError
from megatron_dlm.preparation.documents import embedded_documents
from megatron_dlm.preparation.sentencepiece_training import train_sentencepiece

CONTROL_WORDS = ("<|mask|>", "<|end_of_document|>", "[MASK]", "<mask>", "<|endoftext|>", "</s>", "<unk>", "<0x41>")
AWKWARD = (
    "",
    " ",
    "\n",
    "\t\t x\r\n\r\n  y  \n",
    "a    b\n\n\n\tc ",
    "\0\x01\x7f",
    "\u2581 \u2581\u2581a\u2581",
    "\ufeffna\u00efve \u4f60\u597d \U0001f600 e\u0301",
    " ".join(CONTROL_WORDS),
    *(f"{before}{word}{after}" for word in CONTROL_WORDS for before, after in (("", ""), ("a", "b"), (" ", "\n"))),
)


@pytest.fixture(scope="module")
def sources() -> list[str]:
    return [document.text for document in itertools.islice(embedded_documents(), 0, None, 5)]


@pytest.fixture(scope="module")
def sentencepiece_path(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    train_sentencepiece(sources, 1024, path)
    return path


def byte_level_bpe(folder: Path, special: tuple[str, ...] = ("<|endoftext|>", "<|mask|>")) -> Path:
    """A small byte-level BPE tokenizer.json, lossless, with special tokens, truncation and padding."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([f"hello <|mask|> world {i}" for i in range(50)], trainer)
    model.enable_truncation(8)
    model.enable_padding(length=16)
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(params=["byte", "sentencepiece", "huggingface"])
def tokenizer(request: pytest.FixtureRequest, sentencepiece_path: Path, tmp_path: Path) -> Tokenizer:
    makers: dict[str, Callable[[], Tokenizer]] = {
        "byte": ByteTokenizer,
        "sentencepiece": lambda: SentencePieceTokenizer(sentencepiece_path),
        "huggingface": lambda: HuggingFaceTokenizer(byte_level_bpe(tmp_path / "hf")),
    }
    return makers[request.param]()


def test_round_trip_of_the_standard_library(tokenizer: Tokenizer, sources: list[str]) -> None:
    for text in sources[::3]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert min(ids) >= 0 and max(ids) < tokenizer.vocab_size


def test_round_trip_of_awkward_text_without_control_ids(tokenizer: Tokenizer) -> None:
    for text in AWKWARD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.mask_token_id not in ids and tokenizer.end_of_document_id not in ids


def test_sentencepiece_gives_back_every_character(sentencepiece_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(sentencepiece_path)
    characters = [chr(c) for c in (*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 89))]
    for joint in ("", " ", "x "):
        text = joint.join(characters)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.mask_token_id, tokenizer.end_of_document_id} & set(ids)


def test_sentencepiece_uses_its_control_pieces_and_keeps_indentation_short(sentencepiece_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(sentencepiece_path)
    assert tokenizer.vocab_size == 1024
    assert {tokenizer.mask_token_id, tokenizer.end_of_document_id} < set(range(1024))
    assert len(tokenizer.encode("\n        self")) <= 4


def test_training_is_deterministic(sources: list[str], tmp_path: Path) -> None:
    for name in ("a.model", "b.model"):
        train_sentencepiece(sources[:20], 600, tmp_path / name)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


@pytest.mark.parametrize("text", ["the quick brown fox " * 20_000, "\tthe quick\tbrown fox\n" * 100])
def test_training_takes_long_lines_and_tabs(text: str, tmp_path: Path) -> None:
    train_sentencepiece([text], 300, tmp_path / "a.model")
    assert len(SentencePieceTokenizer(tmp_path / "a.model").encode("quick quick")) < 8


@pytest.mark.parametrize(("vocab_size", "texts"), [(100, ["abc " * 50]), (5000, ["abc " * 50]), (500, [])])
def test_training_on_texts_that_do_not_fit_is_one_sentence(vocab_size: int, texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"SentencePiece vocabulary of {vocab_size} .*another size") as raised:
        train_sentencepiece(texts, vocab_size, tmp_path / "x.model")
    assert "\n" not in str(raised.value) and not (tmp_path / "x.model").exists()


def test_foreign_sentencepiece_model_whose_mask_is_a_word_of_text(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world of pieces"] * 20),
        model_writer=model,
        vocab_size=30,
        hard_vocab_limit=False,
        user_defined_symbols=["<mask>"],
        minloglevel=2,
    )
    path = tmp_path / "foreign.model"
    path.write_bytes(model.getvalue())
    tokenizer = SentencePieceTokenizer(path)
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    assert (tokenizer.mask_token_id, tokenizer.vocab_size) == (size, size + 1)
    assert tokenizer.end_of_document_id == 2  # its own control piece </s>
    ids = tokenizer.encode("hello <mask> world</s>")
    assert not {tokenizer.mask_token_id, tokenizer.end_of_document_id} & set(ids)
    assert "hello" in tokenizer.decode([*ids, tokenizer.mask_token_id, tokenizer.end_of_document_id])


def test_huggingface_control_tokens_by_name_or_configuration(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(byte_level_bpe(tmp_path / "named"))
    assert (tokenizer.end_of_document_id, tokenizer.mask_token_id) == (0, 1)
    assert len(tokenizer.encode("hello world " * 40)) > 16  # the file's truncation and padding do not apply

    folder = byte_level_bpe(tmp_path / "configured", special=("<end>", "<hole>"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<end>", "mask_token": {"content": "<hole>"}}), encoding="utf-8"
    )
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.end_of_document_id, tokenizer.mask_token_id) == (0, 1)
    assert load_tokenizer(tokenizer.save(tmp_path / "copy")).fingerprint == tokenizer.fingerprint

    assert tokenizer.end_note == ""

    tokenizer = HuggingFaceTokenizer(byte_level_bpe(tmp_path / "none", special=()))
    assert tokenizer.end_note == "no eos_token of tokenizer_config.json is in it"
    assert tokenizer.mask_token_id == tokenizer.vocab_size - 1 == tokenizer.end_of_document_id + 1


def test_huggingface_mask_that_text_can_spell_is_replaced_by_a_new_id(tmp_path: Path) -> None:
    words = {"[UNK]": 0, "[MASK]": 1, "hello": 2, "</s>": 3}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(["[UNK]", "[MASK]"])
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("hello [MASK] hello") == [2, 1, 2]
    assert (tokenizer.end_of_document_id, tokenizer.mask_token_id, tokenizer.vocab_size) == (4, 5, 6)
    assert tokenizer.end_note == "text can spell its </s>"


def test_decode_skips_control_ids_and_ids_outside(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello")
    extra = [tokenizer.mask_token_id, tokenizer.end_of_document_id, tokenizer.vocab_size, -1]
    assert tokenizer.decode([*extra, *ids, *extra]) == "hello"


def test_saved_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    spec = tokenizer.save(folder)
    for again in (load_tokenizer(spec), load_tokenizer(str(folder))):
        assert type(again) is type(tokenizer)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode("a b\n") == tokenizer.encode("a b\n")
        assert (again.vocab_size, again.mask_token_id) == (tokenizer.vocab_size, tokenizer.mask_token_id)


def test_fingerprints_differ(sentencepiece_path: Path, sources: list[str], tmp_path: Path) -> None:
    train_sentencepiece(sources[:20], 1000, tmp_path / "b.model")
    made = [ByteTokenizer(), SentencePieceTokenizer(sentencepiece_path), SentencePieceTokenizer(tmp_path / "b.model")]
    assert len({tokenizer.fingerprint for tokenizer in made}) == 3
    assert all(len(tokenizer.fingerprint) == 64 for tokenizer in made)


def test_unknown_tokenizers_are_one_sentence(tmp_path: Path) -> None:
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"not a model")
    broken_json = tmp_path / "tokenizer.json"
    broken_json.write_text("{}", encoding="utf-8")
    empty = tmp_path / "empty"
    empty.mkdir()
    for spec, message in (
        ("bytes", "is no tokenizer"),
        (str(tmp_path / "absent.model"), "No such file"),
        (str(broken), "not a SentencePiece model"),
        (str(broken_json), "is no tokenizer.json"),
        (str(empty), "holds no tokenizer.json or tokenizer.model"),
    ):
        with pytest.raises(DataError, match=message) as raised:
            load_tokenizer(spec)
        assert "\n" not in str(raised.value)
