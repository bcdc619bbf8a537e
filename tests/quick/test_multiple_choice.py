"""Answers to questions: rigged models, the figures, truncation, shared random numbers, and rounds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_dlm.config.kinds import AUTOREGRESSIVE, MASKED_DIFFUSION
from megatron_dlm.data.tokenizer import ByteTokenizer
from megatron_dlm.errors import DataError
from megatron_dlm.evaluation import scoring
from megatron_dlm.evaluation.likelihood import LikelihoodOptions, Request, exact_loglikelihoods, loglikelihoods
from megatron_dlm.evaluation.multiple_choice import (
    Answer,
    answer,
    by_subject,
    choice,
    encode_task,
    metrics,
)
from megatron_dlm.evaluation.progress import collect
from megatron_dlm.evaluation.scoring import encode_pair, score
from megatron_dlm.evaluation.tasks import Question, Task
from megatron_dlm.generation.text_model import TextModel
from megatron_dlm.shipped.sampler import next_token
from megatron_dlm.shipped.sampler_plan import SamplerOptions
from tests.questions import rigged

BYTES = ByteTokenizer()


def task(questions: list[Question], kind: Any = "options") -> Task:
    return Task("test", kind, questions, [])


def ask(model: TextModel, questions: list[Question], kind: Any = "options", **keys: Any) -> list[Answer]:
    encoded = encode_task(task(questions, kind), BYTES, model.max_length)
    return collect(answer(model, encoded, LikelihoodOptions(**keys)))


def values(model: TextModel, questions: list[Question], kind: Any = "options") -> dict[str, Any]:
    return metrics(questions, ask(model, questions, kind, masks=4), kind)


@pytest.mark.parametrize("autoregressive", [False, True])
def test_a_model_that_knows_and_one_that_does_not(autoregressive: bool) -> None:
    questions = [
        Question(f"question {i}", ("rrr", "www") if i % 2 else ("www", "rrr"), 1 - i % 2, "") for i in range(6)
    ]
    for logits, expected in (({"r": 3.0}, 1.0), ({"w": 3.0}, 0.0)):
        found = values(rigged(logits, autoregressive=autoregressive), questions)
        assert {name: metric.value for name, metric in found.items()} == dict.fromkeys(
            ("acc", "acc_norm", "acc_bytes"), expected
        )
    logits = torch.zeros(258)
    logits[ord("r")] = 3.0
    log_p = logits.double().log_softmax(0)
    (first, *_) = ask(rigged({"r": 3.0}, autoregressive=autoregressive), questions, masks=128)
    assert first.values == pytest.approx((float(log_p[0] * 4), float(log_p[0] + 3 * log_p[ord("r")])))
    assert first.errors == (0.0, 0.0), "four bytes have 15 masks, which are enumerated"


def test_sums_and_means_decide_differently() -> None:
    """Of nine likely characters the sum is small and the mean is large."""
    question = Question("q", ("x", "yyyyyyyyy"), 1, "")
    found = values(rigged({"x": 1.0, "y": 2.0}), [question])
    assert {name: metric.value for name, metric in found.items()} == {"acc": 0.0, "acc_norm": 1.0, "acc_bytes": 1.0}
    assert choice(Question("q", ("", "b"), 1, ""), Answer((-2.0, -1.5), (0.0, 0.0), None), len) == 1, "no division by 0"
    assert choice(question, Answer((-math.inf, -math.inf), (None, None), None)) == 0


def test_bytes_and_characters_decide_differently() -> None:
    question = Question("q", ("\u00e9\u00e9", "zzz"), 0, "")
    found = Answer((-3.0, -4.0), (0.0, 0.0), None)
    figures = metrics([question], [found], "options")
    assert [figures[name].value for name in ("acc", "acc_norm", "acc_bytes")] == [1.0, 0.0, 1.0]
    assert set(metrics([question], [found], "letters")) == {"acc"}


def test_standard_errors() -> None:
    questions = [Question("q", ("a", "b"), int(i < 3), "", ("x", "y")[i % 2]) for i in range(10)]
    found = metrics(questions, [Answer((0.0, 1.0), (0.0, 0.0), None)] * 10, "options")["acc"]
    assert found.value == 0.3 and found.stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 9))
    assert metrics(questions[:1], [Answer((0.0, 1.0), (0.0, 0.0), None)], "letters")["acc"].stderr is None
    subjects = by_subject(questions, [Answer((0.0, 1.0), (0.0, 0.0), None)] * 10)
    assert subjects == {"x": {"acc": 0.4, "questions": 5}, "y": {"acc": 0.2, "questions": 5}}


@pytest.mark.parametrize("autoregressive", [False, True])
def test_last_words(autoregressive: bool) -> None:
    """Greedy decoding writes one letter for ever, so only words of it are right."""
    questions = [Question("c", ("rr",), 0, ""), Question("c", ("rx",), 0, ""), Question("c", ("r",), 0, "")]
    model = rigged({"r": 3.0, " ": 2.0}, autoregressive=autoregressive)
    assert [each.greedy for each in ask(model, questions, "last_word", masks=8)] == [False, False, False]
    stripped = [question._replace(context="c") for question in questions]
    encoded = encode_task(task(stripped, "last_word"), BYTES, 64)
    bare = encoded._replace(requests=[[Request(r.context, r.target[1:], r.group)] for (r,) in encoded.requests])
    found = collect(answer(model, bare, LikelihoodOptions(masks=8)))
    assert [each.greedy for each in found] == [True, False, True]
    figures = metrics(questions, found, "last_word")
    mean = sum(each.values[0] for each in found) / 3
    assert figures["acc"].value == pytest.approx(2 / 3) and figures["perplexity"].value == pytest.approx(
        math.exp(-mean)
    )
    spread = np.std([each.values[0] for each in found], ddof=1) / math.sqrt(3)
    assert figures["perplexity"].stderr == pytest.approx(math.exp(-mean) * spread)
    hopeless = metrics(questions[:1], [Answer((-math.inf,), (None,), False)], "last_word")["perplexity"]
    assert hopeless == (math.inf, None)


def test_pairs() -> None:
    assert encode_pair(BYTES, "ab ", "c", 9) == ([97, 98], [32, 99], False), "spaces go to the continuation"
    assert encode_pair(BYTES, "", " c", 9) == ([], [32, 99], False)
    assert encode_pair(BYTES, "abcdef", " g", 5) == ([100, 101, 102], [32, 103], True), "the beginning is cut"
    assert encode_pair(BYTES, "abc", " g", 5) == ([97, 98, 99], [32, 103], False)
    assert encode_pair(BYTES, "ab", " cdef", 5) == ([], [32, 99, 100, 101, 102], True)
    with pytest.raises(ValueError, match="' cdefg' has 6 tokens, more than the 5 of the model's sequences"):
        encode_pair(BYTES, "ab", " cdefg", 5)
    with pytest.raises(ValueError, match="has no tokens"):
        encode_pair(BYTES, "ab", "", 5)


class Joining(ByteTokenizer):
    """Joins ": a" to one id, across the border of context and continuation."""

    def encode(self, text: str) -> list[int]:
        return [255 if part == ": a" else ord(part) for part in _split(text)]


def _split(text: str) -> list[str]:
    before, joined, after = text.partition(": a")
    return [*before, *([joined] if joined else []), *(_split(after) if after else [])]


def test_tokens_across_the_border() -> None:
    assert encode_pair(Joining(), "x:", " a", 9) == ([120, 58], [32, 97], False), "else nothing would be scored"
    assert encode_pair(Joining(), "x:", " ab", 9) == ([120, 58], [98], False), "as lm-eval divides it"


def test_truncated_questions_are_counted_and_faults_are_located() -> None:
    questions = [Question("a" * 6, ("b", "b" * 5), 0, "F line 1"), Question("a", ("b",), 0, "F line 2")]
    assert encode_task(task(questions), BYTES, 10).truncated == 1
    with pytest.raises(DataError, match="F line 3: ' ccccccccccc' has 12 tokens"):
        encode_task(task([*questions, Question("a", ("b", "c" * 11), 0, "F line 3")]), BYTES, 10)


def test_default_masks() -> None:
    letters = encode_task(task([Question("q", ("A", "B"), 0, "")]), BYTES, 10)
    assert letters.masks(None) == 128 and letters.masks(7) == 7, "a space and a letter are two bytes"
    single = letters._replace(requests=[[Request([1], [2], 0), Request([1], [3], 0)]])
    assert single.masks(None) == 1


class Visible:
    """A model whose certainty depends on how much it sees, so that masks matter; it counts its forwards."""

    def __init__(self) -> None:
        self.forwards = 0
        self.sizes: list[int] = []
        self.widths: list[int] = []

    def __call__(self, tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        self.forwards += 1
        self.sizes.append(tokens.numel())
        self.widths.append(tokens.shape[1])
        seen = ((tokens != BYTES.mask_token_id) * (torch.arange(tokens.shape[1]) % 5 + 1)).cumsum(1).double()
        scale = torch.linspace(-1, 1, 258, dtype=torch.float64)
        return seen.flatten()[rows][:, None] * scale / 10


def visible(autoregressive: bool = False) -> TextModel:
    kind = AUTOREGRESSIVE if autoregressive else MASKED_DIFFUSION
    return TextModel(Visible(), BYTES, kind, 64, torch.device("cpu"), "visible")


QUESTIONS = [Question("c" * (i % 7), ("first of all", "second or third"), 0, "") for i in range(20)]


@pytest.mark.parametrize("autoregressive", [False, True])
def test_answers_are_the_likelihoods_of_the_options(autoregressive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request at a time and all at once, in many rounds: the same values, in far fewer forwards."""
    encoded = encode_task(task(QUESTIONS), BYTES, 64)
    options = LikelihoodOptions(masks=16, seed=5, tokens_per_batch=4096)
    model, one = visible(autoregressive), visible(autoregressive)
    monkeypatch.setattr(scoring, "_FORWARDS_PER_ROUND", 2)
    parts = list(answer(model, encoded, options))
    found, shares = collect(parts), [part.share for part in parts]
    rounds = [len(part.results) for part in parts if part.results]
    for index, requests in enumerate(encoded.requests):
        for request, value, error in zip(requests, found[index].values, found[index].errors, strict=True):
            assert request.group == index
            if autoregressive:
                parts_alone = exact_loglikelihoods(next_token(one.denoise, 256), [request], vocabulary=BYTES.vocabulary)
            else:
                parts_alone = loglikelihoods(one.denoise, [request], options, vocabulary=BYTES.vocabulary)
            (alone,) = collect(parts_alone)
            assert (value, error) == pytest.approx((alone.value, alone.standard_error))
            assert autoregressive or (error or 0) > 0
    assert sum(rounds) == 20 and shares == sorted(shares) and shares[-1] == 1.0
    assert max(model.denoise.sizes) <= 4096  # type: ignore[attr-defined]
    if not autoregressive:
        widths = model.denoise.widths  # type: ignore[attr-defined]
        assert widths[0] == max(widths) > min(widths), "the longest first: memory that does not suffice shows at once"
        assert len(rounds) > 1 and len(shares) > len(rounds)
        assert model.denoise.forwards < one.denoise.forwards / 2  # type: ignore[attr-defined]
        other = collect(answer(visible(), encoded, LikelihoodOptions(masks=16, seed=6)))
        assert other[0].values != found[0].values


