"""The first pass: documents are tokenised, in input order, into one temporary file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.preparation.documents import Document
from megatron_dlm.preparation.tokenization import tokenize_documents


class Spool(NamedTuple):
    """All documents, tokenised, in input order."""

    path: Path
    """The tokens of one document after the other, in the type that the token files will have."""
    lengths: np.ndarray
    """Tokens of each document, [documents] int64."""
    text_bytes: np.ndarray
    """UTF-8 bytes of each, [documents] int64."""
    keys: np.ndarray
    """See `selection.document_key`, [documents] uint64."""
    empty_documents: int
    """How many had no text; they are in none of the above."""


def tokenize_into(
    documents: Iterator[Document],
    spec: str,
    tokenizer: Tokenizer,
    path: Path,
    seed: int,
    workers: int,
    quiet: bool | None,
) -> Spool:
    """Tokenise all `documents` into the file `path`.

    Args:
        documents: read once.
        spec: what `load_tokenizer` takes, for the workers to load `tokenizer` with.
        tokenizer: what `spec` must give.
        path: written anew.
        seed: of the documents' keys.
        workers: processes that tokenise.
        quiet: as tqdm's `disable`.

    Raises:
        DataError: a document cannot be read or tokenised, or a worker died; one line.
        OSError: the file cannot be written.
    """
    lengths, text_bytes, keys = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    read = 0

    def counted() -> Iterator[Document]:
        nonlocal read
        for document in documents:
            read += 1
            yield document

    with path.open("wb") as file, tqdm(desc="tokenise", unit=" tokens", unit_scale=True, disable=quiet) as bar:
        for batch in tokenize_documents(counted(), spec, tokenizer.fingerprint, seed=seed, workers=workers):
            file.write(batch.tokens.tobytes())
            lengths.append(batch.lengths)
            text_bytes.append(batch.text_bytes)
            keys.append(batch.keys)
            bar.update(len(batch.tokens))
    all_lengths = np.concatenate(lengths)
    return Spool(path, all_lengths, np.concatenate(text_bytes), np.concatenate(keys), read - len(all_lengths))
