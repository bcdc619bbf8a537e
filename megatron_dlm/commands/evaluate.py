"""`megatron-dlm evaluate`: a model's answers to multiple-choice tasks, its NELBO on texts, and lm-eval's tasks."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dlm.commands.common import add_checkpoint, add_layout, layout_of, opened
from megatron_dlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_dlm.evaluation.likelihood_masks import LikelihoodOptions
    from megatron_dlm.evaluation.run_tasks import Answers
    from megatron_dlm.evaluation.tasks import Task
    from megatron_dlm.generation.text_model import TextModel

_LM_EVAL = "lm_eval:"
_TEXT_TASKS = ("nelbo", "noise_levels")
_TOKENS_PER_BATCH_ON_CPU = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "--tasks",
        required=True,
        metavar="NAME,...",
        help="hellaswag, mmlu, arc_easy, arc_challenge, piqa, lambada: questions in --data; nelbo, noise_levels: the "
        "text in --data; lm_eval:NAME: a task of lm-eval, whose data it loads itself",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        metavar="PATH",
        help="the file of the only task (JSON lines or parquet, as published), or a folder with NAME.jsonl or "
        "NAME.parquet for every task, or NAME/ with the files of the published data set; for nelbo a text file, JSON "
        'lines with "text", or a prefix that `megatron-dlm prepare` wrote',
    )
    data.add_argument("--limit", type=int, metavar="N", help="the first questions of a task (of a text: tokens)")
    data.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="answered questions before each: of mmlu (from mmlu_dev.jsonl or mmlu/dev*) and of lm-eval's tasks",
    )
    data.add_argument("--include-path", metavar="DIR", help="a folder with YAML files of further tasks for lm-eval")
    how = parser.add_argument_group("likelihoods of a masked diffusion model (autoregressive ones are exact)")
    how.add_argument(
        "--masks",
        type=int,
        metavar="N",
        help="masks of every answer (128, as is usual for HellaSwag; 1 where all answers are single tokens, as MMLU's "
        "letters, which is exact; nelbo: 16 for every window)",
    )
    how.add_argument(
        "--guidance",
        type=float,
        default=0.0,
        metavar="G",
        help="classifier-free guidance (%(default)s); LLaDA takes 0.5 for HellaSwag, ARC and PIQA, and 0 for MMLU",
    )
    how.add_argument(
        "--estimator",
        default="exact_count",
        choices=("exact_count", "one_over_t", "left_to_right"),
        help="of the bound (%(default)s); left_to_right is another quantity, the likelihood in one order",
    )
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of the masks (%(default)s)")
    how.add_argument(
        "--tokens-per-batch",
        type=int,
        metavar="N",
        help="of one forward; less needs less memory (16384 on a GPU, 4096 without, where larger ones are slower)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="write the results with all that repeats them; a run that was stopped goes on where it was",
    )
    output.add_argument("--log-questions", action="store_true", help="write every question's answer into it, too")
    output.add_argument("--overwrite", action="store_true", help="replace the output file")
    add_layout(parser)


def run(args: argparse.Namespace) -> int:
    """Print a table of the results. Raises ConfigError or DataError, one line."""
    names = _names(args)
    _check_output(args)
    layout = layout_of(args)
    likelihood = _likelihood(args)
    from megatron_dlm.checkpoint.stored import is_checkpoint, open_checkpoint
    from megatron_dlm.evaluation.tasks import TASKS, load_task

    path = args.checkpoint
    if is_checkpoint(path):
        path = str(open_checkpoint(path).directory)  # now: a run that goes on will have a later one
    # The files are read before the model, which takes longer.
    fewshot = {name: args.num_fewshot or 0 for name in names if name == "mmlu"}
    tasks = {
        name: load_task(name, args.data, limit=args.limit, num_fewshot=fewshot.get(name, 0))
        for name in names
        if name in TASKS
    }
    with opened(path, layout) as model:
        _run(model, path, names, tasks, likelihood, args)
    return 0


def _run(
    model: TextModel,
    path: str,
    names: list[str],
    tasks: dict[str, Task],
    likelihood: LikelihoodOptions,
    args: argparse.Namespace,
) -> None:
    from megatron_dlm.evaluation.partial_answers import write_json
    from megatron_dlm.evaluation.provenance import identify, versions
    from megatron_dlm.evaluation.run_tasks import on_first_rank, open_answers

    if model.kind.causal and args.guidance:
        raise ConfigError("an autoregressive model has no guidance; leave out --guidance")
    first = os.environ.get("RANK", "0") == "0"
    identity = identify(path, model)
    if first:
        print(f"model    {model.name}", flush=True)
    results: dict[str, dict[str, Any]] = {}
    with open_answers(model, args.output) as answers:
        if answers.note:
            _say(f"note     {answers.note}")
        for name in names:
            if name in tasks:
                results[name] = _evaluate(model, identity, tasks[name], likelihood, answers, args, first)
            elif name in _TEXT_TASKS:
                results[name] = _measure_text(model, name, likelihood, args)
        if external := [name.removeprefix(_LM_EVAL) for name in names if name.startswith(_LM_EVAL)]:
            results |= _lm_eval(model, external, likelihood, args)
        if args.output is not None:
            given = vars(args) | {"tokens_per_batch": likelihood.tokens_per_batch}
            content = {
                "command": shlex.join(["megatron-dlm", *sys.argv[1:]]),
                "model": identity,
                "versions": versions(),
                "options": {key: str(v) if isinstance(v, Path) else v for key, v in sorted(given.items())},
                "results": results,
            }
            on_first_rank(model, lambda: write_json(args.output, content))
            answers.finish()
    if first:
        print("\n".join(table(results)))
        if args.output is not None:
            print(f"results  {args.output}")


def _evaluate(
    model: TextModel,
    identity: dict[str, Any],
    task: Task,
    likelihood: LikelihoodOptions,
    answers: Answers,
    args: argparse.Namespace,
    first: bool,
) -> dict[str, Any]:
    from megatron_dlm.evaluation.progress import collect, with_bar
    from megatron_dlm.evaluation.run_tasks import TaskOptions, evaluate_task

    options = TaskOptions(likelihood, args.masks, args.log_questions)
    try:
        (result,) = collect(with_bar(evaluate_task(model, identity, task, options, answers), task.name))
    except KeyboardInterrupt:
        if args.output is not None and first:
            _say("stopped; the same command goes on where it was")
        raise
    if first and result["resumed"]:
        _say(f"note     {task.name}: {result['resumed']} of {result['questions']} questions are of an earlier run")
    return result


def _measure_text(
    model: TextModel, name: str, likelihood: LikelihoodOptions, args: argparse.Namespace
) -> dict[str, Any]:
    """NELBO, or the loss by noise level."""
    common = {"seed": args.seed, "limit_tokens": args.limit, "tokens_per_batch": likelihood.tokens_per_batch}
    source = _text(args.data, name)
    from megatron_dlm.evaluation.progress import collect, with_bar

    if name == "nelbo":
        from megatron_dlm.evaluation.text_nelbo import WINDOW_MASKS, text_nelbo

        masks = WINDOW_MASKS if args.masks is None else args.masks
        (nelbo,) = collect(with_bar(text_nelbo(model, source, masks=masks, **common), name))
        return {"metrics": _nelbo_metrics(nelbo.as_dict()), "data": source, **nelbo.as_dict()}
    from megatron_dlm.evaluation.noise_level_table import noise_level_table

    (table,) = collect(with_bar(noise_level_table(model, source, **common), name))
    levels = table.as_dict()
    metrics = {f"loss@{level['mask_ratio']:.2f}": level["cross_entropy"] for level in levels["levels"]}
    errors = {
        f"loss@{level['mask_ratio']:.2f}_stderr": level["cross_entropy_standard_error"] for level in levels["levels"]
    }
    return {"metrics": metrics | errors, **levels}


def _text(data: str, name: str) -> str:
    """The text of a task: ``NAME.*`` in a folder that has other tasks too, or the data itself."""
    inside = Path(data) / name
    if not Path(data).is_dir():
        return data
    if inside.with_suffix(".idx").is_file():  # prepared
        return str(inside)
    files = (inside.with_suffix(suffix) for suffix in (".txt", ".jsonl", ".parquet"))
    return next((str(file) for file in files if file.is_file()), data)


def _nelbo_metrics(nelbo: dict[str, Any]) -> dict[str, float | None]:
    names = ("nats_per_token", "bits_per_byte", "perplexity")
    return {key: nelbo[key] for name in names for key in (name, f"{name}_ci95")}


def _lm_eval(
    model: TextModel, names: list[str], likelihood: LikelihoodOptions, args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    from dataclasses import replace

    from megatron_dlm.evaluation.likelihood_masks import DEFAULT_MASKS
    from megatron_dlm.evaluation.lm_eval_model import run_lm_eval

    found = run_lm_eval(
        model,
        names,
        replace(likelihood, masks=DEFAULT_MASKS if args.masks is None else args.masks),
        include_path=args.include_path,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        log_questions=args.log_questions,
    )
    return {f"{_LM_EVAL}{name}": result for name, result in found.items()}


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of the table: every metric with its standard error, or its 95 % half-width."""
    rows = [["task", "questions", "metric", "value", "+- std. error"]]
    for name, result in results.items():
        metrics, questions = result["metrics"], result.get("questions")
        left = [name, "" if questions is None else f"{questions:,}"]
        for metric, value in metrics.items():
            if metric.endswith(("_stderr", "_ci95")):
                continue
            error, half = metrics.get(f"{metric}_stderr"), metrics.get(f"{metric}_ci95")
            spread = "" if error is None else f"+- {_figure(error)}"
            if half is not None:
                spread = f"+- {_figure(half)} (95 %)"
            rows.append([*left, metric, "n/a" if value is None else _figure(value), spread])
            left = ["", ""]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for task, questions, metric, value, spread in rows:
        cells = (task.ljust(widths[0]), questions.rjust(widths[1]), metric.ljust(widths[2]), value.rjust(widths[3]))
        lines.append("  ".join((*cells, spread)).rstrip())
    for name, result in results.items():
        if result.get("truncated"):
            lines.append(
                f"note     {name}: {result['truncated']:,} contexts were cut at their beginnings to fit the model"
            )
    return lines


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4e}"


