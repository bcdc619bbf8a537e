"""Text to prepared corpora: read, tokenise, shuffle documents, hold some out, write token files.

Two passes: the documents are tokenised in input order into a temporary file, then copied from it in shuffled order into
the token files. All that is written goes to a hidden folder inside the output and is moved into place at the end, the
.json last, so an error or an interrupt leaves nothing behind.
"""

from __future__ import annotations

import importlib
import platform
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dlm_kernels.philox import Purpose, Stream, permute
from megatron_dlm.data.token_file import Metadata, TokenFile, token_dtype
from megatron_dlm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dlm.errors import DataError
from megatron_dlm.preparation.documents import EMBEDDED_PARTS, Document, embedded_documents, find_inputs, read_documents
from megatron_dlm.preparation.selection import held_out, training_sample
from megatron_dlm.preparation.sentencepiece_training import train_sentencepiece
from megatron_dlm.preparation.tokenization import tokenize_documents

_STAGING = ".prepare"
_SPLITS = {"train": Purpose.TRAIN, "valid": Purpose.VALIDATION}
_SUFFIXES = ("bin", "idx", "json")
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "tokenizer.byte")


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare.

    Attributes:
        output: folder for train.bin/.idx/.json, valid.* and the tokenizer.
        inputs: files, folders and dataset folders (see `corpus.read_documents`).
        embedded: also take the corpus that comes with Python, after the inputs.
        embedded_parts: or only these parts of it.
        tokenizer: what `load_tokenizer` takes; or
        train_sentencepiece: size of a SentencePiece vocabulary to train on (a sample of) the training documents.
        text_key: JSON key or column of the text.
        split_on_blank_lines: text files hold several documents with blank lines between them.
        seed: 64 bits; decides the order of the documents and which are held out.
        valid_fraction: fraction of the documents that is held out, at least one if above 0.
    """

    output: Path
    inputs: Sequence[str | Path] = ()
    embedded: bool = False
    embedded_parts: Sequence[str] = EMBEDDED_PARTS
    tokenizer: str | None = None
    train_sentencepiece: int | None = None
    text_key: str = "text"
    split_on_blank_lines: bool = False
    seed: int = 1234
    valid_fraction: float = 0.0


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote, or found written."""

    output: Path
    splits: dict[str, Metadata]
    tokenizer: str
    """What `load_tokenizer` takes."""
    files: list[Path]
    empty_documents: int
    """Documents without text, left out."""
    tokens_per_second: float
    """Tokens read, tokenised and written per second; not counting the training of a tokenizer."""
    already_done: bool


class _Spool(NamedTuple):
    """All documents, tokenised, in input order."""

    path: Path
    lengths: np.ndarray
    text_bytes: np.ndarray
    keys: np.ndarray
    empty_documents: int


def prepare(options: PrepareOptions, *, workers: int = 1, overwrite: bool = False, progress: bool = False) -> Prepared:
    """Write the token files of `options`. What they hold does not depend on `workers`.

    The same request over complete output returns at once. Other output is replaced only with `overwrite`.

    Raises:
        DataError: one line with the cause and the fix; nothing is left behind.
    """
    _check(options, workers)
    paths = find_inputs(options.inputs)
    given = load_tokenizer(options.tokenizer) if options.tokenizer else None
    request = _request(options, paths, given)
    output = options.output
    if not overwrite:
        done = _already_done(options, request)
        if done is not None:
            return done
        _refuse_existing(options)
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
    tokenizer_spec = tokenizer.save(staging)
    start = time.perf_counter()
    spool = _tokenize(documents(), tokenizer_spec, tokenizer, staging / "spool", options.seed, workers, quiet)
    if not len(spool.lengths):
        raise DataError(f"the input has no text ({spool.empty_documents} empty documents): give other --input")
    chosen = held_out(spool.keys, options.valid_fraction)
    tokenised = time.perf_counter()
    builder_type = _builder_type()
    imported = time.perf_counter()
    splits = {}
    for name, documents_of_split in (("train", np.flatnonzero(~chosen)), ("valid", np.flatnonzero(chosen))):
        if len(documents_of_split):
            split = _write_split(name, documents_of_split, spool, tokenizer, request, staging, builder_type, quiet)
            splits[name] = split
    seconds = tokenised - start + time.perf_counter() - imported
    spool.path.unlink()
    files = _move_into_place(staging, options.output)
    return Prepared(
        options.output,
        splits,
        _tokenizer_spec(options.output),
        files,
        spool.empty_documents,
        float(spool.lengths.sum() / seconds),
        already_done=False,
    )


def _check(options: PrepareOptions, workers: int) -> None:
    if not options.inputs and not options.embedded:
        raise DataError("there is nothing to prepare: give --input, --embedded or both")
    if unknown := set(options.embedded_parts) - set(EMBEDDED_PARTS):
        raise DataError(f"the embedded corpus has no {min(unknown)!r}: name {' or '.join(EMBEDDED_PARTS)}")
    if (options.tokenizer is None) == (options.train_sentencepiece is None):
        raise DataError("the tokenizer is not decided: give one of --tokenizer and --train-sentencepiece")
    if not 0 <= options.valid_fraction < 1:
        raise DataError(f"--valid-fraction is {options.valid_fraction}: give a number from 0 to below 1")
    if not 0 <= options.seed < 2**64:
        raise DataError(f"--seed is {options.seed}: give a number from 0 to 2**64 - 1")
    if workers < 1:
        raise DataError(f"--workers is {workers}: give at least 1")


