"""Exported tokenizers: transformers' AutoTokenizer and our loader have the ids and texts of the tokenizer exported."""

from __future__ import annotations

import io
import itertools
import json
import logging
import pydoc_data.topics
import random
import struct
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers

from megatron_dlm.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from megatron_dlm.errors import DataError
from megatron_dlm.hf.tokenizer import save_pretrained_tokenizer
from megatron_dlm.preparation.documents import embedded_documents
from megatron_dlm.preparation.sentencepiece_training import train_sentencepiece

TOPICS = list(pydoc_data.topics.topics.values())
SOURCES = [document.text for document in itertools.islice(embedded_documents(), 0, None, 90)]
MAX_LENGTH = 1_000_000_000
AWKWARD = (
    "",
    " ",
    "\n",
    "  a\r\n\tb \u00a0 c\u200b",
    "\0\x01\x7f\u0085",
    "\u2581",
    " \u2581\u2581a\u2581 ",
    "na\u00efve e\u0301 \u4f60\u597d \uc548\ub155 \U0001f469\u200d\U0001f4bb \ufb01 \uff21\u2460",
    "    " * 40 + "x" + "=" * 79,
    "0123456789 3.14 1,000",
)
SYMBOLS = ("<|user|>", "\n", "\n\n", "\u2581\u2581", "\u2581\u2581\u2581\u2581")
LLAMA = {
    "model_type": "bpe",
    "vocab_size": 1500,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
}
FOREIGN: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "pad_id": 3},
    "llama_with_symbols": {**LLAMA, "user_defined_symbols": [*SYMBOLS]},
    "gemma": {**LLAMA, "user_defined_symbols": [*SYMBOLS, "<mask>"], "control_symbols": ["<|mask|>"]}
    | {"add_dummy_prefix": False},
    "bpe_nmt_nfkc": {"model_type": "bpe", "vocab_size": 1000, "user_defined_symbols": ["\n", "\t", "\uff1f!"]},
    "bpe_nmt_nfkc_spaces": {**LLAMA, "normalization_rule_name": "nmt_nfkc"},
}
EXACT = ("byte", "sentencepiece", "llama", "llama_with_symbols", "gemma", "huggingface", "huggingface_bare")
NORMALISING = ("bpe_nmt_nfkc", "bpe_nmt_nfkc_spaces")


def foreign_sentencepiece(path: Path, texts: Iterable[str] = TOPICS, **options: Any) -> SentencePieceTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n")),
        model_writer=model,
        **{"num_threads": 1, "minloglevel": 3} | options,
    )
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


