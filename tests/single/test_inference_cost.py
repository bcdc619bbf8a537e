"""FLOPs of generating text: the published numbers, and what torch counts while our sampler runs, to the last one."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_dlm.config.tree import ModelConfig
from megatron_dlm.costs.inference import LENGTHS, Row, inference_costs, sampler_flops
from megatron_dlm.data.tokenizer import ByteTokenizer
from megatron_dlm.flops import PublishedConvention, autoregressive_flops, forward_flops, parameter_count
from megatron_dlm.generation.denoiser import Denoiser
from megatron_dlm.model.transformer import build_model
from megatron_dlm.parallel.topology import initialize
from megatron_dlm.shipped.sampler import next_token, sample
from megatron_dlm.shipped.sampler_plan import SamplerOptions, Vocabulary
from tests.runs import tiny_config

PAPER_1B = ModelConfig(
    num_layers=26, hidden_size=1792, num_attention_heads=14, ffn_hidden_size=4736, qk_norm=False, tie_embeddings=True
)
VOCAB, MASK, END = 258, 257, 256
IDS = Vocabulary(MASK)
SMALL: dict[str, Any] = {"num_layers": 2, "head_dim": 24, "hidden_size": 32}


def counted(run: Any) -> int:
    """FLOPs that torch counts; of attention on a CPU it counts those of the MATH backend only."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run()
    return counter.get_total_flops()


def small_denoiser(**model: Any) -> tuple[Denoiser, ModelConfig, int]:
    """A random model, its configuration, and the columns of its head."""
    config = tiny_config(Path("data"), model={**SMALL, **model})
    topology = initialize(config.parallel)
    chunks = build_model(config, topology, vocab_size=VOCAB)
    return Denoiser(chunks, topology), config.model, config.model.padded_vocab_size(VOCAB)


def test_published_ratios() -> None:
    published = PublishedConvention(parameters=1_092_000_000, attention_width=26 * 1792)
    ratios = [published.ratio(tokens) for tokens in LENGTHS]
    assert [round(ratio, 1) for ratio in ratios[:4]] == [16.0, 64.2, 258.8, 1066.8] and round(ratios[4]) == 4705
    by_hand = 2 * 1.092e9 * 64**2 + 4 * 26 * 1792 * 64**3
    assert published.diffusion(64) == by_hand
    assert published.autoregressive(64) == 2 * 1.092e9 * 64 + 2 * 26 * 1792 * 64 * 65


def test_published_ratios_of_the_study_s_1b_model() -> None:
    costs = inference_costs(PAPER_1B, 50257)
    ratios = costs.published[1].ratio
    assert (round(ratios[0], 1), round(ratios[4])) == (16.0, 4708)
    weights = PublishedConvention.of(PAPER_1B, 50257).parameters
    norms = 26 * 2 * 1792 + 1792
    assert weights == parameter_count(PAPER_1B, 50257) - norms
    untied = replace(PAPER_1B, tie_embeddings=False)
    assert weights == PublishedConvention.of(untied, 50257).parameters, "an embedding costs nothing"


def test_fewer_steps_and_growing_blocks_cost_what_their_forwards_do() -> None:
    published = PublishedConvention(parameters=1000, attention_width=2 * 8)

    def forward(tokens: int) -> int:
        return 2 * 1000 * tokens + 4 * 2 * 8 * tokens**2

    assert published.diffusion(64, steps=16) == 16 * forward(64)
    assert published.diffusion(64, block_length=24) == 24 * forward(24) + 24 * forward(48) + 16 * forward(64)
    assert published.diffusion(64, steps=7, block_length=24) == 3 * forward(24) + 3 * forward(48) + forward(64)
    assert published.diffusion(8, steps=99) == 8 * forward(8), "a step fills in one token at least"
    with pytest.raises(ValueError, match=r"steps \(2\) must be at least the number of blocks \(3\)"):
        published.diffusion(64, steps=2, block_length=24)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize(("steps", "block_length"), product((None, 5), (None, 3)))
