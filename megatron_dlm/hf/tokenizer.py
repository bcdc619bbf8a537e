"""Tokenizers in the form that transformers' AutoTokenizer loads without remote code, with the same ids for every text.

Nothing here imports transformers: a tokenizer.json is built with the `tokenizers` library, written beside its place,
read back and compared with the tokenizer that it stands for, and then moved into place.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_dlm.data.tokenizer import (
    END_OF_DOCUMENT_PIECE,
    MASK_PIECE,
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from megatron_dlm.errors import DataError
from megatron_dlm.hf import from_sentencepiece
from megatron_dlm.packages import optional_module

_MODEL, _SETTINGS = "tokenizer.json", "tokenizer_config.json"


def save_pretrained_tokenizer(tokenizer: Tokenizer, directory: Path, *, add_bos: bool, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json into `directory`, made if need be; both or, on errors, neither.

    What they give in transformers is compared with `tokenizer` on sample texts and on its whole vocabulary. They read
    a special token that is spelled in a text as that token, which `tokenizer.encode` does not. `load_tokenizer` takes
    the directory too, and then it has the same ids for such texts as well.

    Models without normalisation are the same for every text. Two kinds of SentencePiece models cannot be, and no
    comparison has all texts. A unigram model has splits that are equally probable, where rounding decides: one that
    shows this on the samples is refused. A normalisation such as nmt_nfkc composes characters, which transformers does
    in most texts, but not with decomposed Hangul and kana and rare combining marks: that is accepted.

    Args:
        tokenizer: any tokenizer of `load_tokenizer`.
        directory: of the export.
        add_bos: end-of-document comes first where special tokens are added, and is the bos_token.
        max_length: tokens that the model takes, for transformers' warnings and truncation.

    Raises:
        DataError: the `tokenizers` library is not installed or cannot stand for this tokenizer exactly; one line.
        OSError: the files cannot be written.
    """
    backend = _backend(tokenizer)
    end_id, mask_id = tokenizer.end_of_document_id, tokenizer.mask_token_id
    added = sorted([(end_id, END_OF_DOCUMENT_PIECE), (mask_id, MASK_PIECE)])
    names = {i: _control_name(backend, i, piece) for i, piece in added}
    _add_special_tokens(backend, names.values())
    if any(backend.token_to_id(name) != i for i, name in names.items()):
        raise DataError(
            f"{tokenizer.source} has gaps between its ids, so control tokens cannot be added for transformers; use "
            f"one with special tokens that {_SETTINGS} names as mask_token and eos_token"
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"bos_token": names[end_id]} if add_bos else {}),
        "eos_token": names[end_id],
        "pad_token": names[end_id],
        "mask_token": names[mask_id],
        "padding_side": "left",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    if add_bos:
        backend.post_processor = _library().processors.TemplateProcessing(
            single="bos:0 $A:0",
            pair="bos:0 $A:0 bos:1 $B:1",
            special_tokens=[{"id": "bos", "ids": [end_id], "tokens": [names[end_id]]}],
        )
        # From this entry transformers writes the template again, in a language without names that have such characters.
        if not re.search(r"[\s:$]", names[end_id]):
            settings["add_bos_token"] = True
    elif backend.num_special_tokens_to_add(False):
        backend.post_processor = None
    content = {_SETTINGS: json.dumps(settings, indent=2) + "\n", _MODEL: backend.to_str(pretty=True) + "\n"}
    _write_checked(tokenizer, directory, content, [end_id] if add_bos else [])


def _library() -> ModuleType:
    return optional_module("tokenizers", "a tokenizer for transformers")


def _backend(tokenizer: Tokenizer) -> Any:
    """A tokenizers.Tokenizer with the ids of `tokenizer`, but maybe without its control ids."""
    if isinstance(tokenizer, ByteTokenizer):
        return _byte_backend()
    if isinstance(tokenizer, SentencePieceTokenizer):
        return from_sentencepiece.backend_of(tokenizer)
    assert isinstance(tokenizer, HuggingFaceTokenizer), type(tokenizer)
    state = json.loads(tokenizer.content)
    return _library().Tokenizer.from_str(json.dumps({**state, "truncation": None, "padding": None}))


def _control_name(backend: Any, i: int, piece: str) -> str:
    """Name of the token `i`, or, where there is none yet, `piece` or a name like it that is free."""
    existing = backend.id_to_token(i)
    if existing is not None:
        return existing
    name, count = piece, 1
    while backend.token_to_id(name) is not None:
        count += 1
        name = f"{piece[:-2]}_{count}|>"
    return name


def _add_special_tokens(backend: Any, names: Iterable[str]) -> None:
    """Those that the model has keep their ids and properties, the others follow in order after the last id."""
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    added = _library().AddedToken
    backend.add_special_tokens([added(name, special=True, normalized=False) for name in names if name not in known])


