"""Public multiple-choice tasks: from the rows of their files, as they are published, to contexts and options.

Prompts are those of lm-eval's tasks of the same names, so that figures compare.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.evaluation.task_files import Row, digests, find_task_files, read_rows

PROMPTS = 1
"""Of this file: raised when a change of it changes a prompt, so that no results are mixed."""

_LETTERS = ("A", "B", "C", "D")


class Question(NamedTuple):
    """What a model is asked."""

    context: str
    options: tuple[str, ...]
    """Each is scored behind the context and a space."""
    answer: int
    """Index of the right option."""
    origin: str
    """File and line."""
    subject: str | None = None


class Task(NamedTuple):
    """The questions of a task, and where they are from."""

    name: str
    kind: Literal["options", "letters", "last_word"]
    """options: the most likely one is the answer, also per character and per byte. letters: so, but all are of one
    length. last_word: one option, which greedy decoding must give, and its perplexity."""
    questions: list[Question]
    files: list[dict[str, str]]
    """Path and SHA-256 of each; those of the examples come last."""
    num_fewshot: int = 0


class _Layout(NamedTuple):
    """How a task is published."""

    kind: Literal["options", "letters", "last_word"]
    names: tuple[str, ...]
    splits: tuple[str, ...]
    """Where the answers are, the usual one first; how the names of their files begin."""
    rows: str
    question: Callable[[Row], Question]


def load_task(name: str, data: str | Path, *, limit: int | None = None, num_fewshot: int = 0) -> Task:
    """The questions of a task.

    Args:
        name: one of ``TASKS``.
        data: its file, or a folder; see ``find_task_files``.
        limit: take only the first questions; None: all.
        num_fewshot: of ``mmlu`` alone: so many answered questions of the same subject come first, the first ones of the
            split "dev"; ``data`` is a folder then.

    Raises:
        ConfigError: the task is unknown, or has no examples; one line.
        DataError: its file does not fit; one line with the file, the line and the key.
    """
    if name not in TASKS:
        raise ConfigError(f"the task {name!r} is unknown; choose from {', '.join(TASKS)}")
    layout = TASKS[name]
    for option, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{option} is {value}; it must be at least {least}")
    paths = find_task_files(data, layout.names, layout.splits)
    questions = [layout.question(row) for row in islice(read_rows(paths, layout.rows), limit)]
    if not questions:
        raise DataError(f"{paths[0]} has no rows; copy it again")
    files = digests(paths)
    if num_fewshot and layout.kind != "letters":
        raise ConfigError(f"num_fewshot is for mmlu, not for {name}; leave it out")
    if num_fewshot:
        if Path(data).is_file():
            raise DataError(f"{data} is a file; examples need a folder that has {name}.jsonl and {name}_dev.jsonl")
        examples = find_task_files(data, layout.names, ("dev",), suffix="_dev")
        known = [layout.question(row) for row in read_rows(examples, layout.rows)]
        questions = _with_examples(questions, known, num_fewshot)
        files += digests(examples)
    elif layout.kind == "letters":
        questions = [_introduced(question, "") for question in questions]
    return Task(name, layout.kind, questions, files, num_fewshot)


def _hellaswag(row: Row) -> Question:
    before = f"{row.text('ctx_a', empty=True)} {row.text('ctx_b', empty=True).capitalize()}"
    endings = [_without_brackets(ending) for ending in row.texts("endings")]
    context = _without_brackets(f"{row.text('activity_label')}: {before}")
    return Question(context, tuple(endings), row.option("label", len(endings)), row.origin)


def _without_brackets(text: str) -> str:
    """WikiHow's texts have marks such as [header], of which [title] ends a sentence."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _mmlu(row: Row) -> Question:
    lines = [row.text("question").strip()]
    lines += [
        f"{letter}. {choice}" for letter, choice in zip(_LETTERS, row.texts("choices", 4, empty=True), strict=True)
    ]
    lines.append("Answer:")
    return Question("\n".join(lines), _LETTERS, row.option("answer", 4), row.origin, row.text("subject"))


def _introduced(question: Question, examples: str) -> Question:
    subject = (question.subject or "").replace("_", " ")
    before = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return question._replace(context=before + examples + question.context)


def _with_examples(questions: list[Question], known: list[Question], count: int) -> list[Question]:
    """The questions behind the introduction and ``count`` answered ones of the same subject."""
    examples: dict[str | None, list[Question]] = {}
    for question in known:
        examples.setdefault(question.subject, []).append(question)
    result = []
    for question in questions:
        shown = examples.get(question.subject, [])[:count]
        if len(shown) < count:
            raise DataError(
                f"{question.origin}: the subject {question.subject!r} has {len(shown)} examples, not {count}; lower "
                "num_fewshot, or add some to the split dev"
            )
        result.append(_introduced(question, "".join(f"{e.context} {e.options[e.answer]}\n\n" for e in shown)))
    return result


def _arc(row: Row) -> Question:
    choices = row.part("choices")
    texts = choices.texts("text")
    labels, key = choices.texts("label", len(texts)), row.text("answerKey")
    if key not in labels:
        raise row.fault("answerKey", f"is {key!r}, none of the labels {', '.join(labels)}")
    return Question(f"Question: {row.text('question')}\nAnswer:", tuple(texts), labels.index(key), row.origin)


def _piqa(row: Row) -> Question:
    options = (row.text("sol1", empty=True), row.text("sol2", empty=True))
    return Question(f"Question: {row.text('goal')}\nAnswer:", options, row.option("label", 2), row.origin)


def _lambada(row: Row) -> Question:
    context, _, word = row.text("text").rstrip().rpartition(" ")
    if not context.strip():
        raise row.fault("text", "has one word only, with nothing before it")
    return Question(context, (word,), 0, row.origin)


_ARC = "question, choices (text: a list, label: a list) and answerKey, as ARC's"
TASKS = {
    "hellaswag": _Layout(
        "options",
        ("hellaswag",),
        ("validation", "valid", "val"),
        "ctx_a, ctx_b, activity_label, endings (a list) and label (0 to 3), as HellaSwag's",
        _hellaswag,
    ),
    "mmlu": _Layout(
        "letters",
        ("mmlu",),
        ("test",),
        "question, choices (4 texts), answer (0 to 3) and subject, as MMLU's",
        _mmlu,
    ),
    "arc_easy": _Layout("options", ("arc_easy", "ARC-Easy"), ("test",), _ARC, _arc),
    "arc_challenge": _Layout("options", ("arc_challenge", "ARC-Challenge"), ("test",), _ARC, _arc),
    "piqa": _Layout(
        "options", ("piqa",), ("validation", "valid", "val"), "goal, sol1, sol2 and label (0 or 1), as PIQA's", _piqa
    ),
    "lambada": _Layout("last_word", ("lambada", "lambada_openai"), ("test",), "text, as LAMBADA's", _lambada),
}
