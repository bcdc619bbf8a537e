"""Evaluations of a model by tasks from local files: resumable, the same at every layout, with all that repeats them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_dlm.checkpoint.collective import on_rank_zero
from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.evaluation.likelihood_masks import LikelihoodOptions
from megatron_dlm.evaluation.multiple_choice import (
    Answer,
    EncodedTask,
    answer,
    by_subject,
    choice,
    encode_task,
    metrics,
)
from megatron_dlm.evaluation.partial_answers import PartialAnswers
from megatron_dlm.evaluation.progress import Finished
from megatron_dlm.evaluation.provenance import fingerprint, options_of
from megatron_dlm.evaluation.tasks import Task
from megatron_dlm.generation.text_model import TextModel


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are evaluated."""

    likelihood: LikelihoodOptions
    """Its ``masks`` are not read."""
    masks: int | None = None
    """Masks of every option; None: 1 where all options are single tokens, else 128."""
    log_questions: bool = False
    """Have every question's answer in the results."""


class Answers:
    """Where finished answers go: a file beside the output, or nowhere. Rank 0 has it, and the others ask it."""

    def __init__(self, model: TextModel, partial: PartialAnswers | None) -> None:
        self._model, self._partial = model, partial

    @property
    def note(self) -> str | None:
        """What the reader of the command's output should know; on rank 0."""
        if self._partial is None or not self._partial.damaged:
            return None
        return f"{self._partial.path} was damaged, so what it had is evaluated again"

    def known(self, key: str) -> dict[int, Answer]:
        """The answers of an earlier run; collective."""
        return on_rank_zero(lambda: self._partial.known(key) if self._partial else {})

    def add(self, key: str, new: Mapping[int, Answer]) -> None:
        """Keep answers. Raises ``DataError``, one line."""
        if self._partial:
            self._partial.add(key, new)

    def finish(self) -> None:
        """The output is written; nothing is to be kept."""
        if self._partial:
            self._partial.remove()


@contextlib.contextmanager
def open_answers(model: TextModel, output: Path | None) -> Iterator[Answers]:
    """The answers beside ``output``, if there is one; collective.

    Raises:
        ConfigError: another evaluation writes them; on every rank.
        DataError: the file cannot be written; on every rank.
    """
    opened: list[PartialAnswers] = []
    if output is not None:
        on_rank_zero(lambda: opened.append(PartialAnswers(output)))
    try:
        yield Answers(model, opened[0] if opened else None)
    finally:
        for partial in opened:
            partial.close()


def evaluate_task(
    model: TextModel,
    identity: dict[str, Any],
    task: Task,
    options: TaskOptions,
    answers: Answers,
) -> Iterator[Finished[dict[str, Any]]]:
    """The result of one task, for JSON, which comes last, as number 0.

    Answers are kept as they come. Every rank of the model's layout must call it with the same arguments.

    Args:
        identity: see ``provenance.identify``.

    Yields:
        metrics: each beside its standard error; questions; truncated: those whose contexts have lost their beginnings;
        resumed: those that an earlier run had answered; files; options; seconds; subjects, where there are some; log:
        every question, where it is asked for.

    Raises:
        ConfigError: the model gives NaN; one line.
        DataError: an option has too many tokens or none, or answers cannot be kept; one line.
    """
    started = time.perf_counter()
    encoded = encode_task(task, model.tokenizer, model.max_length)
    likelihood = replace(options.likelihood, masks=encoded.masks(options.masks))
    key = fingerprint(identity, task, likelihood)
    # A lower --limit than before leaves answers that are not asked for now.
    known = {index: each for index, each in answers.known(key).items() if index < len(task.questions)}
    by_index = dict(known)
    try:
        for part in answer(model, encoded, likelihood, known=known):
            if part.results:
                answers.add(key, part.results)
            by_index |= part.results
            yield Finished({}, part.share)
    except (ConfigError, DataError):
        raise
    except ValueError as error:
        raise ConfigError(f"{task.name}: {error}") from None
    # In the order of the questions, whatever order they were answered in.
    found = [by_index[index] for index in range(len(task.questions))]
    result: dict[str, Any] = {
        "metrics": flat(metrics(task.questions, found, task.kind)),
        "questions": len(task.questions),
        "truncated": encoded.truncated,
        "resumed": len(known),
        "num_fewshot": task.num_fewshot,
        "files": task.files,
        "options": None if model.kind.causal else options_of(likelihood),
        "seconds": round(time.perf_counter() - started, 3),
    }
    if subjects := by_subject(task.questions, found):
        result["subjects"] = subjects
    if options.log_questions:
        result["log"] = list(_log(encoded, found))
    yield Finished({0: result}, 1.0)


def flat(figures: Mapping[str, tuple[float, float | None]]) -> dict[str, float | None]:
    """``{"acc": value, "acc_stderr": error}``; None where there is no finite number, which JSON has not."""
    result: dict[str, float | None] = {}
    for name, (value, error) in figures.items():
        result[name] = value if math.isfinite(value) else None
        result[f"{name}_stderr"] = error
    return result


def _log(encoded: EncodedTask, found: list[Answer]) -> Iterator[dict[str, Any]]:
    for question, requests, each in zip(encoded.task.questions, encoded.requests, found, strict=True):
        record: dict[str, Any] = {
            "origin": question.origin,
            "answer": question.answer,
            "choice": choice(question, each),
            "values": [value if math.isfinite(value) else None for value in each.values],
            "standard_errors": list(each.errors),
            "tokens": [len(request.target) for request in requests],
        }
        yield record if each.greedy is None else record | {"greedy": each.greedy}
