"""`megatron-dlm noise-levels`: cross-entropy and accuracy by mask ratio, of one or two masked diffusion models."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.files import write_text

if TYPE_CHECKING:
    from megatron_dlm.evaluation.noise_level_table import Estimate, NoiseLevelTable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        action="append",
        metavar="DIR",
        help="a run directory, one of its checkpoints, or a Hugging Face directory that `megatron-dlm export` wrote; "
        "give it twice to compare two models on the same masks",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="SOURCE",
        help='a UTF-8 text file, JSON lines with "text", or a prefix that `megatron-dlm prepare` wrote (DIR/valid)',
    )
    parser.add_argument(
        "--levels", default="10", metavar="N", help="how many mask ratios, or the ratios: 0.1,0.5,1.0 (%(default)s)"
    )
    parser.add_argument("--windows", type=int, default=64, metavar="N", help="windows of the text (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the masks (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FIGURE.png", help="draw both over the mask ratio")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table, and the differences, as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table. Raises ConfigError or DataError, one line."""
    if len(args.checkpoint) > 2:
        raise ConfigError(f"--checkpoint is given {len(args.checkpoint)} times; give one model, or two to compare")
    levels = _levels(args.levels)
    _check_outputs(args)
    from megatron_dlm.figures.noise_levels import draw

    try:
        tables = _measure(args, levels)
    finally:
        import torch.distributed

        if torch.distributed.is_initialized():
            from megatron_dlm.parallel.topology import shutdown

            shutdown()
    for letter, table in zip("AB", tables, strict=False):
        print(f"{f'model {letter}' if len(tables) > 1 else 'model':<9} {table.name}")
    print(f"data      {args.data} | {tables[0].windows} windows of {tables[0].length} tokens\n")
    print(format_tables(tables))
    if args.json:
        _write_json(tables, args.json)
        print(f"\njson      {args.json}")
    if args.output:
        draw(tables, args.output)
        print(f"\nfigure    {args.output}")
    return 0


def format_tables(tables: Sequence[NoiseLevelTable]) -> str:
    """One table, or two of the same levels and their difference, aligned. Raises ConfigError as ``compare``."""
    shown = _with_difference(tables)
    several = len(shown) > 1
    losses, hits = ["nats/masked token"], ["accuracy"]
    if several:
        losses, hits = ([f"{what} {name}" for name in ("A", "B", "B - A")] for what in ("loss", "accuracy"))
    lines = [["mask ratio", "masked", *losses, *hits]]
    for rows in zip(*(table.rows for table in shown), strict=True):
        losses = [_format(row.cross_entropy, signed=i == 2) for i, row in enumerate(rows)]
        hits = [_format(row.accuracy, percent=True, signed=i == 2) for i, row in enumerate(rows)]
        lines.append([f"{rows[0].mask_ratio:.3f}", f"{rows[0].masked}/{tables[0].length}", *losses, *hits])
    nelbo = [_format(table.nelbo, signed=i == 2) for i, table in enumerate(shown)]
    lines.append(["average", "= NELBO", *nelbo, *[""] * len(shown)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    note = "Behind +- are standard errors, with windows as units."
    if several:
        note = f"{note}\nLosses are nats per masked token; differences are of pairs under the same masks."
    return "\n".join([*text[:-1], "-" * max(map(len, text)), text[-1], "", note])


def _levels(text: str) -> int | list[float]:
    try:
        return int(text) if text.strip().lstrip("+-").isdigit() else [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--levels is {text!r}; give a number of levels, or mask ratios: 0.1,0.5,1.0") from None


def _check_outputs(args: argparse.Namespace) -> None:
    """Find what would keep the files from being written, before anything is computed."""
    from megatron_dlm.figures.inference_costs import check_output

    if args.output:
        check_output(args.output)
    if args.json and args.json.is_dir():
        raise DataError(f"cannot write {args.json}: it is a directory; choose another file")
    if args.json and not args.json.parent.is_dir():
        raise DataError(f"cannot write {args.json}: {args.json.parent} is no directory; make it first")
    if args.json and args.json == args.output:
        raise ConfigError(f"--json and --output are both {args.json}; choose another file for one of them")


def _measure(args: argparse.Namespace, levels: int | list[float]) -> list[NoiseLevelTable]:
    """The tables of all models, which are opened first, so that what is wrong with the second shows before."""
    from megatron_dlm.evaluation.noise_level_table import check_model, noise_level_table
    from megatron_dlm.evaluation.progress import collect, with_bar
    from megatron_dlm.evaluation.text_nelbo import read_windows
    from megatron_dlm.generation.text_model import open_text_model

    models = []
    for path in args.checkpoint:
        models.append(open_text_model(path))
        check_model(models[-1])
    length = min(model.max_length for model in models)
    if len({model.tokenizer.fingerprint for model in models}) > 1:
        first, second = (read_windows(args.data, model.tokenizer, length).tokens.tolist() for model in models)
        if first != second:
            raise ConfigError("the two models have different tokenizers; compare models of one tokenizer")
    tables = []
    for path, model in zip(args.checkpoint, models, strict=True):
        parts = noise_level_table(model, args.data, levels=levels, windows=args.windows, length=length, seed=args.seed)
        (table,) = collect(with_bar(parts, path))
        tables.append(replace(table, name=path))
    return tables


def _with_difference(tables: Sequence[NoiseLevelTable]) -> list[NoiseLevelTable]:
    from megatron_dlm.evaluation.noise_level_table import compare

    return [*tables, compare(*tables)] if len(tables) == 2 else list(tables)


def _write_json(tables: Sequence[NoiseLevelTable], file: Path) -> None:
    """Whole or not at all."""
    names = ("first", "second", "difference") if len(tables) == 2 else ("table",)
    content = {name: table.as_dict() for name, table in zip(names, _with_difference(tables), strict=True)}
    try:
        write_text(file, json.dumps(content if len(tables) == 2 else content["table"], indent=1) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {file}: {error.strerror}; choose another file") from None


def _format(estimate: Estimate, *, percent: bool = False, signed: bool = False) -> str:
    scale, digits, unit = (100, 1, " %") if percent else (1, 3, "")
    error = f"{scale * estimate.standard_error:.{digits}f}"
    return f"{scale * estimate.value:{'+' if signed else ''}.{digits}f} +- {error}{unit}"
