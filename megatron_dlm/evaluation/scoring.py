"""Log-likelihoods of texts under any model of ours: many requests at once, in rounds, shared among replicas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch.distributed as dist

from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.evaluation.likelihood import LogLikelihood, Request, exact_loglikelihoods, loglikelihoods
from megatron_dlm.evaluation.likelihood_masks import LikelihoodOptions
from megatron_dlm.evaluation.progress import Finished
from megatron_dlm.generation.text_model import TextModel

# A round is so many full forwards of every replica: seconds, after which results are handed over. Its last forward is
# not full, which costs half of one on average.
_FORWARDS_PER_ROUND = 32


class Pair(NamedTuple):
    """A text and its continuation as tokens that fit the model."""

    context: list[int]
    target: list[int]
    truncated: bool
    """The context has lost its beginning."""


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, max_length: int) -> Pair:
    """Tokens of a continuation and of what comes before it, as lm-eval divides them.

    The two are encoded together, because a tokenizer may join what is apart; spaces at the context's end go to the
    continuation, where most tokenizers have them.

    Args:
        max_length: tokens of both together; a longer context is cut at its beginning.

    Raises:
        ValueError: the continuation has no tokens, or more than ``max_length``; one line.
    """
    # "Question: " + "yes" is "Question:" + " yes" to most tokenizers, whose words begin with their space.
    bare = context.rstrip()
    continuation, context = context[len(bare) :] + continuation, bare
    before = tokenizer.encode(context)
    # What the two together have more than the context alone; where they merge into it, by itself.
    target = tokenizer.encode(context + continuation)[len(before) :] or tokenizer.encode(continuation)
    if not target:
        raise ValueError(f"{continuation[:40]!r} has no tokens; give a text that has some")
    if len(target) > max_length:
        raise ValueError(
            f"{continuation[:40]!r} has {len(target)} tokens, more than the {max_length} of the model's sequences; "
            "shorten it, or leave it out"
        )
    room = max_length - len(target)
    return Pair(before[max(len(before) - room, 0) :], target, len(before) > room)


def score(
    model: TextModel, requests: Sequence[Request], options: LikelihoodOptions, *, greedy: bool = False
) -> Iterator[Finished[LogLikelihood]]:
    """Log-likelihoods by index of the request: a bound for masked diffusion, exact for an autoregressive model.

    Every rank of the model's layout must call it with the same arguments, and all get the same results, a round (some
    seconds of work) at a time. Requests of one group stay together, the longest go first; data-parallel replicas share
    them. A result does not depend on all this, but for rounding.

    Args:
        options: of an autoregressive model only ``tokens_per_batch`` counts.
        greedy: also find ``is_greedy``, which an autoregressive model always tells.

    Raises:
        ValueError: a request cannot be scored, or the model gives NaN; one line, on every rank.
    """
    # Requests of a group never part: they share forwards, and are compared with each other.
    groups: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.group, []).append(index)
    costs = {group: sum(_cost(model, requests[i], options, greedy) for i in groups[group]) for group in groups}
    total, done = max(sum(costs.values()), 1), 0
    rank, size = _replica(model)

    def longest(group: int) -> int:
        return max(len(requests[i].context) + len(requests[i].target) for i in groups[group])

    order = sorted(groups, key=longest, reverse=True)
    for chosen in _rounds(order, costs, _FORWARDS_PER_ROUND * options.tokens_per_batch * size):
        cost = sum(costs[group] for group in chosen)
        # Every replica takes each size-th group, so that all have some of the long ones.
        mine = [index for group in chosen[rank::size] for index in groups[group]]
        own: dict[int, LogLikelihood] = {}
        error = None
        try:
            for part in loglikelihoods_of(model, [requests[i] for i in mine], options, greedy=greedy):
                own |= {mine[number]: result for number, result in part.results.items()}
                yield Finished({}, (done + cost * part.share) / total)
        except ValueError as fault:  # other replicas must not wait for this one
            error = str(fault)
        done += cost
        yield Finished(_gather(model, own if error is None else error), done / total)


def loglikelihoods_of(
    model: TextModel, requests: Sequence[Request], options: LikelihoodOptions, *, greedy: bool = False
) -> Iterator[Finished[LogLikelihood]]:
    """Log-likelihoods of all requests on this replica; arguments and errors are those of ``score``."""
    if model.kind.causal:
        return exact_loglikelihoods(
            model.own_tokens(),
            requests,
            vocabulary=model.vocabulary,
            tokens_per_batch=options.tokens_per_batch,
            device=model.device,
        )
    return loglikelihoods(
        model.own_tokens(), requests, options, vocabulary=model.vocabulary, device=model.device, greedy=greedy
    )


def _cost(model: TextModel, request: Request, options: LikelihoodOptions, greedy: bool) -> int:
    """Tokens that go through the model, about."""
    size = len(request.target)
    forwards = 1
    if not model.kind.causal:
        few = 2 ** min(size, 31) - 1 if options.enumerate_short or size == 1 else options.masks
        # One mask of each token, or as many masks as there are or may be; guidance reads everything twice.
        forwards = size if options.estimator == "left_to_right" else min(few, options.masks)
        forwards = (forwards + (size if greedy else 0)) * (2 if options.guidance else 1)
    return (len(request.context) + size) * forwards


def _rounds(order: Sequence[int], costs: Mapping[int, int], limit: int) -> Iterator[list[int]]:
    """The groups in lists that cost about ``limit``."""
    chosen: list[int] = []
    cost = 0
    for group in order:
        chosen.append(group)
        cost += costs[group]
        if cost >= limit:
            yield chosen
            chosen, cost = [], 0
    if chosen:
        yield chosen


def _replica(model: TextModel) -> tuple[int, int]:
    """Which of how many data-parallel replicas this rank belongs to."""
    return (0, 1) if model.topology is None else (model.topology.data_rank, model.topology.data_size)


def _gather(model: TextModel, part: dict[int, LogLikelihood] | str) -> dict[int, LogLikelihood]:
    """The results of all replicas. Raises ``ValueError`` with the first text, which is an error."""
    parts = [part]
    if model.topology is not None and model.topology.data_size > 1:
        # Errors go along: every rank raises the same one, or gets all results.
        parts = [part] * model.topology.data_size
        dist.all_gather_object(parts, part, group=model.topology.data_group)
    whole: dict[int, LogLikelihood] = {}
    for each in parts:
        if isinstance(each, str):
            raise ValueError(each)
        whole |= each
    return whole
