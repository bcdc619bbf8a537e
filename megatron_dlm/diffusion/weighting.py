"""Loss weights that are not those of the ELBO."""

from __future__ import annotations

import torch
from torch import Tensor

CART_Q = 0.3
# Reach doubles with each round: 64 positions, beyond which a token would weigh less than 2e-10 in all.
_ROUNDS = 6


def cart_weights(visible: Tensor) -> Tensor:
    """Context-adaptive weight of every position, for those that are masked (CART of Dream, Ye et al., 2025).

    w_i = 1/2 * sum over visible j != i of q (1 - q)**(|i - j| - 1), q = 0.3: near 1 with a visible neighbourhood,
    near 0 deep inside a masked stretch.

    The geometric sum to each side is truncated after 64 positions and built by doubling its reach, so the cost is
    O(seq * 6) and no [seq, seq] matrix exists. The neglected part is at most 0.7**64 = 1.2e-10.

    Args:
        visible: [batch, seq] bool, tokens that are eligible and not masked.

    Returns:
        [batch, seq] float64.
    """
    ours = visible.double() * (CART_Q / 2)
    before, after = _shift(ours, 1), _shift(ours, -1)
    # Each round joins two stretches of the reach so far, the farther one damped by the distance between them.
    for reach in (2**i for i in range(_ROUNDS)):
        decay = (1 - CART_Q) ** reach
        before = before + decay * _shift(before, reach)
        after = after + decay * _shift(after, -reach)
    return before + after


def _shift(values: Tensor, distance: int) -> Tensor:
    """[batch, seq] moved to the right by `distance` (to the left where negative), with zeros moved in."""
    seq = values.shape[1]
    if abs(distance) >= seq:
        return torch.zeros_like(values)
    return torch.nn.functional.pad(values, (distance, -distance))
