"""What is asked for: the options, whether they make sense, and whether the output is what they would give."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dlm.data.token_file import Metadata, TokenFile
from megatron_dlm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dlm.errors import DataError
from megatron_dlm.preparation.documents import EMBEDDED_PARTS
from megatron_dlm.preparation.output import TOKENIZER_FILES, existing, output_names, tokenizer_spec


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare.

    Attributes:
        output: folder for train.bin/.idx/.json, valid.* and the tokenizer.
        inputs: files, folders and dataset folders (see `documents.read_documents`).
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


def check(options: PrepareOptions, workers: int) -> None:
    """Raise `DataError` for an option that makes no sense, or not with the others."""
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


def request_of(options: PrepareOptions, paths: list[Path], tokenizer: Tokenizer | None) -> dict[str, Any]:
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


def already_done(options: PrepareOptions, request: dict[str, Any]) -> Prepared | None:
    """The output of an earlier, complete run of the same request."""
    names = ["train", "valid"] if options.valid_fraction > 0 else ["train"]
    try:
        splits = {name: TokenFile(options.output / name).metadata for name in names}
        spec = tokenizer_spec(options.output)
        fingerprint = load_tokenizer(spec).fingerprint
    except DataError:
        return None
    if any(split.request != request or split.tokenizer_fingerprint != fingerprint for split in splits.values()):
        return None
    files = existing(options.output, output_names())
    return Prepared(options.output, splits, spec, files, empty_documents=0, tokens_per_second=0.0, already_done=True)


def refuse_existing(options: PrepareOptions) -> None:
    """Raise `DataError` where the output has files that would be replaced."""
    given = Path(options.tokenizer or "")
    # A tokenizer in the output folder may be the one that is given; it would be written again as it is.
    uses_own = options.output in (given, given.parent)
    present = existing(options.output, output_names()[: -len(TOKENIZER_FILES)] if uses_own else output_names())
    if present:
        raise DataError(f"{present[0]} exists and is not from this request: use --overwrite or another --output")
