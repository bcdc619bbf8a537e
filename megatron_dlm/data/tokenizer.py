"""Tokenizers: text to ids and back, with two control ids, [MASK] and end-of-document, that no text can produce.

`load_tokenizer` reads every kind: "byte", a SentencePiece *.model, a Hugging Face tokenizer.json or its folder, and
what `Tokenizer.save` wrote. Control tokens that a tokenizer lacks are added after its last id.
"""

from __future__ import annotations

import hashlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dlm.errors import DataError
from megatron_dlm.files import read_json_object
from megatron_dlm.packages import optional_module
from megatron_dlm.shipped.sampler_plan import Vocabulary

MASK_PIECE = "<|mask|>"
END_OF_DOCUMENT_PIECE = "<|end_of_document|>"
_MASK_NAMES = (MASK_PIECE, "<|mdm_mask|>", "[MASK]", "<mask>")
_END_NAMES = (END_OF_DOCUMENT_PIECE, "<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")

_MOST_IDS = 2**24

# What SentencePiece writes for a space, so it cannot tell the two apart in its output.
_SPACE_MARK = "\u2581"


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        vocab_size: number of ids, [MASK] and end-of-document included.
        mask_token_id: id of [MASK]; `encode` never returns it.
        end_of_document_id: id that ends every document; `encode` never returns it.
        fingerprint: sha256 (hex) of all that decides the ids, to tell data of one tokenizer from that of another.
        source: "byte", or the file it was read from, for messages.
        content: bytes of that file.
        end_note: why end-of-document is none of the file's own tokens; empty where it is one.
    """

    vocab_size: int
    mask_token_id: int
    end_of_document_id: int
    fingerprint: str
    source: str
    content: bytes
    end_note: str = ""

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids that have a meaning of their own; none is forbidden."""
        return Vocabulary(self.mask_token_id, self.end_of_document_id, size=self.vocab_size)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any control id. Raises UnicodeEncodeError for unpaired surrogates."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`. Control ids and ids outside the vocabulary give nothing, broken UTF-8 gives U+FFFD."""

    @abstractmethod
    def save(self, directory: str | Path) -> str:
        """Write the tokenizer into `directory`, made if need be; return what `load_tokenizer` takes to read it."""

    def _set_control_ids(self, size: int, mask_id: int | None, end_id: int | None) -> None:
        """Fill in the attributes; a control id that is None is added after the `size` ids that exist."""
        added = iter(range(size, size + 2))
        self.end_of_document_id = next(added) if end_id is None else end_id
        self.mask_token_id = next(added) if mask_id is None else mask_id
        self.vocab_size = next(added, size + 2)
        controls = f"{type(self).__name__} {self.vocab_size} {self.mask_token_id} {self.end_of_document_id}\n"
        self.fingerprint = hashlib.sha256(controls.encode() + self.content).hexdigest()


