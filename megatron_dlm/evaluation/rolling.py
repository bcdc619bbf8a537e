"""Log-likelihoods of whole texts, which may be longer than a model's sequences: sums over consecutive windows.

No window sees another; each is scored as a document of its own. For a diffusion model this means that there is no
context and all tokens of a window are noised together, as in training; for an autoregressive one, that a window begins
behind the first token of ``next_token``. A text in several windows so has a lower value than in one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from megatron_dlm.evaluation.likelihood import LogLikelihood, Request
from megatron_dlm.evaluation.likelihood_masks import OFFSET_GROUPS
from megatron_dlm.evaluation.likelihood_rows import Tokens

_WINDOW_BITS = 20


def windows_of(texts: Sequence[Tokens], *, max_length: int, groups: Sequence[int] | None = None) -> list[list[Request]]:
    """The windows of every text: ``max_length`` tokens each, but the last one, and with noise of its own.

    Args:
        texts: token ids.
        max_length: tokens; the model's sequence length.
        groups: what names the random numbers of every text, below 2**20; None: its place among the texts.

    Raises:
        ValueError: ``max_length`` is below 1, or a text's group or number of windows is too large; one line.
    """
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}; it must be at least 1")
    windows: list[list[Request]] = []
    for text, group in zip(texts, range(len(texts)) if groups is None else groups, strict=True):
        starts = range(0, len(text), max_length)
        if not 0 <= group < 2**_WINDOW_BITS or len(starts) > 2**_WINDOW_BITS:
            raise ValueError(
                f"text {len(windows)} has the group {group} and {len(starts)} windows; the group must be from 0 to "
                f"{2**_WINDOW_BITS - 1}, and there may be {2**_WINDOW_BITS} windows"
            )
        # Windows of all texts have groups of their own, and so their own noise.
        first = group << _WINDOW_BITS
        windows.append([Request([], text[at : at + max_length], first + i) for i, at in enumerate(starts)])
    return windows


def totals(windows: Sequence[Sequence[Request]], scored: Iterable[LogLikelihood]) -> list[LogLikelihood]:
    """The log-likelihood of every text, from those of all the windows in their order."""
    remaining = iter(scored)
    return [total([next(remaining) for _ in text]) for text in windows]


def total(parts: Sequence[LogLikelihood]) -> LogLikelihood:
    """The log-likelihood of a text from those of its windows; 0 without any.

    Their noise is independent, so variances add up, and the degrees of freedom are Satterthwaite's: the sum of the
    variances, squared, over the sum of each one squared and divided by its own degrees of freedom.
    """
    value = math.fsum(part.value for part in parts)
    known = [part.is_greedy for part in parts if part.is_greedy is not None]
    greedy = all(known) if parts and len(known) == len(parts) else None
    errors = [part.standard_error for part in parts if part.standard_error is not None]
    if len(errors) < len(parts):
        return LogLikelihood(value, None, greedy)
    variance = math.fsum(error**2 for error in errors)
    spread = math.fsum(e**4 / part.degrees_of_freedom for e, part in zip(errors, parts, strict=True))
    # The small term keeps a whole number from falling to the one below.
    freedom = max(int(variance**2 / spread + 1e-6), 1) if spread else OFFSET_GROUPS - 1
    return LogLikelihood(value, math.sqrt(variance), greedy, freedom)
