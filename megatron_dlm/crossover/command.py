"""`megatron-dlm crossover`: paired DLM and AR runs over a grid; tables and figures."""

from __future__ import annotations

import argparse
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dlm.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from megatron_dlm.crossover.grid import Crossover


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from megatron_dlm.crossover import grid as crossover_grid

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = crossover_grid.__doc__
    parser.add_argument("--config", required=True, metavar="FILE", help="the base configuration and the grid (YAML)")
    parser.add_argument("--output", metavar="DIR", help="folder of the arms and the results (base.run.directory)")
    parser.add_argument("--arms-at-once", type=int, metavar="N", help="arms trained at the same time (arms_at_once)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--plan",
        action="store_true",
        help="train nothing: write every arm's configuration and print the command that trains it, for a cluster",
    )
    instead.add_argument(
        "--report", action="store_true", help="train nothing: tables and figures of the arms that are finished"
    )


def run(args: argparse.Namespace) -> int:
    """Train what is not finished, then report; exit codes as of `train`. Raises ConfigError or DataError, one line."""
    from megatron_dlm.crossover.grid import check_recorded, load_crossover
    from megatron_dlm.launch import place

    if place.adopt():
        raise ConfigError(
            "crossover starts the processes of its arms itself; without torchrun, use --plan, and give torchrun the "
            "commands that it prints"
        )
    crossover = load_crossover(args.config, output=args.output, arms_at_once=args.arms_at_once)
    if args.plan:
        return _plan(crossover)
    if args.report:
        check_recorded(crossover)
        return _report(crossover)
    from megatron_dlm.crossover.arms import train_arms

    outcome = train_arms(crossover, _say)
    if outcome.stopped:
        saved = "" if outcome.failed else "everything is saved, and "
        print(f"stopped: {saved}the same command goes on")
        return outcome.exit_code
    if len(outcome.failed) < len(crossover.arms):
        _report(crossover)
    if outcome.failed:
        print(f"{len(outcome.failed)} arms failed; the same command tries them again: {', '.join(outcome.failed)}")
    return outcome.exit_code


def _say(line: str) -> None:
    print(line, flush=True)


def _plan(crossover: Crossover) -> int:
    from megatron_dlm.crossover.arms import check_arms, write_arms
    from megatron_dlm.crossover.grid import folder_of

    write_arms(crossover, check_arms(crossover))
    for config in crossover.arms.values():
        command = shlex.join(["megatron-dlm", "train", "--config", str(Path(config.run.directory, "train.yaml"))])
        print(f"# finished: {command}" if folder_of(config).is_finished else command)
    return 0


def _report(crossover: Crossover) -> int:
    """Write and print what the finished arms say.

    Raises ``ConfigError`` where there are none, ``DataError`` for damaged records, ``TrainingError`` where the report
    cannot be written.
    """
    from megatron_dlm.crossover.cells import analyse
    from megatron_dlm.crossover.grid import finished_runs, folder_of
    from megatron_dlm.crossover.report import as_json, markdown
    from megatron_dlm.files import json_text, write_text

    cells = analyse(finished_runs(crossover))
    if not cells:
        raise ConfigError(f"no arm in {crossover.directory} is finished; run the command without --report")
    unfinished = [arm.name for arm, config in crossover.arms.items() if not folder_of(config).is_finished]
    text, outputs = markdown(cells, unfinished), [crossover.directory / f"crossover.{kind}" for kind in ("md", "json")]
    try:
        write_text(outputs[0], text)
        write_text(outputs[1], json_text(as_json(cells, unfinished)))
        if find_spec("matplotlib"):
            from megatron_dlm.crossover.figure import draw

            outputs += [crossover.directory / "crossover.png", crossover.directory / "crossover-flops.png"]
            draw(cells, outputs[2], "epochs")
            draw(cells, outputs[3], "flops")
        else:
            _say("no figure: matplotlib is not installed (pip install 'megatron-dlm[log]')")
    except OSError as error:
        raise TrainingError(
            f"cannot write {crossover.directory}: {error.strerror}; make room, then use --report"
        ) from None
    print(text)
    print("outputs  " + ", ".join(map(str, outputs)))
    return 0
