"""SentencePiece models as tokenizers of Hugging Face's `tokenizers` library, with the same ids.

Pieces have a space where SentencePiece writes U+2581. So a space needs no translation, and a real U+2581 is
a character like others.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple

from megatron_dlm.data.tokenizer import SentencePieceTokenizer, Tokenizer
from megatron_dlm.errors import DataError
from megatron_dlm.packages import optional_module

_SPACE_MARK = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_RESERVED = (_UNKNOWN, _CONTROL, _BYTE)
"""Kinds whose names SentencePiece does not look for in text."""
_UNIGRAM, _BPE = 1, 2


def backend_of(tokenizer: SentencePieceTokenizer) -> Any:
    """A tokenizers.Tokenizer with the pieces of the model as its ids, to be compared with `tokenizer` on texts.

    Control pieces are special tokens; the control ids that the model lacks are not added.

    Raises:
        DataError: the library is missing, or has no such kind of model; one line.
    """
    library, model = optional_module("tokenizers", f"an export of {tokenizer.source}"), _read_model(tokenizer.content)
    backend = library.Tokenizer(_pieces_model(library, tokenizer.source, model))
    if normalizers := _normalizers(library, tokenizer, model):
        backend.normalizer = library.normalizers.Sequence(normalizers)
    if splits := _splits(library, tokenizer, model):
        backend.pre_tokenizer = library.pre_tokenizers.Sequence(splits)
    backend.decoder = library.decoders.Sequence(_decoders(library, model))
    controls = [piece.text for piece in model.pieces if piece.kind == _CONTROL]
    backend.add_special_tokens([library.AddedToken(name, special=True, normalized=False) for name in controls])
    return backend


class _Piece(NamedTuple):
    text: str
    """With spaces for U+2581, unless it is a reserved name."""
    score: float
    kind: int


class _Model(NamedTuple):
    """What a SentencePiece *.model says; names and defaults are those of sentencepiece_model.proto."""

    pieces: list[_Piece]
    model_type: int
    unk_surface: str
    precompiled_charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool

    @property
    def unknown(self) -> int:
        """Id of what stands for anything else."""
        return next(i for i, piece in enumerate(self.pieces) if piece.kind == _UNKNOWN)

    @property
    def byte_fallback(self) -> bool:
        """Whether bytes stand for anything else instead."""
        return any(piece.kind == _BYTE for piece in self.pieces)

    @property
    def symbols(self) -> list[str]:
        """User-defined pieces; of two that begin alike the longer one, which is the one that counts, is first."""
        return sorted((piece.text for piece in self.pieces if piece.kind == _USER_DEFINED), key=len, reverse=True)

    @property
    def has_words(self) -> bool:
        """Whether a user-defined piece is longer than a character; nothing merges with those in any case."""
        return any(len(symbol) > 1 for symbol in self.symbols)


def _read_model(content: bytes) -> _Model:
    """Parsed here, as sentencepiece's own reader of the file needs protobuf, which nothing else here does."""
    fields = list(_fields(content))
    pieces = []
    for piece in (dict(_fields(value)) for number, value in fields if number == 1):
        text, kind = piece[1].decode(), piece.get(3, _NORMAL)
        (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
        pieces.append(_Piece(text if kind in _RESERVED else text.replace(_SPACE_MARK, " "), score, kind))
    trainer = dict(_fields(b"".join(value for number, value in fields if number == 2)))
    normalizer = dict(_fields(b"".join(value for number, value in fields if number == 3)))
    return _Model(
        pieces=pieces,
        model_type=trainer.get(3, _UNIGRAM),
        unk_surface=trainer.get(44, " \u2047 ".encode()).decode(),
        precompiled_charsmap=normalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, True)),
        remove_extra_whitespaces=bool(normalizer.get(4, True)),
    )


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value, an integer or bytes, of the fields of a protobuf message in its wire format."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        else:
            length = {1: 8, 5: 4}.get(tag & 7) or varint()
            yield tag >> 3, message[at : at + length]
            at += length


def _pieces_model(library: ModuleType, source: str, model: _Model) -> Any:
    """A model of the library that has the pieces as its tokens."""
    pieces = model.pieces
    if len({piece.text for piece in pieces}) < len(pieces):
        raise DataError(f"{source} has a piece twice; transformers needs a model that has each once")
    unknown, byte_fallback = model.unknown, model.byte_fallback
    if model.model_type == _UNIGRAM:
        vocabulary = [(piece.text, piece.score) for piece in pieces]
        return library.models.Unigram(vocabulary, unk_id=unknown, byte_fallback=byte_fallback)
    if model.model_type == _BPE:
        return library.models.BPE(
            vocab={piece.text: i for i, piece in enumerate(pieces)},
            merges=_merges(source, pieces),
            unk_token=pieces[unknown].text,
            fuse_unk=True,
            byte_fallback=byte_fallback,
            ignore_merges=model.has_words,
        )
    raise DataError(f"{source} is no byte-pair or unigram model, which is all that transformers can have")


