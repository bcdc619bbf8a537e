"""A Hugging Face tokenizer as a checkpoint's: the same ids, with [MASK] and end-of-document among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dlm.data.tokenizer import END_OF_DOCUMENT_PIECE, MASK_PIECE, Tokenizer, load_tokenizer
from megatron_dlm.errors import DataError
from megatron_dlm.files import read_json_object
from megatron_dlm.packages import optional_module

MODEL, SETTINGS = "tokenizer.json", "tokenizer_config.json"
_OLD_SETTINGS = "special_tokens_map.json"


class SourceTokenizer(NamedTuple):
    """A tokenizer that was taken over."""

    tokenizer: Tokenizer
    size: int
    """Ids that it had; those from here on are new."""
    mask_token: str
    """Spelling of [MASK]."""
    end_token: str
    """Spelling of end-of-document."""


def convert_tokenizer(source: Path, directory: Path, *, mask_token: str | None) -> SourceTokenizer:
    """Write the tokenizer of the folder ``source`` into ``directory``, which ``load_tokenizer`` then reads.

    [MASK] is ``mask_token``: a special token that it has, or else a new one. Where ``mask_token`` is None, it is the
    tokenizer's own mask token, or else a new ``<|mask|>``. A new id is the next after the last one.

    Raises:
        ConfigError: its settings are no JSON object; one line.
        DataError: there is no tokenizer.json, or text can spell the token that would be [MASK]; one line.
    """
    if not (source / MODEL).is_file():
        raise DataError(
            f"{source} has no {MODEL}, so no tokenizer that can be taken over; write one with AutoTokenizer's "
            "save_pretrained"
        )
    try:
        content = (source / MODEL).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {source / MODEL}: {error.strerror}; check its permissions") from None
    settings = _settings(source)
    ids = _ids(source / MODEL, content)
    if not ids:
        raise DataError(f"{source / MODEL} has no tokens; give the tokenizer of the model")
    size = max(ids.values()) + 1
    names = {number: name for name, number in ids.items()}
    if mask_token is not None:
        if not mask_token.strip():
            raise DataError("the mask token has no name; give --mask-token a word such as '<|mask|>'")
        settings["mask_token"] = mask_token
    found = _write(directory, content, settings)
    end = names.get(found.end_of_document_id, END_OF_DOCUMENT_PIECE)
    mask = mask_token or names.get(found.mask_token_id, MASK_PIECE)
    if ids.get(end, found.end_of_document_id) != found.end_of_document_id:
        raise DataError(f"{source / MODEL} has no special token that ends a text; name one as eos_token in {SETTINGS}")
    if mask in ids and ids[mask] != found.mask_token_id:
        raise DataError(
            f"{mask} of {source / MODEL} is a word that a text can have in it, so it cannot be [MASK]; give another "
            "--mask-token, such as one that it does not have"
        )
    if mask == end:
        raise DataError(f"{mask} of {source / MODEL} ends a text, so it cannot be [MASK]; give another --mask-token")
    new = {name: size + index for index, name in enumerate(name for name in (end, mask) if name not in ids)}
    content = _with_special_tokens(content, new) if new else content
    tokenizer = _write(directory, content, {**settings, "mask_token": mask, "eos_token": end})
    expected = {**ids, **new}
    controls = (tokenizer.mask_token_id, tokenizer.end_of_document_id)
    if _ids(directory / MODEL, content) != expected or controls != (expected[mask], expected[end]):
        raise DataError(
            f"{source / MODEL} has gaps between its ids, so {' and '.join(new)} cannot be added; name special tokens "
            f"of it as mask_token and eos_token in {SETTINGS}"
        )
    return SourceTokenizer(tokenizer, size, mask, end)


def _settings(source: Path) -> dict[str, Any]:
    """tokenizer_config.json, completed by what older versions of transformers wrote beside it."""
    merged: dict[str, Any] = {}
    for name in (_OLD_SETTINGS, SETTINGS):
        path = source / name
        if path.exists():
            content = read_json_object(path, "get it again")
            known = content if name == SETTINGS else {key: content.get(key) for key in ("mask_token", "eos_token")}
            merged.update({key: value for key, value in known.items() if value is not None})
    return merged


def _ids(path: Path, content: bytes) -> dict[str, int]:
    """Id of every token."""
    tokenizers = optional_module("tokenizers", f"the tokenizer {path}")
    try:
        return tokenizers.Tokenizer.from_str(content.decode()).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path} is no tokenizer.json: write one with AutoTokenizer's save_pretrained") from error


def _write(directory: Path, content: bytes, settings: dict[str, Any]) -> Tokenizer:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MODEL).write_bytes(content)
    (directory / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return load_tokenizer(str(directory))


def _with_special_tokens(content: bytes, new: dict[str, int]) -> bytes:
    """tokenizer.json with more special tokens, by name with their ids."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = json.loads(content)
    added = [{"id": number, "content": name, **plain} for name, number in new.items()]
    model["added_tokens"] = [*(model.get("added_tokens") or []), *added]
    return json.dumps(model, ensure_ascii=False).encode()
