"""Documents to token arrays, in forked worker processes, in order and in bounded memory."""

from __future__ import annotations

import functools
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from megatron_dlm.data.token_file import token_dtype
from megatron_dlm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dlm.errors import DataError
from megatron_dlm.preparation.documents import Document
from megatron_dlm.preparation.selection import document_key, utf8

_BATCH_CHARACTERS = 2**20
_BATCH_DOCUMENTS = 1024


class TokenizedDocuments(NamedTuple):
    """A batch of documents; empty ones are left out."""

    tokens: np.ndarray
    """[tokens] uint16 or int32: the documents one after the other, each with its end-of-document id."""
    lengths: np.ndarray
    """[documents] int64, tokens of each."""
    text_bytes: np.ndarray
    """[documents] int64, UTF-8 bytes of each."""
    keys: np.ndarray
    """[documents] uint64, see `document_key`."""


def tokenize_documents(
    documents: Iterable[Document], tokenizer: str, fingerprint: str, *, seed: int, workers: int
) -> Iterator[TokenizedDocuments]:
    """Batches of tokenised documents, in the order of the documents whatever the number of workers.

    Args:
        documents: read in this process, at most a few batches ahead.
        tokenizer: what `load_tokenizer` takes.
        fingerprint: of that tokenizer, to tell it from what had the same name before.
        seed: key of the hash that decides what is held out.
        workers: processes that tokenise; with 1, this one does.

    Raises:
        DataError: from a document or a worker.
    """
    batches = _batches(documents)
    if workers == 1:
        for batch in batches:
            yield _tokenize(batch, tokenizer, fingerprint, seed)
        return
    # An interrupt of the terminal reaches the workers too; only the parent acts on it.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    pending: deque[Future[TokenizedDocuments]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_tokenize, batch, tokenizer, fingerprint, seed))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a tokenising process was killed, perhaps for lack of memory: use fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@functools.cache
def _loaded(tokenizer: str, fingerprint: str) -> Tokenizer:
    """The tokenizer, read once per process; `fingerprint` is there for the cache."""
    return load_tokenizer(tokenizer)


def _tokenize(documents: list[Document], tokenizer: str, fingerprint: str, seed: int) -> TokenizedDocuments:
    model = _loaded(tokenizer, fingerprint)
    ids: list[int] = []
    lengths, text_bytes, keys = [], [], []
    for document in documents:
        content = utf8(document)
        if content:
            before = len(ids)
            ids += model.encode(document.text)
            ids.append(model.end_of_document_id)
            lengths.append(len(ids) - before)
            text_bytes.append(len(content))
            keys.append(document_key(content, seed))
    return TokenizedDocuments(
        np.array(ids, dtype=token_dtype(model.vocab_size)),
        np.array(lengths, dtype=np.int64),
        np.array(text_bytes, dtype=np.int64),
        np.array(keys, dtype=np.uint64),
    )
