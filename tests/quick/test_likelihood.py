"""Likelihoods of masked diffusion models: against enumeration, against the peers' formula, and what they promise."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlm_kernels.reference import cross_entropy
from megatron_dlm.evaluation import likelihood_rows
from megatron_dlm.evaluation.likelihood import (
    LikelihoodOptions,
    LogLikelihood,
    Request,
    loglikelihoods,
)
from megatron_dlm.evaluation.likelihood_masks import Plan
from megatron_dlm.evaluation.likelihood_rows import RowScorer, Unit
from megatron_dlm.evaluation.progress import collect
from megatron_dlm.evaluation.rolling import totals, windows_of
from megatron_dlm.shipped.sampler import sample
from megatron_dlm.shipped.sampler_plan import SamplerOptions, Vocabulary
from tests.enumeration import MASK_ID, TinyPredictor

VOCAB, MASK = 23, 22
IDS = Vocabulary(MASK)
PAIR, ANSWER = [3, 1], [5, 2, 7, 11, 4, 8]


class Bidirectional:
    """A random function of all tokens of a row and of nothing else; it counts the rows that it is given."""

    def __init__(self, seed: int = 0, scale: float = 0.6) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.embedding, self.position, head = (
            torch.randn(size, 16, generator=generator, dtype=torch.float64) for size in (VOCAB, 64, VOCAB)
        )
        self.head = head.T * scale
        self.calls: list[tuple[int, int]] = []
        self.positions = 0

    def __call__(self, tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        size, seq = tokens.shape
        assert tokens.dtype == rows.dtype == torch.int64 and (lengths is None or len(lengths) == size)
        self.calls.append((size, seq))
        self.positions += len(rows)
        sizes = torch.full((size,), seq) if lengths is None else lengths
        real = (torch.arange(seq) < sizes[:, None])[..., None]
        assert real.flatten()[rows].all(), "only real positions are asked for"
        here = torch.where(real, self.embedding[tokens] * self.position[:seq], 0.0)
        hidden = torch.tanh(here.sum(1, keepdim=True) / 2 + self.position[:seq] + here)
        return (hidden @ self.head).flatten(0, 1)[rows]

    def losses(self, context: list[int], target: list[int], mask: Any) -> Tensor:
        """Cross-entropies of all target tokens under one mask, [target]."""
        noised = [MASK if hide else token for token, hide in zip(target, mask, strict=True)]
        rows = torch.arange(len(context), len(context) + len(target))
        return F.cross_entropy(
            self(torch.tensor([context + noised]), None, rows), torch.tensor(target), reduction="none"
        )

    def bound(self, context: list[int], target: list[int]) -> float:
        """The ELBO by its definition: the mean over k of L/k times the mean over all subsets of size k."""
        size, total = len(target), 0.0
        for k in range(1, size + 1):
            subsets = list(itertools.combinations(range(size), k))
            for subset in subsets:
                mask = torch.tensor([i in subset for i in range(size)])
                total -= float(self.losses(context, target, mask)[mask].sum()) / k / len(subsets)
        return total


def tiny(predictor: TinyPredictor) -> Any:
    """The enumerable predictor as a denoiser."""

    def denoise(tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        assert lengths is None
        return predictor.logits[(tokens * (MASK_ID + 1) ** torch.arange(4)).sum(1)].flatten(0, 1)[rows]

    return denoise


def score(
    model: Any, requests: list[Request], greedy: bool = False, mask: int = MASK, **options
) -> list[LogLikelihood]:
    settings = LikelihoodOptions(**options)
    return collect(loglikelihoods(model, requests, settings, vocabulary=Vocabulary(mask), greedy=greedy))


def repeats(model: Any, context: list[int], target: list[int], count: int = 200, **options) -> list[LogLikelihood]:
    """The same request with other random numbers each time."""
    requests = [Request(context, target, group) for group in range(count)]
    return score(model, requests, enumerate_short=False, **options)


def values(results: list[LogLikelihood]) -> np.ndarray:
    return np.array([result.value for result in results])


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[LogLikelihood]]:
    """200 estimates of the enumerable predictor's bound by each Monte-Carlo estimator."""
    predictor = TinyPredictor()
    target = predictor.clean.tolist()
    return {
        name: repeats(tiny(predictor), [], target, mask=MASK_ID, estimator=name)
        for name in ("exact_count", "one_over_t")
    }


