"""Exact likelihoods of autoregressive models, through the same interface."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_dlm.evaluation.likelihood import LogLikelihood, Request, exact_loglikelihoods
from megatron_dlm.evaluation.progress import collect
from megatron_dlm.evaluation.rolling import totals, windows_of
from megatron_dlm.shipped.sampler import Denoise, next_token, sample
from megatron_dlm.shipped.sampler_plan import SamplerOptions, Vocabulary

VOCAB, MASK, END = 23, 22, 21
IDS = Vocabulary(MASK)


class Causal:
    """A random function of the tokens up to each position."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.embedding, self.position, head = (
            torch.randn(size, 16, generator=generator, dtype=torch.float64) for size in (VOCAB, 64, VOCAB)
        )
        self.head = head.T
        self.calls: list[tuple[int, int]] = []

    def __call__(self, tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        self.calls.append(tuple(tokens.shape))
        hidden = torch.tanh((self.embedding[tokens] * self.position[: tokens.shape[1]]).cumsum(1))
        return (hidden @ self.head).flatten(0, 1)[rows]

    def direct(self, context: list[int], target: list[int]) -> float:
        """The sum of log_softmax over the target, one token after the other."""
        total, text = 0.0, [END, *context]
        for token in target:
            logits = self(torch.tensor([text]), None, torch.tensor([len(text) - 1]))
            total += float(logits.log_softmax(1)[0, token])
            text.append(token)
        return total


REQUESTS = [
    Request([1, 2, 3], [4, 5, 6, 7], 0),
    Request([1, 2, 3], [4, 5, 6, 9], 0),
    Request([1, 2, 3], [4, 8], 0),
    Request([], [3], 1),
    Request([], [3, 20, 3, 20, 3, 20, 3], 1),
    Request([9] * 12, [0], 5),
]


def exact(
    model: Denoise, requests: list[Request], vocabulary: Vocabulary = IDS, tokens_per_batch: int = 16384
) -> list[LogLikelihood]:
    return collect(exact_loglikelihoods(model, requests, vocabulary=vocabulary, tokens_per_batch=tokens_per_batch))


@pytest.mark.parametrize("tokens_per_batch", [1, 20, 16384])
def test_equals_the_direct_sum(tokens_per_batch: int) -> None:
    model = Causal()
    found = exact(next_token(model, END), REQUESTS, tokens_per_batch=tokens_per_batch)
    for result, request in zip(found, REQUESTS, strict=True):
        assert result.value == pytest.approx(model.direct(request.context, request.target), rel=1e-12)
        assert result.standard_error == 0 and result.interval95() == (result.value, result.value)


def test_continuations_that_differ_in_their_last_token_are_one_row() -> None:
    model = Causal()
    found = exact(next_token(model, END), REQUESTS[:2])
    assert model.calls == [(1, 7)] and found[0].value != found[1].value


def test_is_greedy() -> None:
    model, forbidden = next_token(Causal(), END), [MASK, 4, 5]
    for ids in ([], forbidden):
        vocabulary = IDS.forbidding(ids)
        options = SamplerOptions(block_length=1)
        rows = sample(model, [[1, 2, 3]], options, vocabulary=vocabulary, max_new_tokens=5).tokens
        written = rows[0][3:]
        targets = [
            written,
            written[:2],
            [*written[:4], (written[4] + 1) % MASK],
            [(written[0] + 1) % MASK, *written[1:]],
        ]
        requests = [Request([1, 2, 3], target, 0) for target in targets]
        found = exact(model, requests, vocabulary)
        assert [result.is_greedy for result in found] == [True, True, False, False]
    # What is forbidden to be written keeps its probability.
    assert found[0].value == pytest.approx(exact(model, requests)[0].value)


def test_rolling_windows_begin_behind_the_first_token() -> None:
    model = Causal()
    text = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]

    windows = windows_of([text, []], max_length=4)
    found = totals(windows, exact(next_token(model, END), windows[0]))
    parts = [model.direct([], part) for part in (text[:4], text[4:8], text[8:])]
    assert found[0].value == pytest.approx(sum(parts), rel=1e-12) and found[0].standard_error == 0
    assert found[1] == LogLikelihood(0.0, 0.0, None) and found[0].is_greedy is False


def test_results_come_as_they_are_found_and_mistakes_are_refused() -> None:
    model = next_token(Causal(), END)
    parts = list(exact_loglikelihoods(model, REQUESTS, vocabulary=IDS, tokens_per_batch=1))
    shares = [part.share for part in parts]
    assert shares == sorted(set(shares)) and shares[-1] == 1
    assert sorted(index for part in parts for index in part.results) == list(range(6))
    assert exact(model, []) == []
    with pytest.raises(ValueError, match="request 0 has no target tokens"):
        exact(model, [Request([1], [], 0)])
    with pytest.raises(ValueError, match="tokens_per_batch is 0"):
        exact(model, REQUESTS, tokens_per_batch=0)