def test_the_sampler_costs_what_torch_counts(steps: int | None, block_length: int | None, groups: int) -> None:
    """Prompts of several lengths, one with masks in it: rows are padded, and are dropped when they are finished."""
    denoiser, model, columns = small_denoiser(num_query_groups=groups, tie_embeddings=groups == 4)
    prompts = [[1, 2, 3], [4, MASK, 5, MASK, MASK, 6], [7] * 9]
    rows = [Row(3 + 8, 8), Row(6 + 8, 3 + 8), Row(9 + 8, 8)]
    options = SamplerOptions(steps=steps, block_length=block_length)
    flops = counted(lambda: sample(denoiser, prompts, options, vocabulary=IDS, max_new_tokens=8))
    settings: dict[str, Any] = {"steps": steps, "block_length": block_length}
    assert flops == sampler_flops(model, columns, rows, **settings, last_layer_rows=True)
    assert (
        flops
        < sampler_flops(model, columns, rows, **settings)
        < sampler_flops(model, columns, [Row(17, 11)] * 3, **settings)
    )


def test_every_forward_of_the_sampler_is_counted() -> None:
    """Blocks that differ in length do not share steps equally; the model here does nothing but count."""
    model = ModelConfig(num_layers=3, hidden_size=8, num_attention_heads=2, ffn_hidden_size=5)
    spent: list[int] = []

    def denoise(tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        sizes = [tokens.shape[1]] * len(tokens) if lengths is None else lengths.tolist()
        spent.append(forward_flops(model, 6, sizes, head_rows=torch.bincount(rows // tokens.shape[1]).tolist()))
        return torch.zeros(len(rows), 6)

    for new, steps, block_length in [(40, 20, 32), (100, 50, 32), *product((5, 33), (None, 7, 90), (None, 8, 32))]:
        prompts = [[1] * 9, [2, 5, 2, 5], [3]]  # 5 is the mask
        rows = [Row(9 + new, new), Row(4 + new, 2 + new), Row(1 + new, new)]
        options = SamplerOptions(steps=steps, block_length=block_length)
        spent.clear()
        sample(denoise, prompts, options, vocabulary=Vocabulary(5), max_new_tokens=new)
        assert sum(spent) == sampler_flops(model, 6, rows, steps=steps, block_length=block_length)


def test_guidance_costs_twice_as_much() -> None:
    denoiser, model, columns = small_denoiser()
    options = SamplerOptions(steps=4, guidance=1.5)
    flops = counted(lambda: sample(denoiser, [[1, 2], [3]], options, vocabulary=IDS, max_new_tokens=9))
    settings: dict[str, Any] = {"steps": 4, "last_layer_rows": True}
    plain = sampler_flops(model, columns, [Row(11, 9), Row(10, 9)], **settings)
    assert flops == sampler_flops(model, columns, [Row(11, 9), Row(10, 9)], **settings, guidance=True) == 2 * plain


def test_a_row_that_has_ended_costs_nothing_more() -> None:
    denoiser, model, columns = small_denoiser()
    calls = []

    def ends_the_first(tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        logits = denoiser(tokens, lengths, rows)
        calls.append(len(tokens))
        logits[:, END] = -1e9
        if len(calls) == 3:
            logits[0, END] = 1e9
        return logits

    options = SamplerOptions(block_length=1)
    arguments: dict[str, Any] = {"vocabulary": Vocabulary(MASK, END), "max_new_tokens": 6}
    flops = counted(lambda: sample(ends_the_first, [[1] * 9, [2]], options, **arguments))
    assert calls == [2, 2, 2, 1, 1, 1]
    rows = [Row(15, 6, finished_after=3), Row(7, 6)]
    assert flops == sampler_flops(model, columns, rows, block_length=1, last_layer_rows=True)


def test_an_export_costs_the_same_without_padded_columns() -> None:
    from megatron_dlm.shipped.configuration_dlm import DLMConfig
    from megatron_dlm.shipped.modeling_dlm import DLMForMaskedDiffusion

    model = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48)
    export = DLMForMaskedDiffusion(DLMConfig(**hugging_face(model), qk_norm=True, mask_token_id=MASK)).eval()
    options = SamplerOptions(steps=6, block_length=4)
    flops = counted(lambda: sample(export.denoise, [[1, 2, 3]] * 2, options, vocabulary=IDS, max_new_tokens=10))
    assert flops - 6 * rotary(export, tokens=13) == sampler_flops(
        model, VOCAB, [Row(13, 10)] * 2, steps=6, block_length=4
    )


def rotary(model: Any, *, tokens: int) -> int:
    """Some versions of transformers multiply positions and frequencies as matrices, once for a batch and all layers."""
    return counted(lambda: model.model.rotary_emb(torch.zeros(1), torch.arange(tokens)[None]))


def hugging_face(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.resolved_query_groups,
        "head_dim": model.resolved_head_dim,
        "bos_token_id": END,
    }


def masked_half(model: ModelConfig, tokens: int) -> int:
    """FLOPs of causal attention that torch's MATH backend spends on keys that are masked; fused kernels skip them."""
    return 4 * model.num_layers * model.num_attention_heads * model.resolved_head_dim * (tokens * (tokens - 1) // 2)


@pytest.mark.parametrize("prompt_tokens", [0, 7])
def test_autoregressive_with_a_cache_costs_what_torch_counts(prompt_tokens: int) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megatron_dlm.generation.from_hugging_face import cached_generation

    model = ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, head_dim=24, ffn_hidden_size=48
    )
    qwen = Qwen3ForCausalLM(Qwen3Config(**hugging_face(model))).eval()
    generate = cached_generation(qwen)
    arguments: dict[str, Any] = {"max_new_tokens": 9, "vocabulary": ByteTokenizer().vocabulary.forbidding([END])}
    flops = counted(lambda: generate([[5] * prompt_tokens], SamplerOptions(), **arguments))
    more = rotary(qwen, tokens=prompt_tokens + 9) + masked_half(model, prompt_tokens + 1)
    assert flops - more == autoregressive_flops(model, VOCAB, prompt_tokens=prompt_tokens, new_tokens=9)


def test_autoregressive_without_a_cache_costs_what_torch_counts() -> None:
    denoiser, model, columns = small_denoiser(objective="autoregressive")
    options = SamplerOptions(block_length=1)
    flops = counted(lambda: sample(next_token(denoiser, END), [[1, 2, 3]], options, vocabulary=IDS, max_new_tokens=6))
    more = sum(masked_half(model, 3 + new) for new in range(1, 7))
    formula = autoregressive_flops(model, columns, prompt_tokens=3, new_tokens=6, cached=False)
    assert flops - more == formula


def test_ours_and_the_published_convention_meet() -> None:
    """Without a prompt AR is the same; in L steps a DLM has the head on L (L + 1) / 2 rows, not on L * L."""
    published = PublishedConvention.of(PAPER_1B, 50257)
    head = 2 * PAPER_1B.hidden_size * 50257
    for tokens in LENGTHS[:4]:
        ours = autoregressive_flops(PAPER_1B, 50257, prompt_tokens=0, new_tokens=tokens)
        assert ours == published.autoregressive(tokens)
        saved = head * (tokens * tokens - tokens * (tokens + 1) // 2)
        assert sampler_flops(PAPER_1B, 50257, [Row(tokens, tokens)]) == published.diffusion(tokens) - saved
    every_row = forward_flops(PAPER_1B, 50257, [64], head_rows=[64])
    assert 16 * every_row == published.diffusion(64, steps=16)


def test_a_text_that_grows_is_sampled_block_by_block() -> None:
    """The published convention's growing text is what repeated calls of our sampler cost, but for the head."""
    grown = sum(sampler_flops(PAPER_1B, 0, [Row(length, 32)], steps=8) for length in (32, 64, 96))
    assert grown == PublishedConvention.of(PAPER_1B, 0).diffusion(96, steps=24, block_length=32)


def test_costs_of_a_prompt_and_their_order() -> None:
    plain, prompted = (inference_costs(PAPER_1B, 50257, prompt_tokens=count, lengths=[64, 256]) for count in (0, 500))
    assert plain.published == prompted.published
    names = [curve.name for curve in prompted.sampler]
    assert names == [
        "AR, KV cache",
        "DLM, L steps",
        "DLM, L/4 steps",
        "DLM, 32 steps",
        "DLM, L steps, blocks of 32",
        "DLM, L/4 steps, blocks of 32",
        "AR, recomputed",
    ]
    for before, after in zip(plain.sampler, prompted.sampler, strict=True):
        assert all(b < a for b, a in zip(before.flops, after.flops, strict=True)), before.name
    cached, all_steps, quarter = (curve.flops[1] for curve in prompted.sampler[:3])
    assert prompted.sampler[1].ratio[1] == all_steps / cached
    assert all_steps == sampler_flops(PAPER_1B, 50257, [Row(756, 256)])
    assert quarter == sampler_flops(PAPER_1B, 50257, [Row(756, 256)], steps=64)
    in_blocks = sampler_flops(PAPER_1B, 50304, [Row(756, 256)], steps=64, block_length=32)
    padded = inference_costs(PAPER_1B, 50257, head_columns=50304, prompt_tokens=500, lengths=[256])
    assert padded.sampler[5].flops == [in_blocks] and padded.published[0].flops == plain.published[0].flops[1:]
