"""Which tokens of a target are masked to estimate its likelihood, and how the estimate is put together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from dlm_kernels.noise_levels import linear_count, linear_threshold
from dlm_kernels.philox import MASK32, TOKEN_POSITION_BITS, Stream, philox4x32, token_counter

Estimator = Literal["exact_count", "one_over_t", "left_to_right"]

TOKENS_PER_BATCH = 16384
DEFAULT_MASKS = 128
"""Of a target of several tokens, as is usual for HellaSwag."""
OFFSET_GROUPS = 8
# Smallest mask probability of one_over_t: with weights 1/p down to p = 0 its variance would be infinite.
_EPS = 1e-3


@dataclass(frozen=True)
class LikelihoodOptions:
    """How the bound is estimated. Raises ``ValueError`` for what is out of range, in one line."""

    estimator: Estimator = "exact_count"
    """exact_count: masks of exactly k tokens, k on shifted grids over 1..L', L' tokens in the target; each weighs L'/k.
    one_over_t: each token is masked with a probability p, on shifted grids over [0.001, 1], and weighs 1/p, as SMDM and
    Dream have it. The same bound (to 0.1 %), but several times the error, and intervals that are too narrow: small p
    are rare and weigh much. left_to_right: the chain rule, each token given those before it and masks behind. Exact,
    but ANOTHER quantity, the likelihood in one order, where the bound is a mean over all: never compare the two."""
    masks: int = DEFAULT_MASKS
    """Of every target; 1 is enough where all targets have one token. Intervals from fewer than 8 are too narrow."""
    guidance: float = 0.0
    """Classifier-free guidance: logits = without + (guidance + 1) * (with - without the context). Other than at 0 the
    result is a score, and bounds no likelihood."""
    seed: int = 0
    """The masks are a function of it, of the request's group and of the number of its tokens."""
    tokens_per_batch: int = TOKENS_PER_BATCH
    """Tokens of one forward, padding included; but at least one sequence."""
    enumerate_short: bool = True
    """exact_count: a target with no more possible masks (2**L' - 1) than ``masks`` gets each of them once, with its
    weight: the bound without error, at no higher cost. Targets of one token always do."""

    def __post_init__(self) -> None:
        if self.estimator not in get_args(Estimator):
            raise ValueError(f"estimator {self.estimator!r} is unknown; choose from {', '.join(get_args(Estimator))}")
        if not 1 <= self.masks < 2**31:
            raise ValueError(f"masks is {self.masks}; it must be at least 1 and below 2**31")
        if not -1 <= self.guidance < math.inf:
            raise ValueError(f"guidance is {self.guidance}; it must be a finite number, at least -1")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be at least 0 and below 2**64")
        if self.tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch is {self.tokens_per_batch}; it must be at least 1")


class Plan(NamedTuple):
    """The masks of a target, each once."""

    masks: np.ndarray
    """[masks, target] bool: what the model does not see."""
    asked: np.ndarray
    """[masks, target] bool: the tokens whose cross-entropies are added up."""
    coefficients: np.ndarray
    """[groups, masks] fp64: ``coefficients @ sums`` are independent estimates of -log p(target | context)."""
    exact: bool
    """The one estimate has no error."""


def plan(options: LikelihoodOptions, group: int, length: int) -> Plan:
    """The masks of a target of so many tokens.

    Args:
        group: below 2**41; targets of one group have the same offsets, and the same keys of equal positions.
        length: tokens, from 1 to 2**22 - 1.
    """
    if options.estimator == "left_to_right":
        position = np.arange(length)
        return Plan(position >= position[:, None], np.eye(length, dtype=bool), np.ones((1, length)), exact=True)
    # Enumerating costs no more forwards than drawing, and leaves no error.
    few = length == 1 or (options.enumerate_short and 2**length - 1 <= options.masks)
    if options.estimator == "exact_count" and few:
        return _every_mask(length)
    return _drawn_masks(options, group, length)


def causal_plan(length: int) -> Plan:
    """One row in which a causal model scores every token; it hides the last, which no position reads."""
    last = np.arange(length)[None] == length - 1
    return Plan(last, np.ones_like(last), np.ones((1, 1)), exact=True)


def _every_mask(length: int) -> Plan:
    """The mean over k of L'/k times the mean over the subsets of size k: a weight of 1 / (k C(L', k))."""
    # Row i - 1 has the bits of i, from 1 (the first token alone) to all of them.
    masks = (np.arange(1, 2**length)[:, None] >> np.arange(length) & 1).astype(bool)
    weights = [1 / (k * math.comb(length, k)) for k in masks.sum(1).tolist()]
    return Plan(masks, masks, np.array([weights]), exact=True)


def _drawn_masks(options: LikelihoodOptions, group: int, length: int) -> Plan:
    """Draws in groups of their own offset u: draw j of the n in a group has the noise level (u + j/n) mod 1.

    k = floor(level * L') + 1, and the k tokens with the smallest keys are masked; or the tokens whose key is below p.
    """
    # Draws [masks] in contiguous groups of nearly equal size; `place` counts from 0 in each group.
    draws = np.arange(options.masks)
    groups = min(options.masks, OFFSET_GROUPS)
    member = draws * groups // options.masks
    sizes = np.bincount(member)[member]
    place = draws - np.searchsorted(member, member)
    # A shifted grid of each group's own offset: levels [masks] of 32 bits, spread evenly over the unit interval.
    offsets = _bits(options.seed, group, np.arange(groups), 0)[member]
    levels = (offsets + (place << 32) // sizes) & MASK32
    # One key for each (draw, position), [masks, target]. Equal positions of a group's targets have equal keys, so the
    # answers to a question are compared under the same masks.
    keys = _bits(options.seed, group, np.arange(length), 1 + draws[:, None])
    if options.estimator == "exact_count":
        counts = linear_count(levels, length)
        # The position breaks ties, so the mask has exactly k tokens: those up to the k-th smallest key.
        keys = keys << TOKEN_POSITION_BITS | np.arange(length)
        masks = keys <= np.take_along_axis(np.sort(keys, axis=1), counts[:, None] - 1, axis=1)
        weights = length / counts
    else:
        thresholds = linear_threshold(levels, _EPS)
        masks = keys < thresholds[:, None]
        weights = 2**32 / thresholds
    # What is drawn twice is computed once, and weighs what both weigh in their groups.
    unique, which = np.unique(masks, axis=0, return_inverse=True)
    coefficients = np.zeros((groups, len(unique)))
    np.add.at(coefficients, (member, which.reshape(-1)), weights / sizes)
    used = unique.any(1)  # a mask of nothing adds nothing
    return Plan(unique[used], unique[used], coefficients[:, used], exact=False)


def _bits(seed: int, group: int, position: np.ndarray, draw: int | np.ndarray) -> np.ndarray:
    """uint32 values held in int64. Draw 0 is for the offsets, 1 + j for the keys of mask j; they broadcast."""
    counter = token_counter(group, position)
    return philox4x32(seed, counter & MASK32, counter >> 32, draw, int(Stream.SAMPLING))[0]