@pytest.mark.parametrize("estimator", ["exact_count", "one_over_t"])
def test_equals_the_enumerated_bound(drawn: dict, estimator: str) -> None:
    found, bound = values(drawn[estimator]), -TinyPredictor().negative_elbo()
    error = found.std(ddof=1) / math.sqrt(len(found))
    assert abs(found.mean() - bound) < 3 * error and error < 0.03 * abs(bound)
    inside = sum(abs(result.value - bound) < 3 * result.standard_error for result in drawn[estimator])
    assert inside >= (190 if estimator == "exact_count" else 170)


def test_intervals_hold_what_they_say(drawn: dict) -> None:
    model = Bidirectional()
    (truth,) = score(model, [Request(PAIR, ANSWER, 0)])
    for results, bound in (
        (drawn["exact_count"], -TinyPredictor().negative_elbo()),
        (repeats(model, PAIR, ANSWER, masks=24), truth.value),
        (repeats(model, PAIR, ANSWER, masks=11), truth.value),
    ):
        covered = [low <= bound <= high for low, high in (result.interval95() for result in results)]
        assert 180 <= sum(covered) <= 198
        errors = np.array([result.standard_error for result in results])
        assert math.sqrt((errors**2).mean()) == pytest.approx(values(results).std(ddof=1), rel=0.2)


def test_exact_count_has_a_third_of_the_error_of_one_over_t(drawn: dict) -> None:
    assert 3 * values(drawn["exact_count"]).std() < values(drawn["one_over_t"]).std()


@pytest.mark.parametrize("length", [1, 2, 5])
def test_short_targets_have_the_bound_itself(length: int) -> None:
    model = Bidirectional()
    target = ANSWER[:length]
    (result,) = score(model, [Request(PAIR, target, 7)], masks=2**length - 1)
    assert result.value == pytest.approx(model.bound(PAIR, target), rel=1e-12) and result.standard_error == 0
    assert result.interval95() == (result.value, result.value)
    (sampled,) = score(model, [Request(PAIR, target, 7)], masks=2**length - 1, enumerate_short=False)
    assert (sampled.value == result.value) == (length == 1) == (sampled.standard_error == 0)


def test_the_chain_rule_is_another_quantity() -> None:
    model = Bidirectional()
    chain = -sum(float(model.losses(PAIR, ANSWER, [j >= i for j in range(6)])[i]) for i in range(6))
    (result,) = score(model, [Request(PAIR, ANSWER, 3)], estimator="left_to_right", masks=1)
    assert result.value == pytest.approx(chain, rel=1e-12) and result.standard_error == 0
    assert abs(result.value - model.bound(PAIR, ANSWER)) > 0.05


def by_mask(model: Any, masks: Tensor, guidance: float = 0.0, tokens_per_batch: int = 16384) -> Tensor:
    """What each mask ([n, target] bool) says of log p(ANSWER | PAIR): -L'/k times the sum of its k cross-entropies."""
    scorer = RowScorer(model, tokens_per_batch=tokens_per_batch, device="cpu", vocabulary=IDS, guidance=guidance)
    chosen = masks.numpy()
    shown = Plan(chosen, chosen, len(ANSWER) / chosen.sum(1)[None], exact=False)
    (unit,) = scorer.finish([Unit([0], PAIR, np.array([ANSWER]), shown, MASK)])
    return torch.from_numpy(-unit.sums[0] * shown.coefficients[0])


