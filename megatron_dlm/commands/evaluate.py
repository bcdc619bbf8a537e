"""`megatron-dlm evaluate`: a model's answers to multiple-choice tasks, its NELBO on a text, and lm-eval's tasks."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dlm.commands.common import (
    add_checkpoint,
    add_layout,
    add_tokens_per_batch,
    check_at_least,
    layout_of,
    opened,
    refusing,
    say,
    tokens_per_batch,
)
from megatron_dlm.errors import ConfigError
from megatron_dlm.files import check_file_output, write_json
from megatron_dlm.launch import place

if TYPE_CHECKING:
    from megatron_dlm.evaluation.likelihood_masks import LikelihoodOptions
    from megatron_dlm.evaluation.results import Asked
    from megatron_dlm.generation.text_model import TextModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "--tasks",
        required=True,
        metavar="NAME,...",
        help="hellaswag, mmlu, arc_easy, arc_challenge, piqa, lambada: questions in --data; nelbo: the text in --data; "
        "lm_eval:NAME: a task of lm-eval, whose data it loads itself",
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
    add_tokens_per_batch(how)
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
    if args.output is not None:
        check_file_output(args.output, "--output", overwrite=args.overwrite)
    layout = layout_of(args)
    likelihood = _likelihood(args)
    from megatron_dlm.checkpoint.stored import is_checkpoint, open_checkpoint

    path = args.checkpoint
    if is_checkpoint(path):
        path = str(open_checkpoint(path).directory)  # now: a run that goes on will have a later one
    asked = _asked(names, likelihood, args)  # the files are read before the model, which takes longer
    with opened(path, layout) as model:
        if model.kind.causal and args.guidance:
            raise ConfigError("an autoregressive model has no guidance; leave out --guidance")
        _run(model, path, asked, args)
    return 0


def _run(model: TextModel, path: str, asked: Asked, args: argparse.Namespace) -> None:
    from megatron_dlm.checkpoint.collective import on_rank_zero
    from megatron_dlm.evaluation.provenance import PACKAGES, identify
    from megatron_dlm.evaluation.results import results_of, table
    from megatron_dlm.evaluation.run_tasks import open_answers
    from megatron_dlm.packages import versions

    first = place.is_first_rank()
    identity = identify(path, model)
    if first:
        print(f"model    {model.name}", flush=True)
    results: dict[str, dict[str, Any]] = {}
    with open_answers(model, args.output) as answers:
        if answers.note:
            say(f"note     {answers.note}")
        try:
            for name, result in results_of(model, identity, asked, answers):
                results[name] = result
                if first and (known := result.get("resumed")):
                    say(f"note     {name}: {known} of {result['questions']} questions are of an earlier run")
        except KeyboardInterrupt:
            if args.output is not None and first:
                say("stopped; the same command goes on where it was")
            raise
        if args.output is not None:
            given = vars(args) | {"tokens_per_batch": asked.options.likelihood.tokens_per_batch}
            content = {
                "command": shlex.join(["megatron-dlm", *sys.argv[1:]]),
                "model": identity,
                "versions": versions(PACKAGES),
                "options": {key: str(v) if isinstance(v, Path) else v for key, v in sorted(given.items())},
                "results": results,
            }
            on_rank_zero(lambda: write_json(args.output, content))
            answers.finish()
    if first:
        print("\n".join(table(results)))
        if args.output is not None:
            print(f"results  {args.output}")


def _names(args: argparse.Namespace) -> list[str]:
    """The tasks; what they need is there."""
    from megatron_dlm.evaluation.results import LM_EVAL, NELBO, find_text
    from megatron_dlm.evaluation.tasks import TASKS

    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    known = (*TASKS, NELBO)
    for name in names:
        if name not in known and (not name.startswith(LM_EVAL) or name == LM_EVAL):
            raise ConfigError(f"the task {name!r} is unknown; choose from {', '.join(known)}, {LM_EVAL}NAME")
    if not names or len(set(names)) < len(names):
        raise ConfigError("--tasks names no task, or one twice; give different names with commas between them")
    if args.data is None and (local := [name for name in names if name in known]):
        raise ConfigError(f"{local[0]} needs --data: a file, or a folder that has it")
    if NELBO in names and not TASKS.keys().isdisjoint(names) and find_text(args.data) is None:
        raise ConfigError(
            f"{args.data} has no {NELBO}.txt beside the questions; put the text there, or ask for it alone"
        )
    if any(name.startswith(LM_EVAL) for name in names) and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-eval's tasks need the package lm-eval: pip install 'megatron-dlm[eval]'")
    check_at_least(args, limit=1, masks=1, num_fewshot=0)
    if args.num_fewshot and not any(name == "mmlu" or name.startswith(LM_EVAL) for name in names):
        raise ConfigError("--num-fewshot is for mmlu and lm-eval's tasks; leave it out")
    return names


def _likelihood(args: argparse.Namespace) -> LikelihoodOptions:
    from megatron_dlm.evaluation.likelihood_masks import LikelihoodOptions

    with refusing():
        return LikelihoodOptions(
            estimator=args.estimator,
            guidance=args.guidance,
            seed=args.seed,
            tokens_per_batch=tokens_per_batch(args),
        )


def _asked(names: list[str], likelihood: LikelihoodOptions, args: argparse.Namespace) -> Asked:
    """What is asked, with the questions read. Raises as ``load_task``."""
    from megatron_dlm.evaluation.results import NELBO, Asked, find_text
    from megatron_dlm.evaluation.run_tasks import TaskOptions
    from megatron_dlm.evaluation.tasks import TASKS, load_task

    examples = {"mmlu": args.num_fewshot or 0}
    return Asked(
        names=names,
        tasks={
            name: load_task(name, args.data, limit=args.limit, num_fewshot=examples.get(name, 0))
            for name in names
            if name in TASKS
        },
        options=TaskOptions(likelihood, args.masks, args.log_questions),
        text=(find_text(args.data) or args.data) if NELBO in names else "",
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        include_path=args.include_path,
    )
