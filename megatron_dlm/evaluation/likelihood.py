"""Log-likelihoods of given tokens: the bound of masked diffusion models, the exact value of autoregressive ones.

Pure functions of ``denoise``. They are the training losses of the two: the softmax runs over every column that
``denoise`` returns, [MASK] included, as the loss does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dlm_kernels.philox import TOKEN_POSITION_BITS
from megatron_dlm.evaluation.likelihood_masks import (
    OFFSET_GROUPS,
    TOKENS_PER_BATCH,
    LikelihoodOptions,
    Plan,
    causal_plan,
    plan,
)
from megatron_dlm.evaluation.likelihood_rows import RowScorer, Unit
from megatron_dlm.shipped.sampler import Denoise, sample
from megatron_dlm.shipped.sampler_plan import SamplerOptions, Vocabulary

Progress = Callable[[int, int], None]

_GROUP_BITS = 41
_WINDOW_BITS = 20
# 97.5 % quantiles of Student's t for 1 to 7 degrees of freedom; beyond, the series in 1/df around the normal one.
_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646)
_STUDENT_SERIES = (1.95996, 2.37227, 2.82250, 2.55585)


class Request(NamedTuple):
    """Tokens to be scored, given those before them."""

    context: Sequence[int]
    target: Sequence[int]
    group: int
    """Requests of one group (the options of one question) share their random numbers, so that their differences have
    less noise. From 0 to 2**41 - 1."""


class LogLikelihood(NamedTuple):
    """log p(target | context), or its lower bound."""

    value: float
    """Nats, summed over the target."""
    standard_error: float | None
    """Nats. 0: the value is exact; None: not known, from a single mask or for a value of -inf."""
    is_greedy: bool | None
    """Whether greedy decoding of as many tokens gives the target; None: not asked for."""
    degrees_of_freedom: int = OFFSET_GROUPS - 1
    """Of the standard error."""

    def interval95(self) -> tuple[float, float] | None:
        """The 95 % interval of the value (Student's t); None without a standard error."""
        if self.standard_error is None:
            return None
        half = _student(self.degrees_of_freedom) * self.standard_error if self.standard_error else 0.0
        return self.value - half, self.value + half


def loglikelihoods(
    denoise: Denoise,
    requests: Sequence[Request],
    options: LikelihoodOptions | None = None,
    *,
    vocabulary: Vocabulary,
    device: torch.device | str = "cpu",
    greedy: bool = False,
    on_progress: Progress | None = None,
) -> list[LogLikelihood]:
    """Log-likelihoods under a masked diffusion model, in the order of the requests.

    log p(target | context) >= -E_k[L'/k * sum over k masked tokens of -log p(token | all that is visible)], for L'
    tokens in the target, k uniform on 1..L' and any k tokens equally likely (LLaDA, arXiv 2502.09992, equation 6). The
    context is always visible. The masks fall into 8 groups; the standard error is that of the mean over them.

    A result does not depend on the requests beside it, on their order or on the batches, but for rounding. Requests of
    one group with equal contexts go through the model once where they show it the same tokens.

    Args:
        denoise: the model; see ``Denoise``.
        vocabulary: what it forbids, greedy decoding never writes. The values do not depend on that.
        device: of the tensors that ``denoise`` is given.
        greedy: also find ``is_greedy``: masks in the target's place are filled in one by one, the most certain first,
            which costs L' forwards for every context and length.
        on_progress: called with what is done and what is to be done: a request counts once, with ``greedy`` twice.

    Raises:
        ValueError: a request has no target, has [MASK] among its tokens or a group out of range; or the model gives
            NaN. One line.
    """
    options = options or LikelihoodOptions()
    _check(requests, vocabulary.mask_token_id)
    scorer = RowScorer(
        denoise,
        tokens_per_batch=options.tokens_per_batch,
        device=device,
        vocabulary=vocabulary,
        guidance=options.guidance,
    )
    progress = _Progress(on_progress, len(requests) * (2 if greedy else 1))
    keys = [(request.group, tuple(request.context), len(request.target)) for request in requests]
    results = _evaluate(
        scorer,
        requests,
        keys,
        lambda request: plan(options, request.group, len(request.target)),
        progress,
        hidden_id=vocabulary.mask_token_id,
    )
    if not greedy:
        return [result._replace(is_greedy=None) for result in results]
    filled = _fill(scorer, [key[1:] for key in keys], progress)
    return [
        result._replace(is_greedy=filled[key[1:]] == list(request.target))
        for result, key, request in zip(results, keys, requests, strict=True)
    ]


def exact_loglikelihoods(
    denoise: Denoise,
    requests: Sequence[Request],
    *,
    vocabulary: Vocabulary,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    device: torch.device | str = "cpu",
    on_progress: Progress | None = None,
) -> list[LogLikelihood]:
    """Log-likelihoods under an autoregressive model, in the order of the requests: exact, ``is_greedy`` included.

    Requests that differ in their last token alone go through the model once.

    Args:
        denoise: the model behind ``next_token``, which supplies its first token.
        requests: their groups play no part.
        vocabulary: what it forbids, and [MASK], greedy decoding never writes. The values do not depend on that.
        tokens_per_batch: of one forward, padding included; but at least one sequence.
        device: of the tensors that ``denoise`` is given.
        on_progress: called with the requests that are done, and all.

    Raises:
        ValueError: a request has no target, or the model gives NaN. One line.
    """
    _check(requests, None)
    LikelihoodOptions(tokens_per_batch=tokens_per_batch)
    scorer = RowScorer(
        denoise, tokens_per_batch=tokens_per_batch, device=device, vocabulary=vocabulary, finds_best=True
    )
    keys = [(0, tuple(request.context), len(request.target)) for request in requests]
    progress = _Progress(on_progress, len(requests))
    # What hides a target's last token is not read, but looked up: an imported model may have no [MASK], all have id 0.
    return _evaluate(scorer, requests, keys, lambda request: causal_plan(len(request.target)), progress, hidden_id=0)


def rolling(
    score: Callable[[list[Request]], list[LogLikelihood]],
    texts: Sequence[Sequence[int]],
    *,
    max_length: int,
    groups: Sequence[int] | None = None,
) -> list[LogLikelihood]:
    """Log-likelihoods of whole texts: sums over consecutive windows of ``max_length`` tokens, the last one shorter.

    No window sees another; each is scored as a document of its own. For a diffusion model this means that there is no
    context and all tokens of a window are noised together, as in training; for an autoregressive one, that a window
    begins behind the first token of ``next_token``. A text in several windows so has a lower value than in one. Every
    window has its own noise, so that variances add up. A text without tokens has the value 0.

    Args:
        score: ``loglikelihoods`` or ``exact_loglikelihoods``, with their other arguments.
        texts: token ids.
        max_length: tokens; the model's sequence length.
        groups: what names the random numbers of every text, below 2**20; None: its place among the texts.

    Raises:
        ValueError: ``max_length`` is below 1, or a text's group or number of windows is too large; and what ``score``
            raises.
    """
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}; it must be at least 1")
    windows: list[Request] = []
    counts: list[int] = []
    for text, group in zip(texts, range(len(texts)) if groups is None else groups, strict=True):
        starts = range(0, len(text), max_length)
        if not 0 <= group < 2**_WINDOW_BITS or len(starts) > 2**_WINDOW_BITS:
            raise ValueError(
                f"text {len(counts)} has the group {group} and {len(starts)} windows; the group must be from 0 to "
                f"{2**_WINDOW_BITS - 1}, and there may be {2**_WINDOW_BITS} windows"
            )
        first = group << _WINDOW_BITS
        windows += [Request([], text[at : at + max_length], first + i) for i, at in enumerate(starts)]
        counts.append(len(starts))
    scored = iter(score(windows))
    return [_total([next(scored) for _ in range(count)]) for count in counts]


