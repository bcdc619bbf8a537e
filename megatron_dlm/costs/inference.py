"""FLOPs of generating text: the published comparison of DLM and AR, and what our own sampler spends.

All figures are exact integers, by the formulas of ``flops``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from megatron_dlm.config.tree import ModelConfig
from megatron_dlm.flops import PublishedConvention, autoregressive_flops, forward_flops
from megatron_dlm.shipped.sampler_plan import DEFAULT_BLOCK_LENGTH, plan

LENGTHS = (16, 64, 256, 1024, 4096)
"""New tokens of the published comparison."""


class Row(NamedTuple):
    """One sequence of a batch for the sampler."""

    tokens: int
    """Its length: the prompt and the masks, wherever they are."""
    masks: int
    """To fill in."""
    finished_after: int | None = None
    """Steps after which end-of-document leaves no mask before it; None: it comes in the last step or not at all."""


def sampler_flops(
    model: ModelConfig,
    vocab_size: int,
    rows: Sequence[Row],
    *,
    steps: int | None = None,
    block_length: int | None = None,
    guidance: bool = False,
    last_layer_rows: bool = False,
) -> int:
    """FLOPs of ``sampler.sample`` for a batch: the sum of ``forward_flops`` over its steps.

    Every step reads whole rows, masks behind the current block included; the head is computed for the masks of the
    current block only, and finished rows are dropped. Not for a ``threshold``, where the text decides on the steps.

    Args:
        vocab_size: see ``forward_flops``.
        steps: as ``SamplerOptions.steps``; None: one for each mask.
        block_length: as ``SamplerOptions.block_length``; None: all masks at once.
        guidance: with classifier-free guidance, which reads and asks for everything twice.
        last_layer_rows: see ``forward_flops``.

    Raises:
        ValueError: fewer steps than blocks.
    """
    # The sampler's own plan, so that costs and sampling cannot disagree; cut where a row has ended early.
    plans = [plan(row.masks, steps, block_length)[: row.finished_after] for row in rows]
    total = 0
    for number in range(max(map(len, plans), default=0)):
        # Rows that still have a step of this number, with what they ask for in it.
        active = [
            (row.tokens, planned[number].asked)
            for row, planned in zip(rows, plans, strict=True)
            if number < len(planned)
        ]
        lengths, asked = zip(*active, strict=True)
        total += forward_flops(model, vocab_size, lengths, head_rows=asked, last_layer_rows=last_layer_rows)
    # Guidance reads every row twice, once without its prompt.
    return total * (2 if guidance else 1)


class Curve(NamedTuple):
    """One way of generating, over the lengths."""

    name: str
    flops: list[int]
    ratio: list[float]
    """To autoregressive with a KV cache, by the same way of counting."""


class InferenceCosts(NamedTuple):
    """What ``inference_costs`` finds; all lists are over ``lengths``."""

    lengths: list[int]
    """New tokens."""
    prompt_tokens: int
    """Of the sampler's curves; the published ones have no prompt."""
    published: list[Curve]
    """By the published convention; the first is autoregressive with a KV cache, the second diffusion in L steps."""
    sampler: list[Curve]
    """As our sampler spends them; in the same order at first."""


# Name, steps for so many tokens, length of the blocks.
_WAYS: tuple[tuple[str, Callable[[int], int], int | None], ...] = (
    ("L steps", lambda tokens: tokens, None),
    ("L/4 steps", lambda tokens: max(1, tokens // 4), None),
    ("32 steps", lambda tokens: min(32, tokens), None),
    ("L steps, ", lambda tokens: tokens, DEFAULT_BLOCK_LENGTH),
    ("L/4 steps, ", lambda tokens: max(1, tokens // 4), DEFAULT_BLOCK_LENGTH),
)


def inference_costs(
    model: ModelConfig,
    vocab_size: int,
    *,
    head_columns: int | None = None,
    prompt_tokens: int = 0,
    last_layer_rows: bool = False,
    lengths: Sequence[int] = LENGTHS,
) -> InferenceCosts:
    """The comparison of AR and DLM of this size: L steps, fewer, and block by block.

    Args:
        vocab_size: of the published convention.
        head_columns: that our sampler computes; None: ``vocab_size``. See ``forward_flops``.
        prompt_tokens: before the new ones; AR reads them once, a DLM in every step.
        last_layer_rows: of our sampler; see ``forward_flops``.
        lengths: numbers of new tokens.
    """
    convention, columns = PublishedConvention.of(model, vocab_size), head_columns or vocab_size

    def published(tokens: int, steps: int, block_length: int | None) -> int:
        return convention.diffusion(tokens, steps=steps, block_length=block_length)

    def sampled(tokens: int, steps: int, block_length: int | None) -> int:
        row = Row(prompt_tokens + tokens, tokens)
        options: dict[str, Any] = {"steps": steps, "block_length": block_length, "last_layer_rows": last_layer_rows}
        return sampler_flops(model, columns, [row], **options)

    def left_to_right(cached: bool) -> list[int]:
        return [
            autoregressive_flops(model, columns, prompt_tokens=prompt_tokens, new_tokens=tokens, cached=cached)
            for tokens in lengths
        ]

    def diffusion(flops: Callable[[int, int, int | None], int], blocks: str) -> dict[str, list[int]]:
        return {
            f"DLM, {name}{f'{blocks} {block_length}' if block_length else ''}": [
                flops(tokens, steps(tokens), block_length) for tokens in lengths
            ]
            for name, steps, block_length in _WAYS
        }

    def curves(cached: list[int], others: dict[str, list[int]]) -> list[Curve]:
        return [
            Curve(name, flops, [f / base for f, base in zip(flops, cached, strict=True)])
            for name, flops in {"AR, KV cache": cached, **others}.items()
        ]

    return InferenceCosts(
        lengths=list(lengths),
        prompt_tokens=prompt_tokens,
        published=curves([convention.autoregressive(tokens) for tokens in lengths], diffusion(published, "growing by")),
        sampler=curves(
            left_to_right(True), {**diffusion(sampled, "blocks of"), "AR, recomputed": left_to_right(False)}
        ),
    )