def _request(options: PrepareOptions, paths: list[Path], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """All that decides the output, to recognise output that is already there: files by size and time of change."""
    files = [f for path in paths for f in (sorted(path.rglob("*")) if path.is_dir() else [path]) if f.is_file()]
    left_in = [] if set(options.embedded_parts) == set(EMBEDDED_PARTS) else sorted(options.embedded_parts)
    return {
        "inputs": [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        "embedded": " ".join([platform.python_version(), *left_in]) if options.embedded else None,
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
        "train_sentencepiece": options.train_sentencepiece,
        "text_key": options.text_key,
        "split_on_blank_lines": options.split_on_blank_lines,
        "seed": options.seed,
        "valid_fraction": options.valid_fraction,
    }


def _already_done(options: PrepareOptions, request: dict[str, Any]) -> Prepared | None:
    """The output of an earlier, complete run of the same request."""
    names = ["train", "valid"] if options.valid_fraction > 0 else ["train"]
    try:
        splits = {name: TokenFile(options.output / name).metadata for name in names}
        spec = _tokenizer_spec(options.output)
        fingerprint = load_tokenizer(spec).fingerprint
    except DataError:
        return None
    if any(split.request != request or split.tokenizer_fingerprint != fingerprint for split in splits.values()):
        return None
    files = _existing(options.output, _output_names())
    return Prepared(options.output, splits, spec, files, empty_documents=0, tokens_per_second=0.0, already_done=True)


def _refuse_existing(options: PrepareOptions) -> None:
    given = Path(options.tokenizer or "")
    uses_own = options.output in (given, given.parent)
    present = _existing(options.output, _output_names()[: -len(_TOKENIZER_FILES)] if uses_own else _output_names())
    if present:
        raise DataError(f"{present[0]} exists and is not from this request: use --overwrite or another --output")


def _output_names() -> list[str]:
    return [f"{name}.{suffix}" for name in _SPLITS for suffix in _SUFFIXES] + list(_TOKENIZER_FILES)


def _existing(folder: Path, names: list[str]) -> list[Path]:
    return [folder / name for name in names if (folder / name).exists()]


def _tokenizer_spec(output: Path) -> str:
    """What a configuration names to get the tokenizer saved in `output`."""
    files = _existing(output, ["tokenizer.json", "tokenizer.model"])
    return str(files[0]) if files else "byte"


def _tokenize(
    documents: Iterator[Document],
    spec: str,
    tokenizer: Tokenizer,
    path: Path,
    seed: int,
    workers: int,
    quiet: bool | None,
) -> _Spool:
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
    return _Spool(path, all_lengths, np.concatenate(text_bytes), np.concatenate(keys), read - len(all_lengths))


def _builder_type() -> Any:
    """megatron-core's IndexedDatasetBuilder; imported after the workers are done, as it takes seconds and memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # This package first: it lets megatron-core be imported on a machine without a GPU.
        importlib.import_module("megatron_dlm.parallel")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    return IndexedDatasetBuilder


def _write_split(
    name: str,
    documents: np.ndarray,
    spool: _Spool,
    tokenizer: Tokenizer,
    request: dict[str, Any],
    staging: Path,
    builder_type: Any,
    quiet: bool | None,
) -> Metadata:
    """Write the `documents` (indices) in shuffled order as one token file in the staging folder."""
    dtype = token_dtype(tokenizer.vocab_size)
    tokens = np.memmap(spool.path, dtype=dtype, mode="r")
    ends = np.cumsum(spool.lengths)
    n = len(documents)
    order = permute(np.arange(n, dtype=np.int64), n, request["seed"], Stream.DOCUMENT_SHUFFLE, purpose=_SPLITS[name])
    bin_path, idx_path = staging / f"{name}.bin", staging / f"{name}.idx"
    builder = builder_type(str(bin_path), dtype=dtype)
    largest = 0
    with tqdm(desc=f"write {name}", unit=" tokens", unit_scale=True, disable=quiet) as bar:
        for document in documents[order].tolist():
            length = int(spool.lengths[document])
            content = tokens[ends[document] - length : ends[document]]
            largest = max(largest, int(content.max()))
            builder.add_document(content, [length])
            bar.update(length)
    builder.finalize(str(idx_path))
    metadata = Metadata(
        documents=n,
        tokens=int(spool.lengths[documents].sum()),
        bytes=int(spool.text_bytes[documents].sum()),
        dtype=np.dtype(dtype).name,
        vocab_size=tokenizer.vocab_size,
        mask_token_id=tokenizer.mask_token_id,
        end_of_document_id=tokenizer.end_of_document_id,
        max_token_id=largest,
        tokenizer_fingerprint=tokenizer.fingerprint,
        bin_bytes=bin_path.stat().st_size,
        idx_bytes=idx_path.stat().st_size,
        request=request,
    )
    metadata.write(staging / f"{name}.json")
    return metadata


def _move_into_place(staging: Path, output: Path) -> list[Path]:
    """Put the staged files in place of what an earlier run left.

    The .json of the splits go first and come last: data without it is refused, whenever this is interrupted.
    """
    last = [f"{name}.json" for name in _SPLITS]
    for path in _existing(output, last):
        path.unlink()
    staged = sorted(staging.iterdir(), key=lambda path: (path.name in last, path.name))
    for path in _existing(output, _output_names()):
        if not (staging / path.name).exists():
            path.unlink()
    moved, fresh = [], [not (output / path.name).exists() for path in staged]
    try:
        for path in staged:
            moved.append(path.replace(output / path.name))
        staging.rmdir()
    except BaseException:
        for path, is_fresh in zip(moved, fresh, strict=False):
            if is_fresh:
                path.unlink()
        raise
    return moved