def _byte_backend() -> Any:
    """Bytes are written as the printable characters that byte-level tokenizers agree on: GPT-2's alphabet."""
    library = _library()
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
    backend = library.Tokenizer(library.models.BPE({spelling[byte]: byte for byte in range(256)}, []))
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = library.decoders.ByteLevel()
    return backend


def _write_checked(tokenizer: Tokenizer, directory: Path, content: dict[str, str], prefix: list[int]) -> None:
    """Write the files, by name, if they stand for `tokenizer`; `prefix` is what comes before every text's ids."""
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=directory) as folder:
            for name, text in content.items():
                (Path(folder) / name).write_text(text, encoding="utf-8")
            _check(tokenizer, Path(folder), prefix)
            for name in content:
                os.replace(Path(folder) / name, directory / name)
    except BaseException:
        if made and not any(directory.iterdir()):
            directory.rmdir()
        raise


def _check(tokenizer: Tokenizer, folder: Path, prefix: list[int]) -> None:
    """Raises DataError unless the files in `folder` have the ids and texts of `tokenizer`."""
    backend, again = _library().Tokenizer.from_file(str(folder / _MODEL)), load_tokenizer(str(folder))
    for name in ("mask_token_id", "end_of_document_id", "vocab_size"):
        ours, theirs = getattr(tokenizer, name), getattr(again, name)
        if ours != theirs:
            raise DataError(
                f"{tokenizer.source} as a tokenizer.json has {name} {theirs} and not {ours}: text can spell its "
                "control tokens; use a tokenizer whose control tokens are special tokens"
            )
    special = {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}
    for text in _texts(tokenizer):
        if any(name in text for name in special.values()):
            continue
        ours, theirs = tokenizer.encode(text), backend.encode(text).ids
        if theirs != prefix + ours:
            theirs = theirs[len(prefix) :]
            at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))
            part = slice(max(at - 2, 0), at + 8)
            raise DataError(
                f"{tokenizer.source} splits texts in a way that transformers cannot have: near "
                f"{tokenizer.decode(ours[part])!r} the ids are {ours[part]} and would be {theirs[part]}; use a "
                "byte-pair model that does not normalise, or a tokenizer.json"
            )
        shown = [i for i in ours if i not in special]  # transformers leaves out special ones, such as an [UNK]
        if backend.decode(shown) != tokenizer.decode(shown):
            raise DataError(
                f"{tokenizer.source} makes a text of ids in a way that transformers cannot have, such as "
                f"{tokenizer.decode(shown)[:40]!r}; use a byte-pair model that does not normalise, or a tokenizer.json"
            )


def _texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Sample texts, a long one of them all, and texts of all pieces of the vocabulary."""
    yield from _SAMPLES
    yield "".join(_SAMPLES)
    pieces = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    count = len(pieces) // 16 + 1
    for first in range(count):
        some = pieces[first::count]
        yield "".join(some)
        yield " ".join(some)
        yield "\n".join(reversed(some))


_SAMPLES = (
    "",
    " ",
    "\n",
    "\u2581",
    "The quick brown fox (aged 7) can't jump over 13 lazy dogs; it's 3.14159, 1,000,000 or 0x7F on 2024-02-29.",
    "def f(x: int) -> str:\n    if x != 0:\n\treturn f'{x:>8}'\n\n\n    return \"\\n\" + '\\t'  # nothing\n",
    'for (int i = 0; i < n; i++) {\r\n\t\ta[i] += b[i] ** 2;\r\n}\r\n<p class="x">a&amp;b</p> $x^2_{ij}$ **bold**',
    "  two\t\ttabs   and    spaces  \n\n \n\t \n      more        and\t more ",
    "na\u00efve caf\u00e9 cafe\u0301 \u0141\u00f3d\u017a Stra\u00dfe \u1e9e \u00bd \ufb01 \u2026 \u201cq\u201d \u20ac",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0393\u03b5\u03b9\u03ac \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628",
    "\u0646\u0651\u064e \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \uff21\uff43\uff11",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u306b\u3061\u306f\u30ab\u30ac \uc548\ub155\ud558\uc138 \U00020bb7",
    "\U0001f600\U0001f469\u200d\U0001f4bb\U0001f1ea\U0001f1fa\U0001f44d\U0001f3fd \u2764\ufe0f ok \U0001f4a5\U0001f4a5",
    "\u2581\u2581a \u2581 b\u2581c \n\u2581\u00a0d\u200be\u3000f\ufeffg\u00ad",
    "\0\x01\x07\x1b[0m\x7f\u0085 \ufffd \U0010ffff",
    # Rules of a table or a comment. A unigram model has many ways to split them that are equally probable.
    *("\n".join(character * length for length in range(2, 81)) for character in "-=_*#.~/ a"),
)
