"""A prepared corpus on disk: PREFIX.bin and .idx in megatron-core's IndexedDataset format, and PREFIX.json about them.

The .json is moved into place last, so a corpus that has one is complete. Opening checks the three against each other
without megatron-core (whose import takes seconds) and maps the .bin as one flat stream of tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import weakref
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_dlm.errors import DataError
from megatron_dlm.files import read_json_object

# Start of an .idx file: 9 bytes of magic, version, code of the token type, numbers of sequences and of document ends.
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPE_CODES = {"uint16": 8, "int32": 4}
_REMEDY = "prepare the data again with --overwrite"
_CHANGED = "restore it, and the same command goes on from the last checkpoint"


@dataclass(frozen=True)
class Metadata:
    """What PREFIX.json holds.

    `bytes` are those of the documents' UTF-8 text; `tokens` include one end-of-document per document. Digests
    (hexadecimal) and times of change (whole seconds since 1970) of the other two files are None in corpora of earlier
    versions.
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
    bin_sha256: str | None = None
    idx_sha256: str | None = None
    bin_mtime: int | None = None
    idx_mtime: int | None = None

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Metadata:
        """Raises DataError where the file is missing, or a field of it is not what a prepared corpus has."""
        if not path.is_file():
            raise DataError(f"{path} is missing: give the prefix of a corpus that `megatron-dlm prepare` completed")
        values = read_json_object(path, _REMEDY, DataError)
        if missing := [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]:
            raise DataError(f"{path} lacks {', '.join(missing)}, so it describes no prepared corpus: {_REMEDY}")
        made = cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
        if fault := made._fault():
            raise DataError(f"{path}: {fault}: {_REMEDY}")
        return made

    def _fault(self) -> str | None:
        """What is wrong with the first field that no prepared corpus has like that."""
        ids = {"mask_token_id", "end_of_document_id", "max_token_id"}
        for item in fields(self):
            name, value = item.name, getattr(self, item.name)
            if value is None and item.default is None:
                continue
            shown = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:37]}..."
            if item.type.startswith("int"):  # annotations are strings in this module
                least = 0 if name in ids or name.endswith("mtime") else 1
                if type(value) is not int or not least <= value < 2**63:
                    return f"{name} is {shown}, not a whole number from {least} on"
                if name in ids and not value < self.vocab_size:
                    return f"{name} is {shown}, outside the vocabulary of {self.vocab_size}"
            elif not isinstance(value, dict if name == "request" else str) or value == "":
                return f"{name} is {shown}, not {'an object' if name == 'request' else 'a text'}"
        if self.dtype not in _DTYPE_CODES:
            return f"dtype is {self.dtype!r:.40}, not {' or '.join(_DTYPE_CODES)}"
        if self.documents > self.tokens:
            return f"it has {self.documents} documents in {self.tokens} tokens"
        return None


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
        tokens: [tokens] uint16 or int32, memory-mapped read-only; documents one after the other. Where the file is
            truncated later, the system kills who looks at it (SIGBUS); `read` gives an error instead.

    Raises:
        DataError: a file is missing, empty, truncated, or does not belong to the others.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        metadata_path, self._bin, self._idx = (Path(f"{prefix}.{suffix}") for suffix in ("json", "bin", "idx"))
        self.metadata = Metadata.read(metadata_path)
        self._dtype = np.dtype(self.metadata.dtype)
        _check_size(self._bin, self.metadata.bin_bytes)
        _check_size(self._idx, self.metadata.idx_bytes)
        if self.metadata.bin_bytes != self.metadata.tokens * self._dtype.itemsize:
            raise DataError(f"{metadata_path} counts {self.metadata.tokens} tokens, but not {self._bin}: {_REMEDY}")
        try:
            _check_index(self._idx, self.metadata)
            self._handle = os.open(self._bin, os.O_RDONLY)
            weakref.finalize(self, os.close, self._handle)
            self.tokens = np.memmap(self._bin, dtype=self._dtype, mode="r").view(np.ndarray)
        except OSError as error:
            raise DataError(f"cannot read {error.filename}: {error.strerror}; check its permissions") from None

    @property
    def identity(self) -> tuple[int, int]:
        """Device and number of the .bin, the same under all its names."""
        status = os.fstat(self._handle)
        return status.st_dev, status.st_ino

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens [end - start] of the .bin that was opened, whatever has taken its place since.

        Raises:
            DataError: it has been truncated since, or the disk cannot read it.
        """
        offset, size = start * self._dtype.itemsize, (end - start) * self._dtype.itemsize
        content = bytearray()
        while len(content) < size:
            try:
                part = os.pread(self._handle, size - len(content), offset + len(content))
            except OSError as error:
                raise DataError(f"cannot read {self._bin}: {error.strerror}; {_CHANGED}") from None
            if not part:
                now, before = os.fstat(self._handle).st_size, self.metadata.bin_bytes
                raise DataError(f"{self._bin} was truncated while it was in use ({now} of {before} bytes); {_CHANGED}")
            content += part
        return np.frombuffer(content, dtype=self._dtype)

    def fingerprint(self) -> str:
        """Number and digest of the tokens, of 64 samples of them where there are many: reads at most 2**18 tokens.

        Raises DataError as `read`.
        """
        count = self.metadata.tokens
        whole = count <= _SAMPLE * _SAMPLES
        pieces = np.linspace(0, max(count - _SAMPLE, 0), _SAMPLES, dtype=np.int64)
        digest = hashlib.sha256()
        for start in [0] if whole else pieces.tolist():
            digest.update(self.read(start, count if whole else start + _SAMPLE).tobytes())
        return f"{count}:{digest.hexdigest()[:16]}"

    def recorded(self) -> list[Recorded]:
        """The two other files that the .json describes, where it has their digests."""
        made = self.metadata
        found = ((self._bin, made.bin_sha256, made.bin_mtime), (self._idx, made.idx_sha256, made.idx_mtime))
        return [Recorded(path, digest, mtime) for path, digest, mtime in found if digest is not None]


class Recorded(NamedTuple):
    """A file as `prepare` wrote it."""

    path: Path
    sha256: str
    mtime: int | None
    """Time of its last change, in whole seconds: copies that keep times may round them."""

    def touched(self) -> bool:
        """Whether it was changed, or copied, since. Raises OSError."""
        return int(self.path.stat().st_mtime) != self.mtime

    def verify(self) -> None:
        """Read all of it. Raises DataError unless it is what `prepare` wrote."""
        try:
            with self.path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}; check the path") from None
        if found != self.sha256:
            raise DataError(
                f"{self.path} is not what was prepared (SHA-256 {found[:12]}..., not {self.sha256[:12]}...): copy it "
                f"again, or {_REMEDY}"
            )


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