def llada_masks(size: int, count: int) -> Tensor:
    """[count, size] bool, as their evaluation draws them: counts rounded from evenly spaced numbers, then shuffled."""
    generator = torch.Generator().manual_seed(3)
    k = int(torch.randint(1, size + 1, (), generator=generator))
    spaced = torch.linspace(float(k), k + (count - 1) * (size / count), steps=count)
    counts = (spaced.round().long() - 1) % size + 1
    return torch.stack([(torch.arange(size) < c)[torch.randperm(size, generator=generator)] for c in counts])


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_equals_llada_on_the_same_masks(guidance: float) -> None:
    model, start, size = Bidirectional(), len(PAIR), len(ANSWER)
    masks = llada_masks(size, 16)
    clean = torch.tensor(PAIR + ANSWER).repeat(16, 1)
    hidden = torch.cat((torch.zeros(16, start, dtype=torch.bool), masks), dim=1)
    noisy = torch.where(hidden, MASK, clean)
    everything = torch.arange(clean.numel())
    logits = model(noisy, None, everything).view(16, -1, VOCAB)
    without = noisy.clone()
    without[:, :start] = MASK
    unconditional = model(without, None, everything).view(16, -1, VOCAB)
    logits = unconditional + (guidance + 1) * (logits - unconditional)
    ratio = (masks.sum(1) / size)[:, None].expand_as(clean)
    published = -float((F.cross_entropy(logits[hidden], clean[hidden], reduction="none") / ratio[hidden]).sum() / 16)

    found = by_mask(model, masks, guidance)
    assert float(found.mean()) == pytest.approx(published, rel=1e-6)  # their ratios are fp32
    assert torch.allclose(found, by_mask(model, masks, guidance, tokens_per_batch=20))
    # Ours is the weighted mean of the same over its own masks.
    (enumerated,) = score(model, [Request(PAIR, ANSWER, 0)], guidance=guidance)
    all_masks = torch.tensor(list(itertools.product([False, True], repeat=size))[1:])
    weights = torch.tensor([1 / (size * math.comb(size, int(k))) for k in all_masks.sum(1)], dtype=torch.float64)
    expected = (weights * by_mask(model, all_masks, guidance)).sum()
    assert enumerated.value == pytest.approx(float(expected), rel=1e-12)


def test_is_the_training_loss_with_the_column_of_the_mask() -> None:
    def model(tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        logits = Bidirectional()(tokens, lengths, rows)
        logits[:, MASK] += 9  # much probability for [MASK], which the loss makes the model pay for
        return logits

    mask = torch.tensor([[True, False, True, True, False, False]])
    noised = torch.tensor([PAIR]), torch.where(mask, MASK, torch.tensor([ANSWER]))
    rows = mask[0].nonzero().flatten() + 2
    logits = model(torch.cat(noised, dim=1), None, rows)
    loss, _, _ = cross_entropy(logits, torch.tensor(ANSWER)[mask[0]], torch.full((3,), 6 / 3))
    found = by_mask(model, mask)
    assert float(found) == pytest.approx(-float(loss), rel=1e-12)
    logits[:, MASK] = float("-inf")
    assert float(found) < 2 * float(logits.log_softmax(1)[range(3), torch.tensor(ANSWER)[mask[0]]].sum()) - 1


def test_nothing_depends_on_the_batches_the_order_or_the_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request([group] * group, ANSWER[: 1 + group % 6] * 2, group) for group in range(9)]
    requests += [Request([9, 9], ANSWER + [1], 9), Request([9, 9], ANSWER + [2], 9), Request([], ANSWER * 2, 9)]
    expected = score(Bidirectional(), requests, masks=20, guidance=0.5, greedy=True)
    assert 0 < expected[0].value * -1 and {result.standard_error == 0 for result in expected} == {True, False}

    def same(found: list[LogLikelihood], like: list[LogLikelihood]) -> None:
        assert [result.is_greedy for result in found] == [result.is_greedy for result in like]
        for part in (0, 1):
            assert [result[part] for result in found] == pytest.approx([result[part] for result in like], rel=1e-9)

    for tokens_per_batch, chunk in ((1, 1), (50, 50), (300, 10 * VOCAB)):
        monkeypatch.setattr(likelihood_rows, "_CHUNK", chunk)
        model = Bidirectional()
        found = score(model, requests, masks=20, guidance=0.5, greedy=True, tokens_per_batch=tokens_per_batch)
        same(found, expected)
        assert max(size * seq if size > 2 else 0 for size, seq in model.calls) <= tokens_per_batch
    same(score(Bidirectional(), requests[::-1], masks=20, guidance=0.5, greedy=True)[::-1], expected)
    same([score(Bidirectional(), [r], masks=20, guidance=0.5, greedy=True)[0] for r in requests], expected)
    assert score(Bidirectional(), requests[8:9], masks=20, seed=1)[0].value != pytest.approx(expected[8].value)