def huggingface(folder: Path, special: Sequence[str], **settings: Any) -> HuggingFaceTokenizer:
    """A byte-level BPE like Llama-3's: words cut by a pattern, text before every sequence, truncation and padding."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    pieces = tokenizers.pre_tokenizers
    model.pre_tokenizer = pieces.Sequence(
        [
            pieces.Split(tokenizers.Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pieces.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<|begin|>", *special],
        initial_alphabet=pieces.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TOPICS[::4], trainer)
    model.add_tokens(["<tool>"])
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)]
    )
    model.enable_truncation(8)
    model.enable_padding(length=16)
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return HuggingFaceTokenizer(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    """Tokenizers by name, each made once."""
    folder, known = tmp_path_factory.mktemp("tokenizers"), dict[str, Tokenizer]()

    def ours() -> Tokenizer:
        train_sentencepiece(SOURCES, 1500, folder / "ours.model")
        return SentencePieceTokenizer(folder / "ours.model")

    makers: dict[str, Callable[[], Tokenizer]] = {
        "byte": ByteTokenizer,
        "sentencepiece": ours,
        "huggingface": lambda: huggingface(folder / "hf", ["<|endoftext|>", "<hole>"], mask_token="<hole>"),
        "huggingface_bare": lambda: huggingface(folder / "bare", []),
    }

    def make(name: str) -> Tokenizer:
        if name not in known:
            maker = makers.get(name) or (lambda: foreign_sentencepiece(folder / f"{name}.model", **FOREIGN[name]))
            known[name] = maker()
        return known[name]

    return make


@pytest.fixture
def exported(made: Callable[[str], Tokenizer], tmp_path: Path) -> Callable[..., tuple[Tokenizer, Any]]:
    """The tokenizer of a name, and what transformers loads of its export into `tmp_path / "export"`."""

    def export(name: str, add_bos: bool = False) -> tuple[Tokenizer, Any]:
        folder = tmp_path / "export"
        save_pretrained_tokenizer(made(name), folder, add_bos=add_bos, max_length=MAX_LENGTH)
        return made(name), transformers.AutoTokenizer.from_pretrained(folder)

    return export


def special_names(theirs: Any) -> list[str]:
    return [token.content for token in theirs.added_tokens_decoder.values() if token.special]


def random_texts(tokenizer: Tokenizer, theirs: Any, count: int, scalars: Sequence[range]) -> list[str]:
    """Half of them made of characters, half of pieces of the vocabulary; none spells a special token."""
    chooser = random.Random(1)
    pieces = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    often = "aA1 \n\t-<>|\u2581"
    texts = []
    for i in range(count):
        length = chooser.randint(1, 40)
        if i % 2:
            text = "".join(chooser.choice(pieces) for _ in range(length))
        else:
            characters = (chr(chooser.choice(chooser.choice(scalars))) for _ in range(length))
            text = "".join(chooser.choice((character, chooser.choice(often))) for character in characters)
        texts.append(text)
    return [text for text in texts if not any(name in text for name in special_names(theirs))]


def compare(tokenizer: Tokenizer, theirs: Any, texts: Iterable[str], prefix: Sequence[int] = ()) -> None:
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == [*prefix, *ids], text
        assert theirs.decode([*prefix, *ids], skip_special_tokens=True) == tokenizer.decode(ids), text


@pytest.mark.parametrize("name", EXACT)
def test_ids_and_texts_are_equal(name: str, exported: Callable[..., tuple[Tokenizer, Any]]) -> None:
    tokenizer, theirs = exported(name)
    everything = (range(0xD800), range(0xE000, 0x10000), range(0x1F000, 0x20000), range(0x10000, 0x110000))
    compare(tokenizer, theirs, [*AWKWARD, *TOPICS[::2], *SOURCES])
    compare(tokenizer, theirs, random_texts(tokenizer, theirs, 2000, everything))


@pytest.mark.parametrize("name", NORMALISING)
def test_ids_and_texts_are_equal_after_normalisation(name: str, exported: Callable[..., tuple[Tokenizer, Any]]) -> None:
    """Without the characters that compose with others; see `save_pretrained_tokenizer`."""
    tokenizer, theirs = exported(name)
    single = (range(0x20, 0x250), range(0x4E00, 0x9FFF), range(0xAC00, 0xD7A4), range(0xFF10, 0xFF5F))
    compare(tokenizer, theirs, [*AWKWARD, *TOPICS[::2], *SOURCES])
    compare(tokenizer, theirs, random_texts(tokenizer, theirs, 2000, single))


@pytest.mark.parametrize("name", [*EXACT, *NORMALISING])
def test_our_loader_has_the_same_tokenizer(
    name: str, exported: Callable[..., tuple[Tokenizer, Any]], tmp_path: Path
) -> None:
    tokenizer, theirs = exported(name, add_bos=True)
    again = load_tokenizer(str(tmp_path / "export"))
    for attribute in ("vocab_size", "mask_token_id", "end_of_document_id"):
        assert getattr(again, attribute) == getattr(tokenizer, attribute)
    names = {*special_names(theirs), "<unk>", "<0x41>", "<s>", "</s>", "<mask>", "<|user|>"}
    around = (("", ""), ("a", "b"), (" ", "\n"), ("\n", "\n"), ("<", ">"))
    spelled = [f"{before}{word}{after}" for word in sorted(names) for before, after in around]
    for text in [*spelled, *AWKWARD, *TOPICS[::8]]:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids, text
        controls = [tokenizer.mask_token_id, tokenizer.end_of_document_id]
        assert again.decode([*controls, *ids, *controls]) == tokenizer.decode(ids), text


def test_runs_are_merged_alike(tmp_path: Path) -> None:
    """Models of two characters, where one piece has many overlapping places and ways to be made."""
    for seed in range(12):
        chooser = random.Random(seed)
        texts = ["".join(chooser.choice("ab ") * chooser.randint(1, 9) for _ in range(40)) for _ in range(200)]
        spaces = {"split_by_whitespace": seed % 2 == 0, "allow_whitespace_only_pieces": True}
        options = {**LLAMA, "vocab_size": 330, "hard_vocab_limit": False, **spaces}
        tokenizer = foreign_sentencepiece(tmp_path / "runs.model", texts[:100], **options)
        save_pretrained_tokenizer(tokenizer, tmp_path / "export", add_bos=False, max_length=8)
        again = load_tokenizer(str(tmp_path / "export"))
        assert [again.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
        assert 2 * sum(map(len, map(tokenizer.encode, texts))) < sum(map(len, texts))  # it does merge


@pytest.mark.parametrize("model_type", [None, "qwen3", "llama"])
@pytest.mark.parametrize("name", ["byte", "sentencepiece", "llama", "huggingface", "huggingface_bare"])
def test_loads_without_a_warning_whatever_the_model(
    name: str, model_type: str | None, made: Callable[[str], Tokenizer], tmp_path: Path, tmp_path_factory: Any
) -> None:
    tokenizer = made(name)
    save_pretrained_tokenizer(tokenizer, tmp_path, add_bos=True, max_length=77)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert messages == []
    end, mask = tokenizer.end_of_document_id, tokenizer.mask_token_id
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id) == (
        end,
        end,
        end,
        mask,
    )
    assert (theirs.padding_side, theirs.model_max_length) == ("left", 77)
    short, long = tokenizer.encode("a b"), tokenizer.encode("a b c d e f g")
    padding = [end] * (len(long) - len(short))
    assert theirs(["a b", "a b c d e f g"], padding=True)["input_ids"] == [[*padding, end, *short], [end, *long]]
    assert theirs("a b", add_special_tokens=False)["input_ids"] == short
    assert theirs("a b" + theirs.mask_token, add_special_tokens=False)["input_ids"] == [*short, mask]
    assert theirs.decode([end, *short, mask], skip_special_tokens=True) == "a b"
    theirs.save_pretrained(tmp_path / "again")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "again")("a b")["input_ids"] == [end, *short]


def test_without_bos_nothing_comes_first(exported: Callable[..., tuple[Tokenizer, Any]]) -> None:
    tokenizer, theirs = exported("huggingface_bare")
    assert theirs.bos_token is None
    assert theirs("a", "b")["input_ids"] == [*tokenizer.encode("a"), *tokenizer.encode("b")]


@pytest.mark.parametrize("name", ["byte", "sentencepiece", "huggingface"])
def test_a_character_that_is_not_complete_yet_is_the_replacement_character(
    name: str, exported: Callable[..., tuple[Tokenizer, Any]]
) -> None:
    tokenizer, theirs = exported(name)
    ids = tokenizer.encode("a \U0001f9ff")
    assert len(ids) >= 5 and "\ufffd" in tokenizer.decode(ids[:-1])
    for length in range(len(ids) + 1):
        assert theirs.decode(ids[:length], skip_special_tokens=True) == tokenizer.decode(ids[:length])


def test_any_bytes_decode_alike(exported: Callable[..., tuple[Tokenizer, Any]]) -> None:
    tokenizer, theirs = exported("byte")
    chooser = random.Random(2)
    for _ in range(2000):
        ids = [chooser.choice((chooser.randrange(258), 0xE4, 0xBD, 0xF0, 0x9F, 0x98, 0x80)) for _ in range(9)]
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


def test_unigram_models_are_refused_only_where_they_differ(tmp_path: Path) -> None:
    words = ["".join(letter for letter in topic if letter in " bcdefghijklmnopqrstuvwxyz") for topic in TOPICS]
    options = {"model_type": "unigram", "vocab_size": 500, "user_defined_symbols": ["\n"]}
    plain = foreign_sentencepiece(tmp_path / "plain.model", words, **options)
    save_pretrained_tokenizer(plain, tmp_path / "plain", add_bos=True, max_length=MAX_LENGTH)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    compare(plain, theirs, [*AWKWARD, *TOPICS, *words, *SOURCES], prefix=[plain.end_of_document_id])
    again = load_tokenizer(str(tmp_path / "plain"))
    for text in ("</s>", "a<unk>b<s>c</s>"):
        assert again.encode(text) == plain.encode(text)

    ties = foreign_sentencepiece(tmp_path / "ties.model", model_type="unigram", vocab_size=2000)
    with pytest.raises(DataError, match="ties.model splits texts in a way .*near '.*the ids are .*; use ") as raised:
        save_pretrained_tokenizer(ties, tmp_path / "ties", add_bos=False, max_length=8)
    assert "\n" not in str(raised.value) and not (tmp_path / "ties").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "char", "vocab_size": 100}, "no byte-pair or unigram model"),
        ({**LLAMA, "vocab_size": 500, "treat_whitespace_as_suffix": True}, "splits texts"),
    ],
)
def test_models_that_transformers_cannot_have(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    tokenizer = foreign_sentencepiece(tmp_path / "odd.model", TOPICS[:20], **options)
    with pytest.raises(DataError, match=f"odd.model .*{message}"):
        save_pretrained_tokenizer(tokenizer, tmp_path / "export", add_bos=False, max_length=8)


def test_equal_scores_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "equal.model"
    foreign_sentencepiece(path, TOPICS[:20], **{**LLAMA, "vocab_size": 500})
    content, field = path.read_bytes(), b"\x15"  # scores of a trained model are 0, -1, -2, ...
    path.write_bytes(content.replace(field + struct.pack("<f", -7), field + struct.pack("<f", -8)))
    with pytest.raises(DataError, match="equal.model has pieces with equal scores"):
        save_pretrained_tokenizer(SentencePieceTokenizer(path), tmp_path / "export", add_bos=False, max_length=8)


def test_names_that_are_taken_and_ids_with_gaps(tmp_path: Path) -> None:
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()

    def model(more: dict[str, int], special: Sequence[str]) -> HuggingFaceTokenizer:
        words = {character: i for i, character in enumerate(sorted(alphabet))} | more
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens([*special])
        backend.save(str(tmp_path / "tokenizer.json"))
        return HuggingFaceTokenizer(tmp_path)

    taken = model({"<|mask|>": 256, "<|mask_2|>": 257}, [])
    save_pretrained_tokenizer(taken, tmp_path / "taken", add_bos=False, max_length=8)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "taken")
    assert (theirs.mask_token, theirs.mask_token_id, len(theirs)) == ("<|mask_3|>", 259, 260)

    with pytest.raises(DataError, match="tokenizer.json has gaps between its ids"):
        save_pretrained_tokenizer(model({"gap": 300}, []), tmp_path / "gap", add_bos=False, max_length=8)

    gaps = model({"<|mask|>": 300, "<|endoftext|>": 400}, ["<|mask|>", "<|endoftext|>"])
    save_pretrained_tokenizer(gaps, tmp_path / "gaps", add_bos=False, max_length=8)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "gaps")
    assert (theirs.mask_token_id, theirs.eos_token_id) == (gaps.mask_token_id, gaps.end_of_document_id) == (300, 400)


def test_a_special_token_of_unknown_words_is_no_text(tmp_path: Path) -> None:
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "hello": 1}, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(["[UNK]"])
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path)
    save_pretrained_tokenizer(tokenizer, tmp_path / "export", add_bos=False, max_length=8)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert theirs("hello you")["input_ids"] == tokenizer.encode("hello you") == [1, 0]
    assert theirs.decode([1, 0, tokenizer.mask_token_id], skip_special_tokens=True) == "hello"


class Changed(ByteTokenizer):
    """Bytes, but something is not as exported."""

    def __init__(self, encode: Callable[[str], list[int]] | None = None, decode: Any = None) -> None:
        super().__init__()
        self._encode, self._decode = encode or super().encode, decode or super().decode

    def encode(self, text: str) -> list[int]:
        return self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._decode(ids)


def test_what_differs_is_found_and_nothing_is_left(tmp_path: Path) -> None:
    def interrupted(text: str) -> list[int]:
        raise KeyboardInterrupt

    wrong: list[tuple[Tokenizer, type[BaseException], str]] = [
        (Changed(encode=lambda text: list(text.replace("\u2581", " ").encode())), DataError, "byte splits texts"),
        (Changed(decode=lambda ids: bytes(ids).decode(errors="ignore").strip()), DataError, "byte makes a text"),
        (Changed(encode=interrupted), KeyboardInterrupt, "^$"),
    ]
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "tokenizer.json").write_text("before", encoding="utf-8")
    for tokenizer, error, message in wrong:
        for folder in (kept, tmp_path / "new"):
            with pytest.raises(error, match=message):
                save_pretrained_tokenizer(tokenizer, folder, add_bos=False, max_length=8)
        assert [path.name for path in tmp_path.rglob("*")] == ["kept", "tokenizer.json"]
    assert (kept / "tokenizer.json").read_text(encoding="utf-8") == "before"
