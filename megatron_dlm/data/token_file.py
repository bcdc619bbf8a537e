"""A prepared corpus on disk: PREFIX.bin and .idx in megatron-core's IndexedDataset format, and PREFIX.json about them.

The .json is moved into place last, so a corpus that has one is complete. Opening checks the three against each other
without megatron-core (whose import takes seconds) and maps the .bin as one flat stream of tokens.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dlm.errors import DataError

# Start of an .idx file: 9 bytes of magic, version, code of the token type, numbers of sequences and of document ends.
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPE_CODES = {"uint16": 8, "int32": 4}
_REMEDY = "prepare the data again with --overwrite"


@dataclass(frozen=True)
class Metadata:
    """What PREFIX.json holds.

    `bytes` are those of the documents' UTF-8 text; `tokens` include one end-of-document per document.
    """

    documents: int
    tokens: int
    bytes: int
    dtype: str
    vocab_size: int
    mask_token_id: int
    end_of_document_id: int
    max_token_id: int
    tokenizer_fingerprint: str
    bin_bytes: int
    idx_bytes: int
    request: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Metadata:
        """Raises DataError where the file is missing or is not the metadata of a prepared corpus."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(
                f"{path} is missing: give the path prefix of a corpus that `megatron-dlm prepare` completed"
            ) from error
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; check the path") from error
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {_REMEDY}") from error
        missing = [f.name for f in fields(cls) if not isinstance(values, dict) or f.name not in values]
        if missing:
            raise DataError(f"{path} lacks {', '.join(missing)}, so it describes no prepared corpus: {_REMEDY}")
        return cls(**{f.name: values[f.name] for f in fields(cls)})


def token_dtype(vocab_size: int) -> type[np.integer]:
    """Type in which ids below `vocab_size` are stored: uint16 where they fit, else int32."""
    return np.uint16 if vocab_size <= 2**16 else np.int32


# Of a corpus of any size a fingerprint takes a moment.
_SAMPLES, _SAMPLE = 64, 4096


class TokenFile:
    """A prepared corpus, opened for reading.

    Args:
        prefix: path without .bin, .idx, .json.

    Attributes:
        metadata: what the .json says.
        tokens: [tokens] uint16 or int32, memory-mapped read-only; documents one after the other.

    Raises:
        DataError: a file is missing, empty, truncated, or does not belong to the others.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        metadata_path, bin_path, idx_path = (Path(f"{prefix}.{suffix}") for suffix in ("json", "bin", "idx"))
        self.metadata = Metadata.read(metadata_path)
        if self.metadata.dtype not in _DTYPE_CODES:
            raise DataError(f"{metadata_path} has the unknown dtype {self.metadata.dtype!r}: {_REMEDY}")
        itemsize = np.dtype(self.metadata.dtype).itemsize
        _check_size(bin_path, self.metadata.bin_bytes)
        _check_size(idx_path, self.metadata.idx_bytes)
        if self.metadata.bin_bytes != self.metadata.tokens * itemsize:
            raise DataError(f"{metadata_path} counts {self.metadata.tokens} tokens, but not {bin_path}: {_REMEDY}")
        _check_index(idx_path, self.metadata)
        self.tokens = np.memmap(bin_path, dtype=self.metadata.dtype, mode="r").view(np.ndarray)

    def fingerprint(self) -> str:
        """Number and digest of the tokens, of 64 samples of them where there are many: reads at most 2**18 tokens."""
        pieces = np.linspace(0, max(len(self.tokens) - _SAMPLE, 0), _SAMPLES, dtype=np.int64)
        whole = len(self.tokens) <= _SAMPLE * _SAMPLES
        digest = hashlib.sha256()
        for start in [0] if whole else pieces.tolist():
            digest.update(self.tokens[start : len(self.tokens) if whole else start + _SAMPLE].tobytes())
        return f"{len(self.tokens)}:{digest.hexdigest()[:16]}"


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing: {_REMEDY}")
    size = path.stat().st_size
    if size == 0 or size != expected:
        state = "is empty" if size == 0 else "is truncated" if size < expected else "does not belong to its .json"
        raise DataError(f"{path} {state} ({size} bytes, expected {expected}): copy it again, or {_REMEDY}")


def _check_index(path: Path, metadata: Metadata) -> None:
    """The .idx must describe as many documents, of the same type and total length, as the metadata."""
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise DataError(f"{path} is not an index of megatron-core: {_REMEDY}")
        _, version, code, sequences, ends = _HEADER.unpack(header)
        described = (version, code, sequences, ends, _HEADER.size + 12 * sequences + 8 * ends)
        expected = (1, _DTYPE_CODES[metadata.dtype], metadata.documents, metadata.documents + 1, metadata.idx_bytes)
        end = 0
        if described == expected and sequences:
            # Lengths (int32), then where each begins (int64, bytes): the last of both give the size of the .bin.
            file.seek(_HEADER.size + 4 * (sequences - 1))
            length, *_ = struct.unpack("<i", file.read(4))
            file.seek(_HEADER.size + 12 * sequences - 8)
            start, *_ = struct.unpack("<q", file.read(8))
            end = start + length * np.dtype(metadata.dtype).itemsize
    if described != expected or end != metadata.bin_bytes:
        raise DataError(f"{path} does not match the .bin and .json beside it: copy all three again, or {_REMEDY}")
