"""What the sampler is asked for, and the steps that it then takes; a copy of this file ships inside every export.

Without torch, for those who only ask what sampling costs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

DEFAULT_BLOCK_LENGTH = 32
"""Of text behind a prompt where none is asked for: it grows from left to right, so that its end is found early."""

Remasking = Literal["low_confidence", "margin", "entropy", "random"]


@dataclass(frozen=True)
class Vocabulary:
    """The ids that have a meaning of their own."""

    mask_token_id: int
    end_of_document_id: int | None = None
    """Ends a text; None: texts have no end but their length."""
    forbidden_token_ids: tuple[int, ...] = ()
    """Never written, though they may be read; [MASK] need not be among them."""
    size: int | None = None
    """Ids of texts are below it, [MASK] and end-of-document too; None: not known."""

    @property
    def unwritten(self) -> list[int]:
        """The ids that are never written, [MASK] included, in ascending order."""
        return sorted({self.mask_token_id, *self.forbidden_token_ids})

    def forbidding(self, ids: Iterable[int]) -> Vocabulary:
        """The same vocabulary with more ids that are never written."""
        return replace(self, forbidden_token_ids=(*self.forbidden_token_ids, *ids))


@dataclass(frozen=True)
class SamplerOptions:
    """How masks are filled in. Raises ``ValueError`` for what contradicts itself, in one line."""

    steps: int | None = None
    """Denoising steps of every sequence, divided over its blocks by their masks; None: one for each token."""
    block_length: int | None = None
    """Masks that are filled in before those to their right are; None: all at once."""
    remasking: Remasking = "low_confidence"
    """Which candidates are kept: those of the largest probability, of the largest margin between the two best tokens,
    of the smallest entropy, or any; the others stay masked."""
    threshold: float | None = None
    """Keep every candidate whose confidence is above this, and at least one, instead of a fixed number a step. From 0
    to 1; for entropy, whose negative is the confidence, at most 0."""
    temperature: float = 0.0
    """Of the Gumbel noise on the logits; 0: the token of the largest logit."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that has this much probability (with a temperature)."""
    guidance: float = 0.0
    """Classifier-free guidance: logits = without + (guidance + 1) * (with - without the prompt); 0: none."""
    seed: int = 0
    """Row i of a batch draws from (seed, i), whatever else is in the batch."""

    def __post_init__(self) -> None:
        for name in ("steps", "block_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.remasking not in get_args(Remasking):
            raise ValueError(f"remasking {self.remasking!r} is unknown; choose from {', '.join(get_args(Remasking))}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be a finite number, at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not -1 <= self.guidance < float("inf"):
            raise ValueError(f"guidance is {self.guidance}; it must be a finite number, at least -1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must be at least 0 and below 2**32")
        if self.threshold is not None:
            if self.steps is not None:
                raise ValueError("steps and threshold both say how many tokens a step fills in; give one of them")
            if self.remasking == "random":
                raise ValueError("threshold needs a confidence, which random remasking has not; choose another")
            low, high = (float("-inf"), 0.0) if self.remasking == "entropy" else (0.0, 1.0)
            if not low <= self.threshold <= high:
                raise ValueError(f"threshold is {self.threshold}; with {self.remasking} it is from {low:g} to {high:g}")


class PlannedStep(NamedTuple):
    """A step of one row, as its number of masks decides it."""

    asked: int
    """Masks of the current block, whose logits are asked for."""
    kept: int
    """Tokens that it fills in."""
    reached: int
    """Masks of the row up to the end of the current block."""


def plan(masks: int, steps: int | None = None, block_length: int | None = None) -> list[PlannedStep]:
    """The steps that fill in a row, if no end-of-document comes before the last and no threshold decides.

    Every block has at least one step and at most one for each of its masks; its first steps keep one token more where
    they do not divide. Blocks of one length share the steps as in LLaDA.

    Args:
        masks: of the row.
        steps: as ``SamplerOptions.steps``.
        block_length: as ``SamplerOptions.block_length``.

    Raises:
        ValueError: fewer steps than blocks.
    """
    # The last block may be shorter.
    length = block_length or max(masks, 1)
    blocks = [min(length, masks - start) for start in range(0, masks, length)]
    if steps is not None and steps < len(blocks):
        raise ValueError(
            f"steps ({steps}) must be at least the number of blocks ({len(blocks)}); give more, or a "
            "larger block_length"
        )
    planned = []
    reached = 0
    for left, share in zip(blocks, _shared(masks if steps is None else steps, blocks), strict=True):
        reached += left
        for step in range(share):
            # What is left over what is left of the steps, rounded up: it comes out even.
            kept = -(-left // (share - step))
            planned.append(PlannedStep(left, kept, reached))
            left -= kept
    return planned


def _shared(steps: int, blocks: list[int]) -> list[int]:
    """Steps of every block, at least one and at most one for each of its masks; equal blocks share as in LLaDA."""
    total = sum(blocks)
    steps = min(steps, total)
    # In proportion to the masks, at least one step a block; then what is left, one each from the left.
    shares = [max(1, steps * count // total) for count in blocks]
    for index, count in enumerate(blocks):
        if sum(shares) < steps and shares[index] < count:
            shares[index] += 1
    return shares