def _merges(source: str, pieces: Sequence[_Piece]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, best first.

    SentencePiece merges two neighbours that make the piece with the highest score, and of equals the leftmost; the
    library the pair that comes first in a list. They agree if no two pieces have one score. Two ways to make one piece
    matter only where they overlap, as in a run of one character, and there longer parts are on the left.
    """
    scores = {piece.text: piece.score for piece in pieces if piece.kind == _NORMAL}
    made = [score for text, score in scores.items() if len(text) > 1]
    if len(set(made)) < len(made):
        raise DataError(f"{source} has pieces with equal scores, which transformers cannot merge in the same order")
    pairs = [
        (-score, -cut, text[:cut], text[cut:])
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def _normalizers(library: ModuleType, tokenizer: SentencePieceTokenizer, model: _Model) -> list[Any]:
    """Steps, in order, of what SentencePiece does to a text before it splits it."""
    replace, regex = library.normalizers.Replace, library.Regex
    steps = _mapping(library, tokenizer, model) if model.precompiled_charsmap else []
    if model.remove_extra_whitespaces:
        steps += [replace(regex(r"\A +"), ""), replace(regex(" {2,}"), " ")]
    if tokenizer.decode(tokenizer.encode(_SPACE_MARK)) != _SPACE_MARK:  # a model that takes it for a space
        steps.append(replace(_SPACE_MARK, " "))
    if model.remove_extra_whitespaces:
        steps.append(replace(regex(r" +\z"), ""))
    return steps + ([library.normalizers.Prepend(" ")] if model.add_dummy_prefix else [])


def _mapping(library: ModuleType, tokenizer: SentencePieceTokenizer, model: _Model) -> list[Any]:
    """The model's map of characters, which leaves user-defined pieces as they are.

    Those that it would change are noncharacters meanwhile, which texts do not have.
    """
    replace, mapping = library.normalizers.Replace, library.normalizers.Precompiled(model.precompiled_charsmap)
    changed = [symbol for symbol in model.symbols if mapping.normalize_str(symbol) != symbol]
    guards = [(symbol, chr(0xFDD0 + i)) for i, symbol in enumerate(changed[:32])]
    steps = [*(replace(symbol, guard) for symbol, guard in guards), mapping]
    if tokenizer.encode("a\r\nb") == tokenizer.encode("a\n\nb"):
        # The library would take the two for one character of the map.
        steps.insert(0, replace("\r\n", "\n\n"))
    return steps + [replace(guard, symbol) for symbol, guard in guards]


def _splits(library: ModuleType, tokenizer: Tokenizer, model: _Model) -> list[Any]:
    """Cuts of a text before the model sees it.

    User-defined pieces are words of their own in a byte-pair model, and have a high score in a unigram model. Reserved
    names are cut in two for a model that would find them.
    """
    if model.model_type == _BPE and not model.has_words:
        return []
    patterns = [
        (_cut_pattern(tokenizer, [p.text for p in model.pieces if p.kind in _RESERVED]), "merged_with_previous")
    ]
    if model.model_type == _BPE:
        patterns.insert(0, ("|".join(map(_escape, model.symbols)), "isolated"))
    return [library.pre_tokenizers.Split(library.Regex(pattern), behavior) for pattern, behavior in patterns]


def _decoders(library: ModuleType, model: _Model) -> list[Any]:
    """Steps from pieces to a text."""
    kinds = library.decoders
    steps = [kinds.Replace(model.pieces[model.unknown].text, model.unk_surface)]
    if model.byte_fallback:
        steps.append(kinds.ByteFallback())
    steps.append(kinds.Fuse())
    return steps + ([kinds.Strip(" ", 1, 0)] if model.add_dummy_prefix else [])


def _escape(text: str) -> str:
    """`text` as a regular expression of the library, which is not Python's."""
    return "".join(f"\\x{{{ord(character):X}}}" for character in text)


def _cut_pattern(tokenizer: Tokenizer, names: Iterable[str]) -> str:
    """Matches the first part of every name, where the rest follows: cut there, the name is not found in a text.

    The cut is where the tokenizer itself splits the name in a text, so that its pieces are still found.
    """
    rests: dict[str, list[str]] = {}
    for name in names:
        ends = accumulate(len(tokenizer.decode([i])) for i in tokenizer.encode("a" + name))
        cut = next((end - 1 for end in ends if 1 < end <= len(name)), 1)
        rests.setdefault(name[:cut], []).append(name[cut:])
    return "|".join(f"{_escape(head)}(?={'|'.join(map(_escape, tails))})" for head, tails in rests.items())
