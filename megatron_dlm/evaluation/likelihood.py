"""Log-likelihoods of given tokens: the bound of masked diffusion models, the exact value of autoregressive ones.

Pure functions of ``denoise``. They are the training losses of the two: the softmax runs over every column that
``denoise`` returns, [MASK] included, as the loss does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from dlm_kernels.philox import TOKEN_POSITION_BITS
from megatron_dlm.evaluation.likelihood_masks import (
    OFFSET_GROUPS,
    TOKENS_PER_BATCH,
    LikelihoodOptions,
    Plan,
    causal_plan,
    plan,
)
from megatron_dlm.evaluation.likelihood_rows import RowScorer, Tokens, Unit
from megatron_dlm.evaluation.progress import Finished
from megatron_dlm.shipped.sampler import Denoise, sample
from megatron_dlm.shipped.sampler_plan import SamplerOptions, Vocabulary

_GROUP_BITS = 41
# 97.5 % quantiles of Student's t for 1 to 7 degrees of freedom; beyond, the series in 1/df around the normal one.
_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646)
_STUDENT_SERIES = (1.95996, 2.37227, 2.82250, 2.55585)


class Request(NamedTuple):
    """Tokens to be scored, given those before them."""

    context: Tokens
    target: Tokens
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
) -> Iterator[Finished[LogLikelihood]]:
    """Log-likelihoods under a masked diffusion model, by index of the request, as they are found.

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
            which costs L' forwards for every context and length. Results then come in the second half of the work.

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
    # Requests that agree in all of this have the same masks, and often show the model the same tokens.
    keys = [(request.group, tuple(request.context), len(request.target)) for request in requests]
    rounds = _evaluate(
        scorer,
        requests,
        keys,
        lambda request: plan(options, request.group, len(request.target)),
        hidden_id=vocabulary.mask_token_id,
    )
    done, total = 0, len(requests) * (2 if greedy else 1)  # with ``greedy`` a request is one piece of work, and another
    bounds: dict[int, LogLikelihood] = {}
    for found in rounds:
        found = {index: result._replace(is_greedy=None) for index, result in found.items()}
        bounds |= found
        done += len(found)
        yield Finished({} if greedy else found, done / total)
    if not greedy:
        return
    # What is filled in depends on the context and the length alone, so requests that agree in them share it.
    users: dict[tuple, list[int]] = {}
    for index, (_, context, length) in enumerate(keys):
        users.setdefault((context, length), []).append(index)
    for written in _fill(scorer, list(users)):
        found = {
            index: bounds[index]._replace(is_greedy=row == list(requests[index].target))
            for key, row in written.items()
            for index in users[key]
        }
        done += len(found)
        yield Finished(found, done / total)


def exact_loglikelihoods(
    denoise: Denoise,
    requests: Sequence[Request],
    *,
    vocabulary: Vocabulary,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    device: torch.device | str = "cpu",
) -> Iterator[Finished[LogLikelihood]]:
    """Log-likelihoods under an autoregressive model, as they are found: exact, ``is_greedy`` included.

    Requests that differ in their last token alone go through the model once.

    Args:
        denoise: the model behind ``next_token``, which supplies its first token.
        requests: their groups play no part.
        vocabulary: what it forbids, and [MASK], greedy decoding never writes. The values do not depend on that.
        tokens_per_batch: of one forward, padding included; but at least one sequence.
        device: of the tensors that ``denoise`` is given.

    Raises:
        ValueError: a request has no target, or the model gives NaN. One line.
    """
    _check(requests, None)
    LikelihoodOptions(tokens_per_batch=tokens_per_batch)
    scorer = RowScorer(
        denoise, tokens_per_batch=tokens_per_batch, device=device, vocabulary=vocabulary, finds_best=True
    )
    keys = [(0, tuple(request.context), len(request.target)) for request in requests]
    done = 0
    # What hides a target's last token is not read, but looked up: an imported model may have no [MASK], all have id 0.
    for found in _evaluate(scorer, requests, keys, lambda request: causal_plan(len(request.target)), hidden_id=0):
        done += len(found)
        yield Finished(found, done / len(requests))


def _evaluate(
    scorer: RowScorer,
    requests: Sequence[Request],
    keys: Sequence[tuple],
    plan_of: Callable[[Request], Plan],
    *,
    hidden_id: int,
) -> Iterator[dict[int, LogLikelihood]]:
    """Score the requests, the longest first; those with the same key share their context, length and masks."""
    together: dict[tuple, list[int]] = {}
    for index, key in enumerate(keys):
        together.setdefault(key, []).append(index)

    def unit(indices: list[int]) -> Unit:
        # Any of them: they have one context and one length.
        request = requests[indices[0]]
        targets = np.array([list(requests[index].target) for index in indices], dtype=np.int64)
        return Unit(indices, request.context, targets, plan_of(request), hidden_id)

    def length(indices: list[int]) -> int:
        return len(requests[indices[0]].context) + len(requests[indices[0]].target)

    # So that a batch pads little, and one that does not fit into memory fails at once.
    longest_first = sorted(together.values(), key=length, reverse=True)
    for done in scorer.finish(unit(indices) for indices in longest_first):
        yield dict(zip(done.indices, _estimates(done), strict=True))


def _estimates(unit: Unit) -> list[LogLikelihood]:
    """Of the unit's requests, from its sums."""
    coefficients = unit.plan.coefficients
    groups = len(coefficients)
    found = []
    for sums, best in zip(unit.sums, unit.best, strict=True):
        # A mask that a group has not drawn adds nothing to it, even where its sum is infinite.
        terms = np.multiply(coefficients, sums, where=coefficients != 0, out=np.zeros_like(coefficients))
        # [groups]: one estimate of log p each, independent of the others. (0.0 minus, so that nothing is -0.0.)
        estimates = 0.0 - terms.sum(axis=1)
        value, error = float(estimates.mean()), 0.0 if unit.plan.exact else None
        if groups > 1 and math.isfinite(value):
            error = float(estimates.std(ddof=1)) / math.sqrt(groups)
        found.append(LogLikelihood(value, error, bool(best.all()), max(groups - 1, 1)))
    return found


def _fill(scorer: RowScorer, keys: Sequence[tuple]) -> Iterator[dict[tuple, list[int]]]:
    """What the sampler writes behind the context of every key (context, length), at temperature 0."""
    # Taken from the end, where the longest are.
    waiting = sorted(keys, key=lambda key: len(key[0]) + key[1])
    options = SamplerOptions(guidance=scorer.guidance)
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
        yield {key: row[len(key[0]) :] for key, row in zip(batch, rows, strict=True)}


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
