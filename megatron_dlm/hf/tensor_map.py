"""Which tensor of Hugging Face's Qwen3 and Llama layout is which part of a checkpoint's tensors.

Ours are megatron's: queries, keys and values of a group of heads together (``linear_qkv``), gate and up projection
together (``linear_fc1``), norms named after the projection that follows them. The vocabulary is padded in ours only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dlm.config.tree import ModelConfig

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
EMBEDDING_HF, HEAD_HF = "model.embed_tokens.weight", "lm_head.weight"


class Part(NamedTuple):
    """A tensor of the Hugging Face layout, a part of one of ours."""

    name: str
    shape: tuple[int, ...]
    take: Callable[[Tensor], Tensor]
    """From our whole tensor, a contiguous tensor of ``shape``."""

    @property
    def numel(self) -> int:
        """Its elements."""
        return math.prod(self.shape)


class Whole(NamedTuple):
    """One tensor of a checkpoint and what it is made of."""

    key: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    join: Callable[[Sequence[Tensor]], Tensor]
    """The inverse: from the parts in order to our whole tensor. Padding of the vocabulary is zero."""

    @property
    def numel(self) -> int:
        """Its elements, padding included."""
        return math.prod(self.shape)


def weight_map(model: ModelConfig, vocab_size: int) -> list[Whole]:
    """All tensors of a model, in the order of its layers.

    Args:
        model: the `model` section of a configuration.
        vocab_size: ids that exist, [MASK] included; rows beyond are padding, which Hugging Face's layout lacks.
    """
    hidden, ffn, dim = model.hidden_size, model.ffn_hidden_size, model.resolved_head_dim
    # In the order in which a model is read through, which is that of the export's files.
    maps = [_vocabulary(EMBEDDING, EMBEDDING_HF, model, vocab_size)]
    for layer in range(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        attention, mlp = f"{ours}.self_attention", f"{ours}.mlp"
        maps.append(_same(f"{attention}.linear_qkv.layer_norm_weight", f"{theirs}.input_layernorm.weight", (hidden,)))
        maps.append(_query_key_value(f"{attention}.linear_qkv.weight", f"{theirs}.self_attn", model))
        if model.qk_norm:
            for name in "qk":
                maps.append(
                    _same(f"{attention}.{name}_layernorm.weight", f"{theirs}.self_attn.{name}_norm.weight", (dim,))
                )
        maps.append(
            _same(
                f"{attention}.linear_proj.weight",
                f"{theirs}.self_attn.o_proj.weight",
                (hidden, model.num_attention_heads * dim),
            )
        )
        maps.append(
            _same(f"{mlp}.linear_fc1.layer_norm_weight", f"{theirs}.post_attention_layernorm.weight", (hidden,))
        )
        maps.append(_gate_up(f"{mlp}.linear_fc1.weight", f"{theirs}.mlp", ffn, hidden))
        maps.append(_same(f"{mlp}.linear_fc2.weight", f"{theirs}.mlp.down_proj.weight", (hidden, ffn)))
    maps.append(_same("decoder.final_layernorm.weight", "model.norm.weight", (hidden,)))
    # Tied, the head is the embedding and is stored once in either layout.
    if not model.tie_embeddings:
        maps.append(_vocabulary(HEAD, HEAD_HF, model, vocab_size))
    return maps


def _same(key: str, name: str, shape: tuple[int, ...]) -> Whole:
    return Whole(key, shape, (Part(name, shape, torch.Tensor.contiguous),), lambda parts: parts[0])


def _vocabulary(key: str, name: str, model: ModelConfig, vocab_size: int) -> Whole:
    rows, hidden = model.padded_vocab_size(vocab_size), model.hidden_size

    def join(parts: Sequence[Tensor]) -> Tensor:
        # Padding rows get no probability and no gradient, so that zeros do.
        return torch.cat((parts[0], parts[0].new_zeros(rows - vocab_size, hidden)))

    return Whole(key, (rows, hidden), (Part(name, (vocab_size, hidden), lambda whole: whole[:vocab_size]),), join)


def _gate_up(key: str, prefix: str, ffn: int, hidden: int) -> Whole:
    """SwiGLU's two inputs: the gate's rows first, then the other's."""
    gate = Part(f"{prefix}.gate_proj.weight", (ffn, hidden), lambda whole: whole[:ffn])
    up = Part(f"{prefix}.up_proj.weight", (ffn, hidden), lambda whole: whole[ffn:])
    return Whole(key, (2 * ffn, hidden), (gate, up), lambda parts: torch.cat(list(parts)))


def _query_key_value(key: str, prefix: str, model: ModelConfig) -> Whole:
    """Rows of every query group: its heads' queries, then its key, then its value.

    For two groups of two heads, in blocks of `head_dim` rows: ours is q0 q1 k0 v0 | q2 q3 k1 v1, theirs are
    q0 q1 q2 q3, k0 k1 and v0 v1.
    """
    hidden, dim, groups = model.hidden_size, model.resolved_head_dim, model.resolved_query_groups
    heads = model.num_attention_heads // groups  # of one group

    def split(first: int, last: int) -> Callable[[Tensor], Tensor]:
        def take(whole: Tensor) -> Tensor:
            # [groups, blocks of a group, head_dim, hidden]: the same blocks of every group, one group after the other.
            return whole.view(groups, heads + 2, dim, hidden)[:, first:last].reshape(-1, hidden)

        return take

    def join(parts: Sequence[Tensor]) -> Tensor:
        # Each part in its groups, [groups, its blocks of a group, head_dim, hidden]; then side by side in every group.
        return torch.cat([part.view(groups, -1, dim, hidden) for part in parts], dim=1).view(-1, hidden)

    # Of the `heads + 2` blocks of a group, where each part's begin and how many they are.
    parts = tuple(
        Part(f"{prefix}.{name}_proj.weight", (groups * count * dim, hidden), split(first, first + count))
        for name, first, count in (("q", 0, heads), ("k", heads, 1), ("v", heads + 1, 1))
    )
    return Whole(key, (groups * (heads + 2) * dim, hidden), parts, join)