class ByteTokenizer(Tokenizer):
    """One id for each byte of the UTF-8 text, then end-of-document (256) and [MASK] (257)."""

    def __init__(self) -> None:
        self.source, self.content = "byte", b""
        self._set_control_ids(256, None, None)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")

    def save(self, directory: str | Path) -> str:
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.byte").write_text("byte\n", encoding="ascii")
        return "byte"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    The control ids are the model's own pieces of type CONTROL (which the library never matches in text) where it has
    them, else new ids. A model from `train_sentencepiece` gives back every text exactly.

    Args:
        path: the *.model file.

    Raises:
        DataError: the file is missing or is not a SentencePiece model.
    """

    def __init__(self, path: str | Path) -> None:
        import sentencepiece

        self.source, self.content = str(path), _read(Path(path))
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self.content)
            self._size = self._model.get_piece_size()
            self._model.id_to_piece(list(range(self._size)))  # or one that is not UTF-8 is an error later
            end_id = self._control_id(_END_NAMES)
            self._set_control_ids(self._size, self._control_id(_MASK_NAMES), end_id)
            self._space_mark_ids = self._find_space_mark_ids()
        except (RuntimeError, ValueError, IndexError) as error:
            raise DataError(f"{path} is not a SentencePiece model: give its trainer's *.model file") from error

    def encode(self, text: str) -> list[int]:
        if self._space_mark_ids is None or _SPACE_MARK not in text:
            return self._model.encode(text)
        ids: list[int] = []
        for i, part in enumerate(text.split(_SPACE_MARK)):
            ids += self._space_mark_ids if i else []
            ids += self._model.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        controls = (self.mask_token_id, self.end_of_document_id)
        return self._model.decode([int(i) for i in ids if 0 <= i < self._size and i not in controls])

    def save(self, directory: str | Path) -> str:
        path = Path(directory) / "tokenizer.model"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.content)
        return str(path)

    def _control_id(self, names: Sequence[str]) -> int | None:
        for name in names:
            i = self._model.piece_to_id(name)
            if self._model.is_control(i) and self._model.id_to_piece(i) == name:
                return i
        return None

    def _find_space_mark_ids(self) -> list[int] | None:
        """Byte pieces that spell U+2581, or None for a model that would not give text back exactly in any case."""
        ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        exact = self._model.decode(self._model.encode(" a  b\n")) == " a  b\n"
        adds_prefix = self._model.id_to_piece(self._model.encode("a")[0]).startswith(_SPACE_MARK)
        return ids if exact and not adds_prefix and all(self._model.is_byte(i) for i in ids) else None


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json of Hugging Face's `tokenizers` library; special tokens in text are encoded as plain text.

    The control ids are the special tokens that tokenizer_config.json names (mask_token, eos_token) or that have a
    usual name, unless plain text can produce them: then they are new ids.

    Args:
        path: tokenizer.json, or the folder that holds it.

    Raises:
        DataError: the file is missing or cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        tokenizers = optional_module("tokenizers", f"the tokenizer {path}")
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        self.source, self.content = str(file), _read(file)
        remedy = "write it with AutoTokenizer's save_pretrained"
        self._config_file = file.with_name("tokenizer_config.json")
        config = read_json_object(self._config_file, remedy, DataError) if self._config_file.exists() else {}
        try:
            self._model = tokenizers.Tokenizer.from_str(self.content.decode())
            self._model.no_truncation()
            self._model.no_padding()
            self._model.encode_special_tokens = True
            vocabulary = self._model.get_vocab(with_added_tokens=True)
            self._size = max(vocabulary.values()) + 1
            mask_id = self._control_id((config.get("mask_token"), *_MASK_NAMES))
            end_id = self._control_id((config.get("eos_token"), *_END_NAMES))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{file} is no tokenizer.json: {remedy}") from error
        if self._size > _MOST_IDS:
            raise DataError(f"{file} has the id {self._size - 1}, more than any model has rows: {remedy}")
        self._set_control_ids(self._size, mask_id, end_id)
        if end_id is None:
            known = next((name for name in (_name(config.get("eos_token")), *_END_NAMES) if name in vocabulary), None)
            self.end_note = (
                f"text can spell its {known}" if known else f"no eos_token of {self._config_file.name} is in it"
            )

    def encode(self, text: str) -> list[int]:
        try:
            ids = self._model.encode(text, add_special_tokens=False).ids
        except UnicodeEncodeError:
            raise
        except Exception as error:  # the library raises bare Exception
            reason = str(error).partition("\n")[0]
            raise DataError(f"{self.source} cannot encode a text ({reason}): give a tokenizer that can") from None
        if self.mask_token_id in ids or self.end_of_document_id in ids:
            folder = self._config_file.parent
            raise DataError(f"a text has a control token of {folder} in it: make that token no word of its vocabulary")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        controls = (self.mask_token_id, self.end_of_document_id)
        kept = [int(i) for i in ids if 0 <= i < self._size and i not in controls]
        return self._model.decode(kept, skip_special_tokens=False)

    def save(self, directory: str | Path) -> str:
        path = Path(directory) / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.content)
        if self._config_file.exists():
            shutil.copyfile(self._config_file, path.with_name("tokenizer_config.json"))
        return str(path)

    def _control_id(self, candidates: Sequence[Any]) -> int | None:
        """Id of the first candidate that is a special token and that its own spelling in a text does not produce."""
        special = {token.content: i for i, token in self._model.get_added_tokens_decoder().items() if token.special}
        for name in map(_name, candidates):
            i = special.get(name)
            texts = (f"{name}", f"a {name} b", f"a{name}b")
            if i is not None and all(i not in self._model.encode(t, add_special_tokens=False).ids for t in texts):
                return i
        return None


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` names.

    Args:
        spec: "byte", a SentencePiece *.model, a Hugging Face tokenizer.json, or a folder with either of the two or
            with what `ByteTokenizer.save` wrote.

    Raises:
        DataError: no such tokenizer, or its file cannot be read.
    """
    if not spec.strip():
        raise DataError("the name of the tokenizer is empty: give byte, or the path of its file")
    path = Path(spec)
    if spec == "byte" or (path / "tokenizer.byte").is_file():
        return ByteTokenizer()
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.suffix == ".json" or (path / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(path)
    if (path / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path / "tokenizer.model")
    kinds = '"byte", a SentencePiece *.model, or a tokenizer.json or its folder'
    reason = "holds no tokenizer.json or tokenizer.model" if path.is_dir() else "is no tokenizer"
    raise DataError(f"{spec!r} {reason}: give {kinds}")


def _name(candidate: Any) -> str:
    """Of a token in tokenizer_config.json, which may be an object; empty for something else."""
    name = candidate.get("content") if isinstance(candidate, dict) else candidate
    return name if isinstance(name, str) else ""


def _read(path: Path) -> bytes:
    try:
        if path.is_fifo() or path.is_char_device():
            raise DataError(f"the tokenizer {path} is a pipe or a device: give a file")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}; check the path") from error