def masked_loglikelihood(
    denoise: Denoise,
    context: Sequence[int],
    target: Sequence[int],
    masks: Tensor,
    *,
    vocabulary: Vocabulary,
    guidance: float = 0.0,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    device: torch.device | str = "cpu",
) -> Tensor:
    """What each of the given masks says of log p(target | context): -L'/k times the sum of its k cross-entropies.

    Args:
        masks: [n, target] bool, at least one token in each.
        guidance, tokens_per_batch, device: as in ``loglikelihoods`` and its options.

    Returns:
        [n] fp64 on the CPU, nats.

    Raises:
        ValueError: a mask is empty or not as long as the target; and as ``loglikelihoods``.
    """
    options = LikelihoodOptions(guidance=guidance, tokens_per_batch=tokens_per_batch)
    _check([Request(context, target, 0)], vocabulary.mask_token_id)
    chosen = masks.cpu().numpy().astype(bool)
    if chosen.ndim != 2 or chosen.shape[1] != len(target) or not chosen.any(1).all():
        raise ValueError(
            f"masks of shape {list(masks.shape)} do not fit; give [n, {len(target)}], with at least one token in each"
        )
    scorer = RowScorer(
        denoise,
        tokens_per_batch=options.tokens_per_batch,
        device=device,
        vocabulary=vocabulary,
        guidance=options.guidance,
    )
    counts = chosen.sum(1)
    shown = Plan(chosen, chosen, len(target) / counts[None], exact=False)
    targets = np.array([target], dtype=np.int64)
    (unit,) = scorer.finish([Unit([0], context, targets, shown, vocabulary.mask_token_id)])
    return torch.from_numpy(-unit.sums[0] * shown.coefficients[0])


class _Progress:
    def __init__(self, report: Progress | None, total: int) -> None:
        self.report, self.total, self.done = report, total, 0

    def add(self, count: int) -> None:
        self.done += count
        if self.report:
            self.report(self.done, self.total)


