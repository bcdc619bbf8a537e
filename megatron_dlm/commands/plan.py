"""`megatron-dlm plan`: what a run needs and how fast it will be on a cluster, without a GPU."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dlm.commands.common import check_at_least, say, tokenizer_size
from megatron_dlm.errors import ConfigError
from megatron_dlm.files import check_file_output, write_json
from megatron_dlm.formatting import format_count, format_duration, format_table

if TYPE_CHECKING:
    from megatron_dlm.config.tree import Config
    from megatron_dlm.rehearsal.prediction import Prediction
    from megatron_dlm.rehearsal.search import Candidate

_GPUS = ("a100", "h100", "h200", "b200")
_SHOWN = 10
"""Layouts of a search that are printed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "One step of the first, a middle and the last pipeline stage is run with tensors that hold nothing and\n"
        "process groups that connect nothing: memory, FLOPs and communication are those of the code that trains.\n"
        "Times are these over constants of the GPU (megatron_dlm/rehearsal/machines.py), and no measurement."
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a training configuration")
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="GPUs of the cluster, in nodes of eight")
    parser.add_argument("--gpu", choices=_GPUS, default="h100", help="kind of GPU (%(default)s)")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="ids of the vocabulary (those of data.tokenizer)")
    parser.add_argument("--search", action="store_true", help="look for the layout with the most tokens per second")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--output", type=Path, metavar="FIGURE.png", help="draw memory and time")
    parser.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        metavar="-- --section.key value",
        help="changes of the configuration, behind two dashes, as for train",
    )


def run(args: argparse.Namespace) -> int:
    """Print the plan; exit code 1 where the memory does not suffice. Raises ConfigError or DataError, one line."""
    # The rehearsal is of a CPU build's tensors wherever it runs; it must not touch a GPU that somebody trains on.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_dlm.config.load import load_config
    from megatron_dlm.rehearsal.machines import MACHINES
    from megatron_dlm.rehearsal.prediction import predict

    check_at_least(args, gpus=1, vocab_size=1)
    if args.json:
        check_file_output(args.json, "--json")
    if args.output:
        from megatron_dlm.figures.style import check_figure_output

        check_figure_output(args.output)
    config = load_config(
        ["--config", args.config, *(args.overrides[1:] if args.overrides[:1] == ["--"] else args.overrides)]
    )
    vocab_size = args.vocab_size or tokenizer_size(args.config, config.data.tokenizer)
    machine = MACHINES[args.gpu]
    found: list[Candidate] = []
    if args.search:
        from megatron_dlm.rehearsal.search import search

        found = search(config, args.gpus, machine, vocab_size=vocab_size, say=say)
        if found[0].prediction is None or found[0].reason:
            raise ConfigError(
                f"no layout fits {args.gpus} x {args.gpu}: {found[0].label} {found[0].reason}; use more GPUs"
            )
        config = found[0].config
        print("\n".join([*_table_of(found), "", *_snippet(config), ""]))
    _check(config, args.gpus, vocab_size)
    prediction = predict(config, args.gpus, machine, vocab_size=vocab_size)
    print("\n".join(_lines(config, prediction, args)))
    if args.json:
        write_json(args.json, _content(args, config, prediction, found))
    if args.output:
        from megatron_dlm.figures.plan import draw

        draw(prediction, machine, args.output, title=f"{args.gpus} x {args.gpu} | {prediction.layout}")
    return 0 if prediction.fits(machine) else 1


def _check(config: Config, gpus: int, vocab_size: int) -> None:
    from megatron_dlm.config.check import validate

    validate(config, world_size=gpus, vocab_size=vocab_size)