@pytest.mark.parametrize("other", [[5, 2, 7, 11, 4, 9], [5, 2, 7, 11, 4, 8, 6, 6]], ids=["same length", "longer"])
def test_options_of_a_question_share_their_noise(other: list[int]) -> None:
    model, count = Bidirectional(), 150

    def difference(shift: int) -> np.ndarray:
        requests = [Request(PAIR, ANSWER, group) for group in range(count)]
        requests += [Request(PAIR, other, group + shift) for group in range(count)]
        found = values(score(model, requests, masks=8, enumerate_short=False))
        return found[:count] - found[count:]

    assert difference(0).var() < 0.7 * difference(1000).var()


def test_what_looks_the_same_to_the_model_is_computed_once() -> None:
    model = Bidirectional()
    results = score(model, [Request(PAIR, [option], 4) for option in range(4)], masks=128)
    assert model.calls == [(1, 3)] and len(set(values(results))) == 4
    assert values(results) == pytest.approx([float(-model.losses(PAIR, [i], [True])[0]) for i in range(4)])
    model = Bidirectional()
    score(model, [Request(PAIR, [7, option, 9], 4) for option in (1, 2)], masks=128)
    # Seven masks; the second option adds nothing where the token that differs is masked.
    assert model.calls == [(7 + 3, 5)] and model.positions == 12 + 4


def test_greedy_is_what_the_sampler_writes() -> None:
    model, prompt = Bidirectional(), PAIR + [MASK] * 6
    for guidance, forbidden in ((0.0, ()), (1.0, ()), (0.0, (1, 2, 3, 4, 5))):
        options = SamplerOptions(guidance=guidance)
        vocabulary = IDS.forbidding(forbidden)
        rows = sample(model, [prompt], options, vocabulary=vocabulary).tokens
        written = rows[0][2:]
        wrong = [*written[:3], (written[3] + 1) % MASK, *written[4:]]
        requests = [Request(PAIR, written, 0), Request(PAIR, wrong, 0), Request([9], written, 1)]
        options = LikelihoodOptions(guidance=guidance, masks=2)
        results = collect(loglikelihoods(model, requests, options, vocabulary=vocabulary, greedy=True))
        assert [result.is_greedy for result in results] == [True, False, False]
    assert score(model, [Request(PAIR, written, 0)])[0].is_greedy is None


def rolling(
    model: Any, texts: list[list[int]], max_length: int, groups: list[int] | None = None, **options
) -> list[LogLikelihood]:
    windows = windows_of(texts, max_length=max_length, groups=groups)
    return totals(windows, score(model, [window for text in windows for window in text], **options))


def test_rolling_is_the_sum_over_windows() -> None:
    model = Bidirectional()
    texts = [list(range(10)), [], [4, 3, 2, 1], list(range(9, 1, -1))]
    settings: dict = {"masks": 16, "seed": 5}
    found = rolling(model, texts, 8, **settings)
    assert found[1] == LogLikelihood(0.0, 0.0, None)
    (head,), (tail,) = (
        score(model, [Request([], part, i)], **settings) for i, part in ((0, texts[0][:8]), (1, [8, 9]))
    )
    assert tail.standard_error == 0 < head.standard_error  # two tokens have three masks
    assert found[0].value == pytest.approx(head.value + tail.value)
    assert (found[0].standard_error, found[0].degrees_of_freedom) == (pytest.approx(head.standard_error), 7)
    assert found[2].standard_error == 0 and found[2].value == pytest.approx(model.bound([], texts[2]))
    # A text's noise goes with its name, not with the texts beside it.
    (again,) = rolling(model, texts[3:], 8, groups=[3], **settings)
    assert again == pytest.approx(found[3])


