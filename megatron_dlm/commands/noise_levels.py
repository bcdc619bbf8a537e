"""`megatron-dlm noise-levels`: cross-entropy and accuracy by mask ratio, of one or two masked diffusion models."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dlm.commands.common import add_layout, add_tokens_per_batch, layout_of, opened, tokens_per_batch
from megatron_dlm.errors import ConfigError
from megatron_dlm.files import check_file_output, write_json

if TYPE_CHECKING:
    from megatron_dlm.evaluation.noise_level_table import NoiseLevelTable


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
    parser.add_argument("--limit", type=int, metavar="N", help="read the first tokens of the text only")
    parser.add_argument(
        "--levels", default="10", metavar="N", help="how many mask ratios, or the ratios: 0.1,0.5,1.0 (%(default)s)"
    )
    parser.add_argument("--windows", type=int, default=64, metavar="N", help="windows of the text (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the masks (%(default)s)")
    add_tokens_per_batch(parser)
    parser.add_argument("--output", type=Path, metavar="FIGURE.png", help="draw both over the mask ratio")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table, and the differences, as JSON")
    add_layout(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table. Raises ConfigError or DataError, one line."""
    if len(args.checkpoint) > 2:
        raise ConfigError(f"--checkpoint is given {len(args.checkpoint)} times; give one model, or two to compare")
    levels = _levels(args.levels)
    _check_outputs(args)
    layout = layout_of(args)
    from megatron_dlm.checkpoint.collective import on_rank_zero
    from megatron_dlm.evaluation.noise_level_report import measure

    with ExitStack() as stack:
        # All are opened first, so that what is wrong with the second shows before anything is computed.
        models = [stack.enter_context(opened(path, layout)) for path in args.checkpoint]
        tables = measure(
            [model._replace(name=path) for path, model in zip(args.checkpoint, models, strict=True)],
            args.data,
            levels=levels,
            windows=args.windows,
            seed=args.seed,
            limit_tokens=args.limit,
            tokens_per_batch=tokens_per_batch(args),
        )
        on_rank_zero(lambda: _report(tables, args))
    return 0


def _report(tables: list[NoiseLevelTable], args: argparse.Namespace) -> None:
    from megatron_dlm.evaluation.noise_level_report import for_json, format_tables
    from megatron_dlm.figures.noise_levels import draw

    for letter, table in zip("AB", tables, strict=False):
        print(f"{f'model {letter}' if len(tables) > 1 else 'model':<9} {table.name}")
    print(f"data      {args.data} | {tables[0].windows} windows of {tables[0].length} tokens\n")
    print(format_tables(tables))
    if args.json:
        write_json(args.json, for_json(tables))
        print(f"\njson      {args.json}")
    if args.output:
        draw(tables, args.output)
        print(f"\nfigure    {args.output}")


def _levels(text: str) -> int | list[float]:
    try:
        return int(text) if text.strip().lstrip("+-").isdigit() else [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--levels is {text!r}; give a number of levels, or mask ratios: 0.1,0.5,1.0") from None


def _check_outputs(args: argparse.Namespace) -> None:
    """Find what would keep the files from being written, before anything is computed."""
    from megatron_dlm.figures.style import check_figure_output

    if args.output:
        check_figure_output(args.output)
    if args.json:
        check_file_output(args.json, "--json")
    if args.json and args.json == args.output:
        raise ConfigError(f"--json and --output are both {args.json}; choose another file for one of them")
