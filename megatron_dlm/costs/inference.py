"""FLOPs of generating text: the published comparison of DLM and AR, and what our own sampler spends.

Only matrix products count, 2abc FLOPs for [a, b] x [b, c], as in torch's FlopCounterMode: norms, rotary positions,
softmax and the choice of tokens are left out. A causal token pays for the keys that it sees. All figures are exact
integers. Symbols: L new tokens, P tokens of the prompt, n layers, d = heads * head_dim, h the hidden size,
N the weights that a token is multiplied with: those of the layers and the LM head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from megatron_dlm.config.tree import ModelConfig
from megatron_dlm.shipped.sampler_plan import DEFAULT_BLOCK_LENGTH, plan

LENGTHS = (16, 64, 256, 1024, 4096)
"""New tokens of the published comparison."""


class PublishedConvention(NamedTuple):
    """The comparison of "Diffusion Language Models are Super Data Learners": no prompt, and a DLM without a cache.

    A forward of T tokens costs 2 N T + 4 n d T^2 FLOPs: the LM head runs on every token of every step.
    """

    parameters: int
    """N; not the embedding, which is looked up (a tied one counts once, as the head)."""
    layers: int
    """n."""
    width: int
    """d."""

    def autoregressive(self, tokens: int) -> int:
        """With a KV cache: 2 N L + 2 n d L (L + 1) FLOPs. Every token is read once, and sees the keys up to its own."""
        return 2 * self.parameters * tokens + 2 * self.layers * self.width * tokens * (tokens + 1)

    def diffusion(self, tokens: int, *, steps: int | None = None, block_length: int | None = None) -> int:
        """S forwards of the whole text: S (2 N L + 4 n d L^2) FLOPs.

        Args:
            tokens: L.
            steps: S; None: one for each token.
            block_length: the text grows by blocks of so many masks, and a step reads it up to the end of the current
                block (LLaDA's "block diffusion sampling"): the sum over blocks of S_b (2 N T_b + 4 n d T_b^2), where
                T_b is the text's length with block b. None: all masks are there from the first step.

        Raises:
            ValueError: fewer steps than blocks.
        """
        read = [step.reached for step in plan(tokens, steps, block_length)]
        return sum(2 * self.parameters * length + 4 * self.layers * self.width * length**2 for length in read)

    def ratio(self, tokens: int, *, steps: int | None = None, block_length: int | None = None) -> float:
        """FLOPs of diffusion over those of autoregressive: (2 N L^2 + 4 n d L^3) / (2 N L + 2 n d L (L + 1)) with
        L steps. The arguments are those of ``diffusion``."""
        return self.diffusion(tokens, steps=steps, block_length=block_length) / self.autoregressive(tokens)


def published_convention(model: ModelConfig, vocab_size: int) -> PublishedConvention:
    """The convention for a model of ours; N counts no norms."""
    parameters = model.num_layers * _layer_weights(model) + model.hidden_size * vocab_size
    return PublishedConvention(parameters, model.num_layers, _attention_width(model))


class Row(NamedTuple):
    """One sequence of a batch for the sampler."""

    tokens: int
    """Its length: the prompt and the masks, wherever they are."""
    masks: int
    """To fill in."""
    finished_after: int | None = None
    """Steps after which end-of-document leaves no mask before it; None: it comes in the last step or not at all."""


def forward_flops(model: ModelConfig, vocab_size: int, lengths: Sequence[int], *, head_rows: int) -> int:
    """FLOPs of one forward of a bidirectional batch: 2 N' T B + 4 n d (sum of squared lengths) + 2 h V R.

    N' are the weights of the layers, T the longest length, to which the B rows are padded, R the rows of the head.

    Args:
        vocab_size: V, the columns of the head: ``ModelConfig.padded_vocab_size`` for a checkpoint's model; an export's
            has no padding.
        lengths: real tokens of every row; padding goes through the layers, but no attention is computed for it.
        head_rows: positions whose logits are asked for.
    """
    body = 2 * model.num_layers * _layer_weights(model) * len(lengths) * max(lengths)
    attention = 4 * model.num_layers * _attention_width(model) * sum(length**2 for length in lengths)
    return body + attention + 2 * model.hidden_size * vocab_size * head_rows


def sampler_flops(
    model: ModelConfig,
    vocab_size: int,
    rows: Sequence[Row],
    *,
    steps: int | None = None,
    block_length: int | None = None,
    guidance: bool = False,
) -> int:
    """FLOPs of ``sampler.sample`` for a batch: the sum of ``forward_flops`` over its steps.

    Every step reads whole rows, masks behind the current block included; the head is computed for the masks of the
    current block only, and finished rows are dropped. Not for a ``threshold``, where the text decides on the steps.

    Args:
        vocab_size: see ``forward_flops``.
        steps: as ``SamplerOptions.steps``; None: one for each mask.
        block_length: as ``SamplerOptions.block_length``; None: all masks at once.
        guidance: with classifier-free guidance, which reads and asks for everything twice.

    Raises:
        ValueError: fewer steps than blocks.
    """
    plans = [plan(row.masks, steps, block_length)[: row.finished_after] for row in rows]
    total = 0
    for number in range(max(map(len, plans), default=0)):
        active = [
            (row.tokens, planned[number].asked)
            for row, planned in zip(rows, plans, strict=True)
            if number < len(planned)
        ]
        lengths, asked = zip(*active, strict=True)
        total += forward_flops(model, vocab_size, lengths, head_rows=sum(asked))
    return total * (2 if guidance else 1)


def autoregressive_flops(
    model: ModelConfig, vocab_size: int, *, prompt_tokens: int, new_tokens: int, cached: bool = True
) -> int:
    """FLOPs of continuing one prompt left to right, with the head on the last position only.

    The prompt begins with one more token, which begins every document. With a KV cache (an export of ours in
    transformers) Q = P + L tokens are read, each once: 2 N' Q + 2 n d Q (Q + 1) + 2 h V L; without a prompt that is
    the published convention. Recomputed (a checkpoint of ours in the trainer's model), every new token reads all T
    tokens before it again: the sum over T = P + 1 ... P + L of 2 N' T + 2 n d T (T + 1) + 2 h V.

    Args:
        vocab_size: see ``forward_flops``.
        prompt_tokens: P.
        new_tokens: L; the last one is not read.
        cached: keep keys and values of the tokens before.
    """
    last = prompt_tokens + new_tokens
    read = [last] if cached else range(prompt_tokens + 1, last + 1)
    width = model.num_layers * _attention_width(model)
    body = sum(
        2 * model.num_layers * _layer_weights(model) * tokens + 2 * width * tokens * (tokens + 1) for tokens in read
    )
    return body + 2 * model.hidden_size * vocab_size * new_tokens


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
    lengths: Sequence[int] = LENGTHS,
) -> InferenceCosts:
    """The comparison of AR and DLM of this size: L steps, fewer, and block by block.

    Args:
        vocab_size: of the published convention.
        head_columns: that our sampler computes; None: ``vocab_size``. See ``forward_flops``.
        prompt_tokens: before the new ones; AR reads them once, a DLM in every step.
        lengths: numbers of new tokens.
    """
    convention, columns = published_convention(model, vocab_size), head_columns or vocab_size

    def published(tokens: int, steps: int, block_length: int | None) -> int:
        return convention.diffusion(tokens, steps=steps, block_length=block_length)

    def sampled(tokens: int, steps: int, block_length: int | None) -> int:
        row = Row(prompt_tokens + tokens, tokens)
        return sampler_flops(model, columns, [row], steps=steps, block_length=block_length)

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


def _layer_weights(model: ModelConfig) -> int:
    """Weights of one layer's matrices: queries and output, keys and values, and the three of SwiGLU."""
    heads = 2 * model.num_attention_heads + 2 * model.resolved_query_groups
    return model.hidden_size * (heads * model.resolved_head_dim + 3 * model.ffn_hidden_size)


def _attention_width(model: ModelConfig) -> int:
    return model.num_attention_heads * model.resolved_head_dim