def test_intervals_of_sums_of_windows() -> None:
    results = rolling(Bidirectional(), [ANSWER * 3] * 200, 6, masks=16)
    exact = 3 * score(Bidirectional(), [Request([], ANSWER, 0)])[0].value
    covered = [low <= exact <= high for low, high in (result.interval95() for result in results)]
    assert 180 <= sum(covered) <= 198 and {result.degrees_of_freedom for result in results} <= set(range(7, 22))


def test_intervals_of_students_t() -> None:
    for degrees, quantile in ((1, 12.706), (7, 2.365), (8, 2.306), (14, 2.145), (30, 2.042), (1000, 1.962)):
        low, high = LogLikelihood(-1.0, 0.5, None, degrees).interval95()
        assert (low + high, high - low) == pytest.approx((-2.0, quantile), rel=4e-4)


def test_one_mask_has_no_error() -> None:
    requests = [Request([1] * (9 - i), [2], i) for i in range(9)]
    found = values(score(Bidirectional(), requests, masks=1, estimator="one_over_t"))
    assert (found == 0).any() and (found < 0).any()  # not every draw masks a token
    (result,) = score(Bidirectional(), [Request(PAIR, ANSWER, 0)], masks=1)
    assert result.standard_error is None and result.interval95() is None and result.value < 0
    (total,) = rolling(Bidirectional(), [ANSWER * 2], 8, masks=1)
    assert total.standard_error is None and total.value < 0


def test_tokens_that_the_model_rules_out() -> None:
    def no_mask(tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        logits = Bidirectional()(tokens, lengths, rows)
        logits[:, [MASK, 5]] = float("-inf")
        return logits

    for guidance in (0.0, 1.0):
        results = score(no_mask, [Request(PAIR, [2, 7] * 4, 0), Request(PAIR, ANSWER * 2, 0)], guidance=guidance)
        assert math.isfinite(results[0].value) and results[0].standard_error > 0
        assert results[1].value == -math.inf and results[1].standard_error is None


def test_results_come_as_they_are_found() -> None:
    requests = [Request(PAIR, ANSWER[: 1 + i % 3], i) for i in range(7)]
    options = LikelihoodOptions(tokens_per_batch=30)
    for greedy in (False, True):
        parts = list(loglikelihoods(Bidirectional(), requests, options, vocabulary=IDS, greedy=greedy))
        shares = [part.share for part in parts]
        assert shares == sorted(set(shares)) and shares[-1] == 1 and len(shares) > 2
        assert sorted(index for part in parts for index in part.results) == list(range(7)), "each once"
        first = next(part for part in parts if part.results)
        assert (first.share > 0.5) is greedy, "what greedy decoding writes comes last"
        assert collect(parts) == score(Bidirectional(), requests, greedy, tokens_per_batch=30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "elbo"}, "estimator 'elbo' is unknown; choose from exact_count"),
        ({"masks": 0}, "masks is 0"),
        ({"guidance": -1.5}, "guidance is -1.5"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LikelihoodOptions(**options)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([1], [], 0), "request 1 has no target tokens"),
        (Request([1], [2, MASK], 0), r"request 1 has \[MASK\] \(id 22\)"),
        (Request([MASK], [2], 0), r"request 1 has \[MASK\] \(id 22\)"),
        (Request([1], [2], -1), "request 1 has the group -1"),
        (Request([1], [2], 2**41), "it must be from 0"),
    ],
)
def test_requests_that_cannot_be_scored_are_refused(request_: Request, message: str) -> None:
    model = Bidirectional()
    with pytest.raises(ValueError, match=message):
        score(model, [Request([1], [2], 0), request_])
    assert not model.calls and score(model, []) == []


def test_other_mistakes_are_refused() -> None:
    def broken(tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        return torch.full((len(rows), VOCAB), float("nan"))

    with pytest.raises(ValueError, match="the model gives NaN"):
        score(broken, [Request([1], [2], 0)])
    for options, message in (({"max_length": 0}, "max_length is 0"), ({"max_length": 1, "groups": [-1]}, "group -1")):
        with pytest.raises(ValueError, match=message):
            windows_of([[1]], **options)
