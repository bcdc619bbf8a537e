"""Answers of a model to multiple-choice questions, by the likelihoods of the options, and what they are worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.errors import DataError
from megatron_dlm.evaluation.likelihood import LogLikelihood, Request
from megatron_dlm.evaluation.likelihood_masks import DEFAULT_MASKS, LikelihoodOptions
from megatron_dlm.evaluation.progress import Finished
from megatron_dlm.evaluation.scoring import encode_pair, score
from megatron_dlm.evaluation.tasks import Question, Task
from megatron_dlm.generation.text_model import TextModel


class EncodedTask(NamedTuple):
    """The questions of a task as tokens."""

    task: Task
    requests: list[list[Request]]
    """[questions][options]; the group is the index of the question."""
    truncated: int
    """Questions whose context has lost its beginning."""

    def masks(self, given: int | None) -> int:
        """Masks of every option: what is given, or the default, which is 1 where all options are single tokens."""
        single = all(len(request.target) == 1 for requests in self.requests for request in requests)
        return (1 if single else DEFAULT_MASKS) if given is None else given


class Answer(NamedTuple):
    """What a model says to a question."""

    values: tuple[float, ...]
    """Log-likelihoods of the options, nats."""
    errors: tuple[float | None, ...]
    """Their standard errors, nats; see ``LogLikelihood``."""
    greedy: bool | None
    """Of a task that asks for the last word: greedy decoding gives it."""


class Metric(NamedTuple):
    """A figure over all questions."""

    value: float
    stderr: float | None
    """Standard error, the questions being a sample; None: there is only one."""


def encode_task(task: Task, tokenizer: Tokenizer, max_length: int) -> EncodedTask:
    """The requests of all questions.

    Args:
        max_length: tokens of a context with an option; longer contexts are cut at their beginnings.

    Raises:
        DataError: an option alone is longer, or has no tokens; one line with its file and line.
    """
    encoded, truncated = [], 0
    for index, question in enumerate(task.questions):
        try:
            # Options follow the context behind a space, as in lm-eval's prompts.
            pairs = [encode_pair(tokenizer, question.context, f" {option}", max_length) for option in question.options]
        except ValueError as error:
            raise DataError(f"{question.origin}: {error}") from None
        encoded.append([Request(pair.context, pair.target, index) for pair in pairs])
        truncated += any(pair.truncated for pair in pairs)
    return EncodedTask(task, encoded, truncated)


def answer(
    model: TextModel, encoded: EncodedTask, options: LikelihoodOptions, *, known: Container[int] = ()
) -> Iterator[Finished[Answer]]:
    """The answers by index of the question; every rank of the model's layout must call it with the same arguments.

    The options of a question share their random numbers, so that they are compared under the same masks. An answer is
    a function of the model, the question's index and ``options``, whatever is asked beside it, but for rounding.

    Args:
        options: ``masks`` as ``EncodedTask.masks`` gives it.
        known: indices of questions that are not asked.

    Raises:
        ValueError: the model gives NaN; one line.
    """
    asked = [index for index in range(len(encoded.requests)) if index not in known]
    # The question of every request: results come as numbers of requests.
    owners = [index for index in asked for _ in encoded.requests[index]]
    last_word = encoded.task.kind == "last_word"
    requests = [request for index in asked for request in encoded.requests[index]]
    for part in score(model, requests, options, greedy=last_word):
        found: dict[int, list[LogLikelihood]] = {}
        for number in sorted(part.results):  # the options of a question, which come together, in their order
            found.setdefault(owners[number], []).append(part.results[number])
        yield Finished({index: _answer(results, last_word) for index, results in found.items()}, part.share)


def metrics(questions: Sequence[Question], answers: Sequence[Answer], kind: str) -> dict[str, Metric]:
    """The figures of a task.

    acc: the most likely option is right; acc_norm and acc_bytes: the one with the most likely character or UTF-8 byte
    on average (lm-eval's names and definitions). last_word: acc is that of greedy decoding, and perplexity is that of
    the whole word, for masked diffusion an upper bound.
    """
    if kind == "last_word":
        values = np.array([answer.values[0] for answer in answers])
        with np.errstate(over="ignore"):
            # exp of minus the mean log-likelihood of whole words, as lm-eval has it, and not of tokens.
            perplexity = float(np.exp(-values.mean()))
        spread = _mean(values).stderr if np.isfinite(values).all() else None
        return {
            "acc": _mean([bool(answer.greedy) for answer in answers]),
            "perplexity": Metric(perplexity, None if spread is None else perplexity * spread),
        }
    # A sum favours short options; each unit is another way to divide their length out.
    units: dict[str, Callable[[str], int]] = {"acc": lambda option: 1}
    if kind == "options":
        units |= {"acc_norm": len, "acc_bytes": lambda option: len(option.encode())}
    return {
        name: _mean([choice(q, a, unit) == q.answer for q, a in zip(questions, answers, strict=True)])
        for name, unit in units.items()
    }


def choice(question: Question, answer: Answer, unit: Callable[[str], int] = lambda option: 1) -> int:
    """Index of the option with the largest log-likelihood for every ``unit`` of it; of equals the first."""
    values = zip(answer.values, question.options, strict=True)
    return int(np.argmax([value / max(unit(option), 1) for value, option in values]))


def by_subject(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, dict[str, float | int]]:
    """Accuracy and number of questions of every subject, in alphabetical order."""
    hits: dict[str, list[bool]] = {}
    for question, each in zip(questions, answers, strict=True):
        if question.subject is not None:
            hits.setdefault(question.subject, []).append(choice(question, each) == question.answer)
    return {subject: {"acc": sum(h) / len(h), "questions": len(h)} for subject, h in sorted(hits.items())}


def _answer(results: Sequence[LogLikelihood], last_word: bool) -> Answer:
    return Answer(
        tuple(result.value for result in results),
        tuple(result.standard_error for result in results),
        results[0].is_greedy if last_word else None,
    )


def _mean(values: Sequence[float] | np.ndarray) -> Metric:
    """With the standard error of independent draws."""
    array = np.asarray(values, dtype=float)
    error = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else None
    return Metric(float(array.mean()), error)
