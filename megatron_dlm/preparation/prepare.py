"""Text to prepared corpora: read, tokenise, shuffle documents, hold some out, write token files.

Two passes: the documents are tokenised in input order into a temporary file, then copied from it in shuffled order into
the token files. All that is written goes to a hidden folder inside the output and is moved into place at the end, the
.json last, so an error or an interrupt leaves nothing behind.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dlm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dlm.errors import DataError
from megatron_dlm.preparation.documents import Document, embedded_documents, find_inputs, read_documents
from megatron_dlm.preparation.output import move_into_place, tokenizer_spec
from megatron_dlm.preparation.request import Prepared, PrepareOptions, already_done, check, refuse_existing, request_of
from megatron_dlm.preparation.selection import held_out, training_sample
from megatron_dlm.preparation.sentencepiece_training import train_sentencepiece
from megatron_dlm.preparation.splits import indexed_dataset_builder, write_split
from megatron_dlm.preparation.spool import tokenize_into

_STAGING = ".prepare"


def prepare(options: PrepareOptions, *, workers: int = 1, overwrite: bool = False, progress: bool = False) -> Prepared:
    """Write the token files of `options`. What they hold does not depend on `workers`.

    The same request over complete output returns at once. Other output is replaced only with `overwrite`.

    Raises:
        DataError: one line with the cause and the fix; nothing is left behind.
    """
    check(options, workers)
    paths = find_inputs(options.inputs)
    given = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
    request = request_of(options, paths, given)
    output = options.output
    if not overwrite:
        done = already_done(options, request)
        if done is not None:
            return done
        refuse_existing(options)
    made = [path for path in (output, *output.parents) if not path.exists()]
    staging = output / _STAGING
    try:
        output.mkdir(parents=True, exist_ok=True)
        if overwrite:
            shutil.rmtree(staging, ignore_errors=True)
        if staging.exists():
            raise DataError(
                f"{staging} is left from a preparation that was killed, or one is running: wait, or use --overwrite"
            )
        staging.mkdir()
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror}; choose another --output") from error
    try:
        return _prepare(options, request, paths, given, staging, workers, progress)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        if isinstance(error, OSError):
            raise DataError(f"{error.filename or output}: {error.strerror or error}; nothing was written") from error
        raise


def _prepare(
    options: PrepareOptions,
    request: dict[str, Any],
    paths: list[Path],
    tokenizer: Tokenizer | None,
    staging: Path,
    workers: int,
    progress: bool,
) -> Prepared:
    def documents() -> Iterator[Document]:
        yield from read_documents(paths, text_key=options.text_key, split_on_blank_lines=options.split_on_blank_lines)
        if options.embedded:
            yield from embedded_documents(options.embedded_parts)

    quiet = None if progress else True
    if options.train_sentencepiece is not None:
        sample = training_sample(documents(), options.seed, options.valid_fraction)
        train_sentencepiece(sample, options.train_sentencepiece, staging / "tokenizer.model")
        tokenizer = load_tokenizer(str(staging / "tokenizer.model"))
    assert tokenizer is not None
    staged_spec = tokenizer.save(staging)
    start = time.perf_counter()
    spool = tokenize_into(documents(), staged_spec, tokenizer, staging / "spool", options.seed, workers, quiet)
    if not len(spool.lengths):
        raise DataError(f"the input has no text ({spool.empty_documents} empty documents): give other --input")
    chosen = held_out(spool.keys, options.valid_fraction)
    tokenised = time.perf_counter()
    builder_type = indexed_dataset_builder()
    imported = time.perf_counter()
    splits = {}
    for name, documents_of_split in (("train", np.flatnonzero(~chosen)), ("valid", np.flatnonzero(chosen))):
        if len(documents_of_split):
            split = write_split(name, documents_of_split, spool, tokenizer, request, staging, builder_type, quiet)
            splits[name] = split
    seconds = tokenised - start + time.perf_counter() - imported
    spool.path.unlink()
    files = move_into_place(staging, options.output)
    return Prepared(
        options.output,
        splits,
        tokenizer_spec(options.output),
        files,
        spool.empty_documents,
        float(spool.lengths.sum() / seconds),
        already_done=False,
    )