def test_known_answers_are_not_asked_again() -> None:
    encoded = encode_task(task(QUESTIONS), BYTES, 64)
    options = LikelihoodOptions(masks=4)
    whole = collect(answer(visible(), encoded, options))
    known = {*range(0, 20, 2), 3}
    found = {}
    for part in answer(visible(), encoded, options, known=known):
        found |= part.results
    assert sorted(found) == [1, 5, 7, 9, 11, 13, 15, 17, 19]
    for index, each in found.items():
        assert each.values == pytest.approx(whole[index].values)
    assert list(answer(rigged({}), encoded, options, known=range(20))) == []


def test_options_share_their_masks() -> None:
    """Equal options have equal values: with masks of their own they would differ."""
    equal = [Question("context", ("the same option", "the same option"), 0, "")]
    (found,) = ask(visible(), equal, masks=8)
    assert found.values[0] == found.values[1] and (found.errors[0] or 0) > 0
    others = ask(visible(), equal * 2, masks=8)
    assert others[1].values != others[0].values, "another question has other masks"


def test_nan_is_one_line() -> None:
    with pytest.raises(ValueError, match="the model gives NaN"):
        list(score(rigged({"a": math.nan}), [Request([1], [2], 0)], LikelihoodOptions()))
    assert list(score(rigged({}), [], LikelihoodOptions())) == []


def test_what_an_autoregressive_model_reads_first() -> None:
    read: list[int] = []

    def denoise(tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        read.append(int(tokens[0, 0]))
        return torch.zeros(len(rows), 258)

    model = TextModel(denoise, BYTES, AUTOREGRESSIVE, 64, torch.device("cpu"), "")
    for each in (model, model._replace(first_token_id=7)):
        collect(score(each, [Request([1], [2], 0)], LikelihoodOptions()))
        each.generate([[1]], SamplerOptions(), max_new_tokens=1)
    assert read == [256, 256, 7, 7]
