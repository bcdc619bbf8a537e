"""`megatron-dlm plot`: a figure of what one or several runs have learned."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_dlm.run_folder import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from megatron_dlm.figures.runs import AXES

    parser.add_argument("runs", nargs="+", metavar="RUN", help="the directory of a run, or its metrics.jsonl")
    parser.add_argument(
        "--x", choices=AXES, default="tokens", help="the x axis of what changes over training (%(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help=".png, .svg or .pdf (loss.png in the first folder)")


def run(args: argparse.Namespace) -> int:
    """Draw the figure and print its path. Raises ConfigError or DataError, one line."""
    from megatron_dlm.figures.runs import draw, read_runs
    from megatron_dlm.figures.style import check_figure_output

    runs, label = read_runs(args.runs, args.x)
    output = args.output or RunFolder.at(args.runs[0]).path / "loss.png"
    check_figure_output(output)
    draw(runs, label, output)
    print(output)
    return 0