def _lines(config: Config, prediction: Prediction, args: argparse.Namespace) -> list[str]:
    from megatron_dlm.rehearsal.machines import MACHINES

    machine = MACHINES[args.gpu]
    names = ["first", "middle", "last"] if len(prediction.stages) == 3 else ["first", "last"]
    memory = [["GB of a rank", "weights", "gradients", "optimizer", "saved", "temporary", "reserved", "total"]]
    times = [["ms of a micro-batch", "matmul", "attention", "elementwise", "TP", "PP", "total"]]
    for name, held, time in zip(names, prediction.memory, prediction.stages, strict=False):
        memory.append([f"{name} stage", *(f"{size / 1e9:.2f}" for size in (*held, held.total))])
        times.append([f"{name} stage", *(f"{1e3 * seconds:.2f}" for seconds in (*time, time.total))])
    steps = config.train.steps
    fits = "fits" if prediction.fits(machine) else "DOES NOT FIT"
    return [
        f"layout     {prediction.layout} on {args.gpus} x {args.gpu} | {prediction.micro_batches} micro-batches a step",
        f"memory     {fits} into {machine.memory / 1e9:.0f} GB, with every token masked",
        "",
        *format_table(memory, right=range(1, 8)),
        "",
        *format_table(times, right=range(1, 7)),
        "",
        f"step       {prediction.seconds:.3f} s = micro-batches "
        f"{prediction.seconds - prediction.bubble - prediction.gradients - prediction.update:.3f} + bubble "
        f"{prediction.bubble:.3f} + gradients {prediction.gradients:.3f} + optimizer {prediction.update:.3f}",
        f"rate       {format_count(prediction.tokens_per_second)} tokens/s | MFU {100 * prediction.mfu:.1f} %",
        *(
            [
                f"run        {steps} steps in {format_duration(steps * prediction.seconds)} | "
                f"{format_count(steps * prediction.seconds * args.gpus / 3600)} GPU-hours"
            ]
            if steps
            else []
        ),
        f"waits      the host waits for the device {sum(prediction.waits.values())} times a step: "
        + ", ".join(f"{wait.what} at {wait.where}" for wait in prediction.waits),
        "predicted from constants of data sheets and public figures; nothing overlaps; no measurement",
    ]


def _table_of(found: list[Candidate]) -> list[str]:
    rows = [["layout", "tokens/s", "MFU", "GB"]]
    for candidate in found[:_SHOWN]:
        if (prediction := candidate.prediction) is None or candidate.reason:
            break
        most = max(memory.total for memory in prediction.memory)
        rate, mfu = f"{prediction.tokens_per_second:,.0f}", f"{100 * prediction.mfu:.1f} %"
        rows.append([candidate.label, rate, mfu, f"{most / 1e9:.0f}"])
    return format_table(rows, right=range(1, 4))


def _snippet(config: Config) -> list[str]:
    """What to put into the configuration."""
    parallel, train = config.parallel, config.train
    virtual = parallel.virtual_pipeline_model_parallel_size
    return [
        "parallel:",
        f"  tensor_model_parallel_size: {parallel.tensor_model_parallel_size}",
        f"  sequence_parallel: {str(parallel.sequence_parallel).lower()}",
        f"  pipeline_model_parallel_size: {parallel.pipeline_model_parallel_size}",
        f"  virtual_pipeline_model_parallel_size: {virtual or 'null'}",
        f"train: {{micro_batch_size: {train.micro_batch_size}, recompute: {train.recompute}}}",
    ]


def _content(
    args: argparse.Namespace, config: Config, prediction: Prediction, found: list[Candidate]
) -> dict[str, Any]:
    return {
        "gpus": args.gpus,
        "gpu": args.gpu,
        "layout": prediction.layout,
        "micro_batches": prediction.micro_batches,
        "memory_bytes": [memory._asdict() | {"total": memory.total} for memory in prediction.memory],
        "micro_batch_seconds": [time._asdict() | {"total": time.total} for time in prediction.stages],
        "bubble_seconds": prediction.bubble,
        "gradient_seconds": prediction.gradients,
        "update_seconds": prediction.update,
        "step_seconds": prediction.seconds,
        "tokens_per_second": prediction.tokens_per_second,
        "mfu": prediction.mfu,
        "collectives": [
            {"phase": phase, **collective._asdict(), "calls": calls, "bytes": size}
            for (phase, collective), (calls, size) in prediction.collectives.items()
        ],
        "waits": [{**wait._asdict(), "times": times} for wait, times in prediction.waits.items()],
        "search": [
            {
                "layout": candidate.label,
                "reason": candidate.reason,
                "tokens_per_second": candidate.prediction and candidate.prediction.tokens_per_second,
            }
            for candidate in found
        ],
    }
