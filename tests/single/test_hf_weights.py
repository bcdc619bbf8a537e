"""The map between a checkpoint's tensors and Hugging Face's: nothing is lost, and every row is where it belongs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_dlm.config.tree import ModelConfig
from megatron_dlm.hf.tensor_map import weight_map

VOCABULARY = 70
SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 24, "ffn_hidden_size": 20, "vocab_size_multiple": 32}
VARIANTS: dict[str, dict[str, Any]] = {
    "every head its own keys": {"num_attention_heads": 4},
    "grouped queries": {"num_attention_heads": 4, "num_query_groups": 2},
    "one group, wide heads": {"num_attention_heads": 3, "num_query_groups": 1, "head_dim": 10},
    "tied, no norm of queries": {"num_attention_heads": 2, "tie_embeddings": True, "qk_norm": False},
}


@pytest.fixture(params=VARIANTS, ids=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> ModelConfig:
    return ModelConfig(**SIZES, **VARIANTS[request.param])


def whole_tensors(model: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {w.key: torch.randn(w.shape, generator=generator) for w in weight_map(model, VOCABULARY)}


def test_parts_have_their_shapes_and_join_to_the_whole(model: ModelConfig) -> None:
    tensors = whole_tensors(model)
    for whole in weight_map(model, VOCABULARY):
        tensor = tensors[whole.key]
        parts = [part.take(tensor) for part in whole.parts]
        for part, taken in zip(whole.parts, parts, strict=True):
            assert tuple(taken.shape) == part.shape and taken.is_contiguous(), part.name
        joined = whole.join(parts)
        assert tuple(joined.shape) == whole.shape
        if whole.key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert torch.equal(joined[:VOCABULARY], tensor[:VOCABULARY]) and not joined[VOCABULARY:].any()
            assert whole.shape[0] == 96
        else:
            assert torch.equal(joined, tensor), whole.key
            assert sum(part.numel() for part in parts) == tensor.numel()


def test_the_names_and_shapes_are_those_of_transformers(model: ModelConfig) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    settings, kind = (Qwen3Config, Qwen3ForCausalLM) if model.qk_norm else (LlamaConfig, LlamaForCausalLM)
    theirs = kind(
        settings(
            vocab_size=VOCABULARY,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.resolved_query_groups,
            head_dim=model.resolved_head_dim,
            tie_word_embeddings=model.tie_embeddings,
        )
    )
    expected = {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
    assert {part.name: part.shape for w in weight_map(model, VOCABULARY) for part in w.parts} == expected


def test_rows_of_every_group_are_its_queries_then_its_key_and_value() -> None:
    model = ModelConfig(**SIZES, num_attention_heads=4, num_query_groups=2)
    tensors, dim = whole_tensors(model), 6
    split = {p.name: p.take(tensors[w.key]) for w in weight_map(model, VOCABULARY) for p in w.parts}
    qkv = tensors["decoder.layers.1.self_attention.linear_qkv.weight"].split(dim)  # q0 q1 k0 v0 q2 q3 k1 v1
    for name, heads in (("q", (0, 1, 4, 5)), ("k", (2, 6)), ("v", (3, 7))):
        taken = split[f"model.layers.1.self_attn.{name}_proj.weight"]
        assert torch.equal(taken, torch.cat([qkv[head] for head in heads]))
    gate, up = tensors["decoder.layers.0.mlp.linear_fc1.weight"].split(model.ffn_hidden_size)
    assert torch.equal(split["model.layers.0.mlp.gate_proj.weight"], gate)
    assert torch.equal(split["model.layers.0.mlp.up_proj.weight"], up)
