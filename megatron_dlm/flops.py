"""FLOPs and parameters of a model, from its configuration alone."""

from __future__ import annotations

from megatron_dlm.config.tree import ModelConfig


def parameter_count(model: ModelConfig, padded_vocab_size: int) -> int:
    """All parameters of the model, with the padded vocabulary; tied matrices count once."""
    embeddings = padded_vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    return embeddings + _non_embedding_parameters(model)


def _non_embedding_parameters(model: ModelConfig) -> int:
    hidden, dim = model.hidden_size, model.resolved_head_dim
    attention = hidden * dim * (2 * model.num_attention_heads + 2 * model.resolved_query_groups)
    norms = 2 * hidden + (2 * dim if model.qk_norm else 0)
    return model.num_layers * (attention + 3 * hidden * model.ffn_hidden_size + norms) + hidden


def training_flops(
    model: ModelConfig, *, tokens: float, head_rows: float, sequence_length: int, vocab_size: int
) -> float:
    """FLOPs of forward and backward, without recomputation.

    3 x forward of: 2 per non-embedding parameter and token; attention 4 * seq * heads * head_dim per token and
    layer (half of it when causal); the LM head on the rows and columns that are computed.

    Args:
        tokens: that go through the layers.
        head_rows: tokens that are scored.
        vocab_size: columns of the head; those that only pad the vocabulary are never computed.
    """
    width = model.num_attention_heads * model.resolved_head_dim
    attention = 4.0 * sequence_length * width * model.num_layers
    if model.kind.causal:
        attention /= 2
    body = (2.0 * _non_embedding_parameters(model) + attention) * tokens
    return 3.0 * (body + 2.0 * model.hidden_size * vocab_size * head_rows)
