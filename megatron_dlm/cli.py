"""The command line: `megatron-dlm COMMAND`, also `python -m megatron_dlm` and under torchrun."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword
from types import ModuleType
from typing import NoReturn

from megatron_dlm import __version__
from megatron_dlm.errors import ConfigError, DataError, TrainingError

_HEAD_START = 2.0  # seconds that rank 0 gets to print an error

COMMANDS = {
    "prepare": "Turn text into the token files that training reads.",
    "train": "Train a model; starts one worker per process of the layout.",
    "sample": "Print text from a run, a checkpoint or an export.",
    "evaluate": "Ask a model the questions of public tasks, measure its NELBO, or run lm-eval's tasks.",
    "export": "Turn a checkpoint into a Hugging Face directory.",
    "import": "Turn a Hugging Face model into a checkpoint.",
    "crossover": "Train paired DLM and AR models over a grid, and say when the DLM overtakes.",
    "estimate": "Show what generating text and training cost, in FLOPs; needs no GPU.",
    "plot": "Draw what one or several runs have learned.",
    "noise-levels": "Show a masked diffusion model's loss and accuracy by mask ratio, or compare two.",
    "plan": "Show what a run needs and how fast it will be on a cluster; no GPU is needed.",
    "doctor": "Show what this machine has and which path a run will take.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code: 2 for one-line errors of the configuration, the data or usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except (ConfigError, DataError) as error:
        from megatron_dlm.launch.place import is_first_rank

        if is_first_rank():
            print(f"megatron-dlm: error: {error}", file=sys.stderr)
        else:  # under torchrun every process finds the same error, and the first to end makes it kill the others
            time.sleep(_HEAD_START)
        return 2
    except TrainingError as error:
        print(f"megatron-dlm: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # of `| head`: nobody reads what would follow, and the interpreter must not try again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _run(arguments: list[str]) -> int:
    # The options of train are the configuration tree's, so its parser is built from that.
    if arguments[:1] == ["train"]:
        return import_module("megatron_dlm.commands.train").run(arguments[1:])
    parser = _Parser(prog="megatron-dlm", description="Train masked diffusion language models on megatron-core.")
    parser.add_argument("--version", action="version", version=f"megatron-dlm {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if arguments[:1] == [name]:
            module_of(name).add_arguments(subparser)
    args = parser.parse_args(arguments)
    return module_of(args.command).run(args)


def module_of(command: str) -> ModuleType:
    """What has the command's ``add_arguments`` and ``run``."""
    if command == "crossover":  # on top of the command line, not beside it
        return import_module("megatron_dlm.crossover.command")
    return import_module(f"megatron_dlm.commands.{command.replace('-', '_')}{'_' if iskeyword(command) else ''}")