def _names(args: argparse.Namespace) -> list[str]:
    """The tasks; what they need is there."""
    from megatron_dlm.evaluation.tasks import TASKS

    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    known = (*TASKS, *_TEXT_TASKS)
    for name in names:
        if name not in known and (not name.startswith(_LM_EVAL) or name == _LM_EVAL):
            raise ConfigError(f"the task {name!r} is unknown; choose from {', '.join(known)}, {_LM_EVAL}NAME")
    if not names or len(set(names)) < len(names):
        raise ConfigError("--tasks names no task, or one twice; give different names with commas between them")
    if args.data is None and (local := [name for name in names if name in known]):
        raise ConfigError(f"{local[0]} needs --data: a file, or a folder that has it")
    asked, texts = ([name for name in names if name in group] for group in (TASKS, _TEXT_TASKS))
    if asked and (lost := [name for name in texts if Path(args.data).is_dir() and _text(args.data, name) == args.data]):
        raise ConfigError(
            f"{args.data} has no {lost[0]}.txt beside the questions; put the text there, or ask for it alone"
        )
    if any(name.startswith(_LM_EVAL) for name in names) and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-eval's tasks need the package lm-eval: pip install 'megatron-dlm[eval]'")
    for option, least in (("limit", 1), ("masks", 1), ("num_fewshot", 0)):
        if (value := getattr(args, option)) is not None and value < least:
            raise ConfigError(f"--{option.replace('_', '-')} is {value}; it must be at least {least}")
    if args.num_fewshot and not any(name == "mmlu" or name.startswith(_LM_EVAL) for name in names):
        raise ConfigError("--num-fewshot is for mmlu and lm-eval's tasks; leave it out")
    return names


def _check_output(args: argparse.Namespace) -> None:
    if args.output is None:
        return
    if args.output.is_dir() or (args.output.exists() and not args.overwrite):
        raise ConfigError(f"{args.output} is there already; use --overwrite, or choose another --output")
    if not os.access(args.output.parent, os.W_OK | os.X_OK):
        raise DataError(
            f"cannot write {args.output}: {args.output.parent} is no folder that can be written to; make it"
        )


def _likelihood(args: argparse.Namespace) -> LikelihoodOptions:
    import torch

    from megatron_dlm.evaluation.likelihood_masks import TOKENS_PER_BATCH, LikelihoodOptions

    tokens = args.tokens_per_batch
    if tokens is None:
        tokens = TOKENS_PER_BATCH if torch.cuda.is_available() else _TOKENS_PER_BATCH_ON_CPU
    try:
        return LikelihoodOptions(
            estimator=args.estimator, guidance=args.guidance, seed=args.seed, tokens_per_batch=tokens
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
