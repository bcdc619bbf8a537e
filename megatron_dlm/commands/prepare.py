"""`megatron-dlm prepare`: text in, token files and their tokenizer out."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dlm.preparation.documents import EMBEDDED_PARTS

if TYPE_CHECKING:
    from megatron_dlm.preparation.prepare import Prepared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("text")
    text.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files or folders, read in this order (a folder's files by name): *.jsonl or *.json with one object a "
        "line, *.parquet, a folder from Hugging Face's save_to_disk; every other file is one document of plain UTF-8 "
        "text; JSON lines and text may end in .gz",
    )
    text.add_argument(
        "--embedded",
        nargs="?",
        const="all",
        choices=["all", *EMBEDDED_PARTS],
        help="take the source of Python's standard library and the language reference, about 12 MB, or only one of "
        "them; no download",
    )
    text.add_argument("--text-key", default="text", metavar="KEY", help="JSON key or column of the text (%(default)s)")
    text.add_argument(
        "--split-on-blank-lines",
        action="store_true",
        help="plain text files hold several documents with blank lines between them",
    )
    tokens = parser.add_argument_group("tokenizer (give one)").add_mutually_exclusive_group(required=True)
    tokens.add_argument(
        "--tokenizer",
        metavar="SPEC",
        help="byte, a SentencePiece *.model, or a Hugging Face tokenizer.json or its folder",
    )
    tokens.add_argument(
        "--train-sentencepiece",
        type=int,
        metavar="SIZE",
        help="train a SentencePiece tokenizer of SIZE pieces on the training documents (on 16 MiB of them at most)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder to write train.bin, train.idx, train.json, the same for valid, and the tokenizer",
    )
    output.add_argument("--overwrite", action="store_true", help="replace what is in the output folder")
    output.add_argument(
        "--valid-fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="fraction of the documents held out as valid.*, at least one; copies of a held-out document are held out "
        "too; 0 for none (%(default)s)",
    )
    output.add_argument(
        "--seed",
        type=int,
        default=1234,
        help="decides the order of the documents and which are held out (%(default)s)",
    )
    output.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        metavar="N",
        help="processes that tokenise; the output does not depend on it (the number of cores: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Prepare the data and print a summary. Raises DataError, one line; then nothing is left behind."""
    from megatron_dlm.preparation.prepare import PrepareOptions, prepare

    options = PrepareOptions(
        output=args.output,
        inputs=args.input,
        embedded=args.embedded is not None,
        embedded_parts=EMBEDDED_PARTS if args.embedded in (None, "all") else (args.embedded,),
        tokenizer=args.tokenizer,
        train_sentencepiece=args.train_sentencepiece,
        text_key=args.text_key,
        split_on_blank_lines=args.split_on_blank_lines,
        seed=args.seed,
        valid_fraction=args.valid_fraction,
    )
    prepared = prepare(options, workers=args.workers, overwrite=args.overwrite, progress=True)
    print(summary(prepared))
    return 0


def summary(prepared: Prepared) -> str:
    """What was written, how fast, and the next command."""
    from megatron_dlm.data.tokenizer import load_tokenizer

    if prepared.already_done:
        lines = [f"{prepared.output} already holds this data; nothing to do"]
    else:
        lines = [f"prepared {prepared.output} at {prepared.tokens_per_second:,.0f} tokens/s"]
    for name, split in prepared.splits.items():
        lines.append(
            f"  {name:<9} {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes of text, "
            f"{split.bytes_per_token:.2f} bytes/token"
        )
    if prepared.empty_documents:
        lines.append(f"  left out  {prepared.empty_documents:,} empty documents")
    train = prepared.splits["train"]
    lines.append(
        f"  tokenizer {prepared.tokenizer}, {train.vocab_size:,} ids, end-of-document is {train.end_of_document_id}"
    )
    if note := load_tokenizer(prepared.tokenizer).end_note:
        lines.append(f"  note      that id is new: {note}; name a special token of it as eos_token to use that one")
    lines.append(f"  files     {', '.join(path.name for path in prepared.files)}")
    command = ["megatron-dlm", "train", "--config", "CONFIG.yaml", "--data.tokenizer", prepared.tokenizer]
    for name in prepared.splits:
        command += [f"--data.{name}", f"[{{path: {prepared.output / name}}}]"]
    lines.append(f"next: {shlex.join(command)}")
    return "\n".join(lines)
