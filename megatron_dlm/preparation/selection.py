"""Which documents are held out, and which a tokenizer is trained on: functions of their text and the seed."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator

import numpy as np

from megatron_dlm.errors import DataError
from megatron_dlm.preparation.documents import Document

_TOKENIZER_SAMPLE_BYTES = 2**24


def document_key(content: bytes, seed: int) -> int:
    """Keyed 64-bit hash of a document's UTF-8 text; those with the smallest are held out."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little")


def utf8(document: Document) -> bytes:
    """The document's text as UTF-8. Raises DataError for unpaired surrogates, which JSON can hold."""
    try:
        return document.text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{document.origin} has an unpaired surrogate at character {error.start}, which UTF-8 cannot hold: "
            "repair or leave out the document"
        ) from error


def held_out(keys: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out, [documents] bool.

    Those with the smallest `keys` ([documents] uint64), at least one, and with each of them all its copies, so that no
    held-out text is trained on. It does not depend on the order of the documents.

    Raises:
        DataError: none would remain.
    """
    if fraction == 0:
        return np.zeros(len(keys), dtype=bool)
    count = max(1, round(len(keys) * fraction))
    chosen = keys <= np.partition(keys, count - 1)[count - 1]
    if chosen.all():
        raise DataError(
            f"--valid-fraction {fraction} of {len(keys)} documents leaves none to train on: "
            "give more documents or --valid-fraction 0, or --split-on-blank-lines where one text holds several"
        )
    return chosen


def training_sample(
    documents: Iterable[Document], seed: int, valid_fraction: float, max_bytes: int = _TOKENIZER_SAMPLE_BYTES
) -> Iterator[str]:
    """Texts of training documents, about `max_bytes` in all: those with the largest keys.

    Held out are the smallest keys, so a sample from the other end can be drawn in one pass and in bounded memory,
    before the number of documents is known; in a small corpus, where the two overlap, the held-out ones are dropped.

    Raises:
        DataError: there is no text, or none would remain to train on.
    """
    keys: list[int] = []
    kept: list[tuple[int, int, bytes]] = []  # a heap: its first has the smallest key; the index decides between copies
    size = 0
    for index, document in enumerate(documents):
        content = utf8(document)
        if not content:
            continue
        keys.append(document_key(content, seed))
        heapq.heappush(kept, (keys[-1], index, content))
        size += len(content)
        # The smallest key goes while what remains is still enough, so memory holds `max_bytes` and one document more.
        while size - len(kept[0][2]) >= max_bytes:
            size -= len(heapq.heappop(kept)[2])
    if not keys:
        raise DataError("the input has no text to train a tokenizer on: give other --input")
    # Now that all keys are known, so is which documents are held out, by key, so that copies of them are too.
    all_keys = np.array(keys, dtype=np.uint64)
    excluded = set(all_keys[held_out(all_keys, valid_fraction)].tolist())
    return (content.decode() for key, _, content in sorted(kept, reverse=True) if key not in excluded)