def _evaluate(
    scorer: RowScorer,
    requests: Sequence[Request],
    keys: Sequence[tuple],
    plan_of: Callable[[Request], Plan],
    progress: _Progress,
    hidden_id: int,
) -> list[LogLikelihood]:
    """Score the requests; those with the same key share their context, length and masks."""
    together: dict[tuple, list[int]] = {}
    for index, key in enumerate(keys):
        together.setdefault(key, []).append(index)

    def unit(indices: list[int]) -> Unit:
        request = requests[indices[0]]
        targets = np.array([list(requests[index].target) for index in indices], dtype=np.int64)
        return Unit(indices, request.context, targets, plan_of(request), hidden_id)

    def length(indices: list[int]) -> int:
        return len(requests[indices[0]].context) + len(requests[indices[0]].target)

    found: dict[int, LogLikelihood] = {}
    longest_first = sorted(together.values(), key=length, reverse=True)
    for done in scorer.finish(unit(indices) for indices in longest_first):
        found.update(zip(done.indices, _estimates(done), strict=True))
        progress.add(len(done.indices))
    return [found[index] for index in range(len(requests))]


def _estimates(unit: Unit) -> list[LogLikelihood]:
    """Of the unit's requests, from its sums."""
    coefficients = unit.plan.coefficients
    groups = len(coefficients)
    found = []
    for sums, best in zip(unit.sums, unit.best, strict=True):
        # A mask that a group has not drawn adds nothing to it, even where its sum is infinite.
        terms = np.multiply(coefficients, sums, where=coefficients != 0, out=np.zeros_like(coefficients))
        estimates = 0.0 - terms.sum(axis=1)
        value, error = float(estimates.mean()), 0.0 if unit.plan.exact else None
        if groups > 1 and math.isfinite(value):
            error = float(estimates.std(ddof=1)) / math.sqrt(groups)
        found.append(LogLikelihood(value, error, bool(best.all()), max(groups - 1, 1)))
    return found


def _fill(scorer: RowScorer, keys: Sequence[tuple], progress: _Progress) -> dict[tuple, list[int]]:
    """What the sampler writes behind the context of every key (context, length), at temperature 0."""
    users: dict[tuple, int] = {}
    for key in keys:
        users[key] = users.get(key, 0) + 1
    waiting = sorted(users, key=lambda key: len(key[0]) + key[1])
    options = SamplerOptions(guidance=scorer.guidance)
    filled = {}
    while waiting:
        context, length = waiting[-1]
        batch = [waiting.pop() for _ in range(min(scorer.rows_per_batch(len(context) + length), len(waiting)))]
        rows = sample(
            scorer.denoise,
            [[*context, *[scorer.vocabulary.mask_token_id] * length] for context, length in batch],
            options,
            vocabulary=scorer.vocabulary,
            device=scorer.device,
        ).tokens
        filled.update({key: row[len(key[0]) :] for key, row in zip(batch, rows, strict=True)})
        progress.add(sum(users[key] for key in batch))
    return filled


def _total(parts: list[LogLikelihood]) -> LogLikelihood:
    """Of independent parts; the degrees of freedom are Satterthwaite's."""
    value = math.fsum(part.value for part in parts)
    known = [part.is_greedy for part in parts if part.is_greedy is not None]
    greedy = all(known) if parts and len(known) == len(parts) else None
    errors = [part.standard_error for part in parts if part.standard_error is not None]
    if len(errors) < len(parts):
        return LogLikelihood(value, None, greedy)
    variance = math.fsum(error**2 for error in errors)
    spread = math.fsum(e**4 / part.degrees_of_freedom for e, part in zip(errors, parts, strict=True))
    freedom = max(int(variance**2 / spread + 1e-6), 1) if spread else OFFSET_GROUPS - 1
    return LogLikelihood(value, math.sqrt(variance), greedy, freedom)


def _student(degrees_of_freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 0.02 %."""
    if degrees_of_freedom <= len(_STUDENT):
        return _STUDENT[degrees_of_freedom - 1]
    return sum(term / degrees_of_freedom**power for power, term in enumerate(_STUDENT_SERIES))


def _check(requests: Sequence[Request], mask_token_id: int | None) -> None:
    """Raises ValueError, in one line, for the first request that cannot be scored; without [MASK] groups are free."""
    for index, (context, target, group) in enumerate(requests):
        if len(target) == 0:
            raise ValueError(f"request {index} has no target tokens; leave it out, or give at least one")
        if len(target) >= 2**TOKEN_POSITION_BITS:
            raise ValueError(f"request {index} has {len(target)} target tokens; give fewer than 2**22, or use windows")
        if mask_token_id is None:
            continue
        if mask_token_id in context or mask_token_id in target:
            raise ValueError(f"request {index} has [MASK] (id {mask_token_id}) among its tokens; give clean tokens")
        if not 0 <= group < 2**_GROUP_BITS:
            raise ValueError(f"request {index} has the group {group}; it must be from 0 to 2**41 - 1")
