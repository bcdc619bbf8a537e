"""FLOPs and parameters of a model, from its configuration alone: every formula that the project has.

Only matrix products count, 2abc FLOPs for [a, b] x [b, c], as in torch's FlopCounterMode: norms, rotary positions,
softmax and the choice of tokens are left out. A causal token pays for the keys that it sees. Symbols: n layers,
d = heads * head_dim, h the hidden size, V the columns of the head, N' the weights of the layers that a token is
multiplied with, N = N' + hV those of the head too, L new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_dlm.config.tree import ModelConfig
from megatron_dlm.shipped.sampler_plan import plan


def parameter_count(model: ModelConfig, padded_vocab_size: int) -> int:
    """All parameters of the model, with the padded vocabulary; tied matrices count once."""
    embeddings = padded_vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    return embeddings + _non_embedding_parameters(model)


def _non_embedding_parameters(model: ModelConfig) -> int:
    norms = 2 * model.hidden_size + (2 * model.resolved_head_dim if model.qk_norm else 0)
    return _layer_weights(model) + model.num_layers * norms + model.hidden_size


def _layer_weights(model: ModelConfig) -> int:
    """N': of every layer the matrices of queries and output, of keys and values, and the three of SwiGLU."""
    heads = 2 * model.num_attention_heads + 2 * model.resolved_query_groups
    return model.num_layers * model.hidden_size * (heads * model.resolved_head_dim + 3 * model.ffn_hidden_size)


def _attention_width(model: ModelConfig) -> int:
    """n d."""
    return model.num_layers * model.num_attention_heads * model.resolved_head_dim


def _scored_only_weights(model: ModelConfig) -> int:
    """Weights of the last layer that only scored positions need: all but those of keys and values."""
    queries = 2 * model.num_attention_heads * model.resolved_head_dim
    return model.hidden_size * (queries + 3 * model.ffn_hidden_size)


def training_flops(
    model: ModelConfig,
    *,
    tokens: float,
    head_rows: float,
    sequence_length: int,
    vocab_size: int,
    last_layer_rows: bool = False,
) -> float:
    """FLOPs of forward and backward, without recomputation.

    3 x forward of: 2 per non-embedding parameter and token, norms included; attention 4 n d seq per token (half of it
    when causal); the LM head on the rows and columns that are computed. Queries with which the last layer pads
    sequences to equal numbers of them do not count.

    Args:
        tokens: that go through the layers.
        head_rows: tokens that are scored.
        vocab_size: columns of the head; those that only pad the vocabulary are never computed.
        last_layer_rows: whether the last layer leaves out what is not scored, but for keys, values and norms.
    """
    attention = 4.0 * sequence_length * _attention_width(model)
    if model.kind.causal:
        attention /= 2
    body = (2.0 * _non_embedding_parameters(model) + attention) * tokens
    if last_layer_rows:
        body -= (2.0 * _scored_only_weights(model) + attention / model.num_layers) * (tokens - head_rows)
    return 3.0 * (body + 2.0 * model.hidden_size * vocab_size * head_rows)


def forward_flops(
    model: ModelConfig,
    vocab_size: int,
    lengths: Sequence[int],
    *,
    head_rows: Sequence[int],
    last_layer_rows: bool = False,
) -> int:
    """FLOPs of one forward of a bidirectional batch: 2 N' T B + 4 n d (sum of squared lengths) + 2 h V R.

    T is the longest length, to which the B rows are padded, R the rows of the head. With ``last_layer_rows`` the last
    layer has queries, output projection and SwiGLU for the R rows only, and attends with as many queries of every
    sequence as the head has of any, of its length at most.

    Args:
        vocab_size: V, the columns of the head: ``ModelConfig.padded_vocab_size`` for a checkpoint's model; an export's
            has no padding.
        lengths: real tokens of every row; padding goes through the layers, but no attention is computed for it.
        head_rows: positions of every row whose logits are asked for.
        last_layer_rows: see above; not so in an export, and on a GPU only for one sequence at a time.
    """
    body = 2 * _layer_weights(model) * len(lengths) * max(lengths)
    attention = 4 * _attention_width(model) * sum(length**2 for length in lengths)
    if last_layer_rows:
        body -= 2 * _scored_only_weights(model) * (len(lengths) * max(lengths) - sum(head_rows))
        width = model.num_attention_heads * model.resolved_head_dim
        attention -= 4 * width * sum(length * (length - min(length, max(head_rows))) for length in lengths)
    return body + attention + 2 * model.hidden_size * vocab_size * sum(head_rows)


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
    weights, width = _layer_weights(model), _attention_width(model)
    body = sum(2 * weights * tokens + 2 * width * tokens * (tokens + 1) for tokens in read)
    return body + 2 * model.hidden_size * vocab_size * new_tokens


class PublishedConvention(NamedTuple):
    """The comparison of "Diffusion Language Models are Super Data Learners": no prompt, and a DLM without a cache.

    A forward of T tokens costs 2 N T + 4 n d T^2 FLOPs: the LM head runs on every token of every step.
    """

    parameters: int
    """N; not the embedding, which is looked up (a tied one counts once, as the head), and no norms."""
    attention_width: int
    """n d."""

    @staticmethod
    def of(model: ModelConfig, vocab_size: int) -> PublishedConvention:
        """The convention for a model of ours."""
        return PublishedConvention(_layer_weights(model) + model.hidden_size * vocab_size, _attention_width(model))

    def autoregressive(self, tokens: int) -> int:
        """With a KV cache: 2 N L + 2 n d L (L + 1) FLOPs. Every token is read once, and sees the keys up to its own."""
        return 2 * self.parameters * tokens + 2 * self.attention_width * tokens * (tokens + 1)

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
        return sum(2 * self.parameters * length + 4 * self.attention_width * length**2 for length in read)

    def ratio(self, tokens: int, *, steps: int | None = None, block_length: int | None = None) -> float:
        """FLOPs of diffusion over those of autoregressive: (2 N L^2 + 4 n d L^3) / (2 N L + 2 n d L (L + 1)) with
        L steps. The arguments are those of ``diffusion``."""
        return self.diffusion(tokens, steps=steps, block_length=block_length) / self.autoregressive(tokens)
