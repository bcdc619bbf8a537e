"""The results of all that a model is asked (questions, the NELBO of a text, lm-eval's tasks), and their table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_dlm.evaluation.likelihood_masks import DEFAULT_MASKS
from megatron_dlm.evaluation.progress import collect, with_bar
from megatron_dlm.evaluation.run_tasks import Answers, TaskOptions, evaluate_task
from megatron_dlm.evaluation.tasks import Task
from megatron_dlm.evaluation.text_nelbo import WINDOW_MASKS, text_nelbo
from megatron_dlm.formatting import format_table
from megatron_dlm.generation.text_model import TextModel

NELBO = "nelbo"
"""The task that is a text."""
LM_EVAL = "lm_eval:"
"""Before the names of lm-eval's tasks."""

_NELBO_FIGURES = ("nats_per_token", "bits_per_byte", "perplexity")


@dataclass(frozen=True)
class Asked:
    """What a model is asked."""

    names: Sequence[str]
    """Of ``tasks``, ``NELBO``, or ``LM_EVAL`` and a name; lm-eval's tasks come last."""
    tasks: Mapping[str, Task]
    """Those with questions, by name."""
    options: TaskOptions
    """Its ``masks`` are those of windows for the NELBO; None: as many as is usual for each."""
    text: str = ""
    """Of the NELBO: a file, or a prefix of prepared tokens."""
    limit: int | None = None
    """The first documents of lm-eval's tasks and the first tokens of a text; None: all."""
    num_fewshot: int | None = None
    """Examples of lm-eval's tasks; None: what they say."""
    include_path: str | None = None
    """A folder with further tasks for lm-eval."""


def results_of(
    model: TextModel, identity: dict[str, Any], asked: Asked, answers: Answers
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and results for JSON, each when it is known; there is a bar for what is being computed.

    Every rank of the model's layout must call it with the same arguments.

    Args:
        identity: of the model; see ``provenance.identify``.
        answers: where those to questions are kept.

    Raises:
        ConfigError: the model gives NaN, or lm-eval has no such task; one line.
        DataError: a text cannot be read, an option does not fit the model, or answers cannot be kept; one line.
    """
    for name in asked.names:
        if name in asked.tasks:
            parts = evaluate_task(model, identity, asked.tasks[name], asked.options, answers)
            (result,) = collect(with_bar(parts, name))
            yield name, result
        elif name == NELBO:
            yield name, _nelbo(model, asked)
    if external := [name.removeprefix(LM_EVAL) for name in asked.names if name.startswith(LM_EVAL)]:
        yield from _lm_eval(model, external, asked)


def find_text(data: str) -> str | None:
    """The text of the NELBO: ``data``, or ``nelbo.*`` where that is a folder; None where it has none.

    A prepared text is named without its suffix.
    """
    if not Path(data).is_dir():
        return data
    inside = Path(data) / NELBO
    if inside.with_suffix(".idx").is_file():
        return str(inside)
    files = (inside.with_suffix(suffix) for suffix in (".txt", ".jsonl", ".parquet"))
    return next((str(file) for file in files if file.is_file()), None)


def table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The lines of the table: every metric with its standard error, or its 95 % half-width; then notes."""
    rows = [["task", "questions", "metric", "value", "+- std. error"]]
    for name, result in results.items():
        metrics, questions = result["metrics"], result.get("questions")
        left = [name, "" if questions is None else f"{questions:,}"]
        for metric, value in metrics.items():
            if metric.endswith(("_stderr", "_ci95")):
                continue
            rows.append([*left, metric, "n/a" if value is None else _figure(value), _spread(metrics, metric)])
            left = ["", ""]
    cut = {name: result["truncated"] for name, result in results.items() if result.get("truncated")}
    return [
        *format_table(rows, right=(1, 3)),
        *(
            f"note     {name}: {count:,} contexts were cut at their beginnings to fit the model"
            for name, count in cut.items()
        ),
    ]


def _nelbo(model: TextModel, asked: Asked) -> dict[str, Any]:
    likelihood, masks = asked.options.likelihood, asked.options.masks
    parts = text_nelbo(
        model,
        asked.text,
        masks=WINDOW_MASKS if masks is None else masks,
        seed=likelihood.seed,
        limit_tokens=asked.limit,
        tokens_per_batch=likelihood.tokens_per_batch,
    )
    (found,) = collect(with_bar(parts, NELBO))
    figures = found.as_dict()
    metrics = {key: figures[key] for name in _NELBO_FIGURES for key in (name, f"{name}_ci95")}
    return {"metrics": metrics, "data": asked.text, **figures}


def _lm_eval(model: TextModel, names: list[str], asked: Asked) -> Iterator[tuple[str, dict[str, Any]]]:
    from megatron_dlm.evaluation.lm_eval_model import run_lm_eval  # a package that may be absent, and takes seconds

    masks = DEFAULT_MASKS if asked.options.masks is None else asked.options.masks
    found = run_lm_eval(
        model,
        names,
        replace(asked.options.likelihood, masks=masks),
        include_path=asked.include_path,
        limit=asked.limit,
        num_fewshot=asked.num_fewshot,
        log_questions=asked.options.log_questions,
    )
    for name, result in found.items():
        yield f"{LM_EVAL}{name}", result


def _spread(metrics: Mapping[str, float | None], metric: str) -> str:
    if (half := metrics.get(f"{metric}_ci95")) is not None:
        return f"+- {_figure(half)} (95 %)"
    error = metrics.get(f"{metric}_stderr")
    return "" if error is None else f"+- {_figure(error)}"


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4e}"
