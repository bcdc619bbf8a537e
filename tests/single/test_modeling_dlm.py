"""The model class of exports: what it computes, its loss, its generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from megatron_dlm.config.tree import DiffusionConfig
from megatron_dlm.diffusion.objective import MaskedDiffusion
from megatron_dlm.shipped.configuration_dlm import DLMConfig
from megatron_dlm.shipped.modeling_dlm import DLMForMaskedDiffusion
from megatron_dlm.shipped.sampler import sample
from megatron_dlm.shipped.sampler_plan import SamplerOptions, Vocabulary

VOCAB, END, MASK = 50, 48, 49
SHAPES = [{"qk_norm": True}, {"qk_norm": False, "num_key_value_heads": 4}, {"tie_word_embeddings": True}]


def build(**changes: Any) -> DLMForMaskedDiffusion:
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,  # far from uniform predictions
        "mask_token_id": MASK,
        "eos_token_id": END,
        "pad_token_id": END,
    }
    model = DLMForMaskedDiffusion(DLMConfig(**shape | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    return model


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, END, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_token_sees_every_other(shape: dict, attention: str) -> None:
    model, x = build(attn_implementation=attention, **shape), tokens(2, 9)
    logits = model(x).logits
    for changed in (0, 8):
        other = x.clone()
        other[:, changed] = (other[:, changed] + 1) % END
        assert ((model(other).logits - logits).abs().amax((0, 2)) > 1e-3).all()
    reference = build(attn_implementation="eager", **shape)
    assert (reference(x).logits - logits).abs().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("left", [0, 3, 5])
def test_padding_is_not_attended_on_either_side(shape: dict, left: int) -> None:
    model, x = build(**shape), tokens(2, 9)
    padded = torch.full((2, 14), 7)
    padded[:, left : left + 9] = x
    mask = torch.zeros(2, 14, dtype=torch.long)
    mask[:, left : left + 9] = 1
    difference = model(padded, attention_mask=mask).logits[:, left : left + 9] - model(x).logits
    assert difference.abs().max() < 1e-5
    assert torch.isfinite(model(padded, attention_mask=mask).logits).all()


def test_logits_of_some_positions() -> None:
    model, x = build(), tokens(3, 7)
    rows = torch.tensor([0, 6, 7, 20])
    assert (model(x, rows=rows).logits - model(x).logits.flatten(0, 1)[rows]).abs().max() < 1e-5
    lengths = torch.tensor([7, 4, 5])
    alone = torch.stack([model(x[i : i + 1, :n]).logits[0, n - 1] for i, n in enumerate(lengths.tolist())])
    assert (model.denoise(x, lengths, torch.tensor([6, 10, 18])) - alone).abs().max() < 1e-5


@pytest.mark.parametrize("shorten", [0.0, 1.0])
def test_the_loss_is_that_of_training(shorten: float) -> None:
    model, x, ids = build(), tokens(6, 16), np.arange(6)
    objective = MaskedDiffusion(
        DiffusionConfig(random_length_probability=shorten),
        seed=3,
        vocabulary=Vocabulary(MASK, END),
        sequence_length=16,
    )
    batch = objective.batch(x, ids, step=0, global_batch_size=6)
    lengths = torch.full((6,), 16) if batch.lengths is None else batch.lengths
    inside = torch.arange(16) < lengths[:, None]
    logits = model(batch.inputs, attention_mask=inside.long()).logits.flatten(0, 1)
    scored = batch.is_scored()
    cross_entropy = torch.nn.functional.cross_entropy(
        logits[batch.rows[scored]], batch.targets[scored], reduction="none"
    )
    expected = (batch.weights[scored] * cross_entropy).sum() / batch.divisor
    found = model(batch.inputs, attention_mask=inside.long(), labels=x.masked_fill(~inside, -100)).loss
    assert abs(float(found / expected) - 1) < 1e-6
    weights = torch.zeros(6 * 16 + 1).index_copy_(0, batch.rows, batch.weights)[: 6 * 16].view(6, 16)
    labels = x.masked_fill(~inside, -100)
    given = model(batch.inputs, attention_mask=inside.long(), labels=labels, loss_weights=weights).loss
    assert abs(float(given / expected) - 1) < 1e-6


def test_clean_inputs_are_noised_as_in_training() -> None:
    model, x = build(), tokens(2000, 6)
    labels = x.clone()
    labels[:, :2] = -100  # a prompt
    labels[7] = -100  # a row without anything to learn
    seen = []
    model.model.register_forward_pre_hook(lambda module, a, kwargs: seen.append(kwargs), with_kwargs=True)
    embedded: list[torch.Tensor] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: embedded.append(inputs[0]))
    generator = torch.Generator().manual_seed(5)
    loss = model(x, labels=labels, generator=generator).loss
    xt = embedded[0]
    masked = xt == MASK
    assert not masked[:, :2].any() and not masked[7].any() and torch.equal(xt[~masked], x[~masked])
    counts = torch.bincount(masked.sum(1), minlength=5)
    assert counts[0] == 1 and ((counts[1:] / 1999 - 0.25).abs() < 0.04).all(), "k is uniform on 1..4"
    assert ((masked[:, 2:].float().mean(0) - 0.625).abs() < 0.04).all(), "no place is preferred"
    again = model(x, labels=labels, generator=torch.Generator().manual_seed(5)).loss
    assert torch.equal(loss, again)
    assert torch.equal(model(xt, labels=labels).loss, loss), "noised tokens are taken as they are"
    mixed = torch.cat((xt[:1], x[1:2]))
    model(mixed, labels=labels[:2])
    assert torch.equal(embedded[-1][0], xt[0]) and (embedded[-1][1] == MASK).any(), "each row by itself"
    halves = [model(xt[i::2], labels=labels[i::2], num_items_in_batch=(labels != -100).sum()).loss for i in range(2)]
    assert abs(float(sum(halves) / loss) - 1) < 1e-5, "accumulated gradients are those of the whole batch"


def test_all_embeddings_learn() -> None:
    model = build()
    x = torch.tensor([[1, END, 3, MASK]])
    model(x, labels=torch.tensor([[1, END, 3, 4]])).loss.backward()
    assert model.model.embed_tokens.weight.grad[END].abs().sum() > 0, "end-of-document is padding too, yet learns"
    with pytest.raises(ValueError, match="leave out rows"):
        model(x, labels=x, rows=torch.tensor([0]))


def test_generate_is_the_sampler() -> None:
    model = build()
    prompts = [[1, 2, 3, 4], [5, MASK]]
    padded = torch.tensor([prompts[0], [END, END, *prompts[1]]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    options = {"steps": 4, "block_length": 4, "temperature": 0.7, "seed": 9}
    expected = sample(
        model.denoise, prompts, SamplerOptions(**options), vocabulary=Vocabulary(MASK, END), max_new_tokens=8
    )
    result = model.generate(padded, attention_mask=mask, max_new_tokens=8, return_dict_in_generate=True, **options)
    assert result.forwards == expected.forwards and result.samples.tokens == expected.tokens
    assert result.sequences[0].tolist() == expected.tokens[0]
    assert result.sequences[1].tolist() == [END, END, *expected.tokens[1]]
    alone = model.generate(torch.tensor([prompts[0]]), max_new_tokens=8, **options)
    assert torch.equal(alone[0], result.sequences[0]), "a padded batch writes what its prompts write alone"
    greedy = {"max_new_tokens": 8, "block_length": 4}
    unpadded = model.generate(torch.tensor([prompts[1]]), **greedy)
    assert torch.equal(model.generate(padded, attention_mask=mask, **greedy)[1, 2:], unpadded[0])
    right = torch.tensor([[5, MASK, END, END], prompts[0]])
    found = model.generate(right, attention_mask=mask.flip(0, 1), **greedy)
    assert torch.equal(found[0, [0, 1, *range(4, 12)]], unpadded[0])


def test_generate_pads_behind_the_end_and_fills_prompts_only() -> None:
    model = build()
    with torch.no_grad():
        model.lm_head.weight[END] = 0
    x = torch.tensor([[1, MASK, 3]])
    filled = model.generate(x)
    assert filled.shape == (1, 3) and filled[0, 0] == 1 and filled[0, 1] != MASK
    logits = model(torch.tensor([[1, 2, MASK, MASK]])).logits[0, 2]
    logits[MASK] = float("-inf")
    best = int(logits.argmax())  # the first token that is written ends the document
    cut = model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, eos_token_id=best, pad_token_id=7, block_length=1)
    assert cut[0].tolist() == [1, 2, best, 7]


def test_generation_settings(tmp_path: Path) -> None:
    model = build()
    model.generation_config = GenerationConfig(
        max_new_tokens=5, steps=2, remasking="entropy", eos_token_id=END, pad_token_id=END, mask_token_id=MASK
    )
    model.save_pretrained(tmp_path)
    loaded = DLMForMaskedDiffusion.from_pretrained(tmp_path)
    x = tokens(2, 4)
    expected = model.generate(x)
    assert expected.shape == (2, 9) and torch.equal(loaded.generate(x), expected)
    assert torch.equal(loaded.generate(input_ids=x, steps=2, remasking="entropy", max_new_tokens=5), expected)
    assert loaded(x).logits.sub(model(x).logits).abs().max() == 0
    assert (loaded.config.mask_token_id, loaded.config.qk_norm, loaded.config.model_type) == (
        MASK,
        True,
        "megatron_dlm",
    )
    other = GenerationConfig(max_new_tokens=5, steps=2, remasking="entropy")
    assert torch.equal(loaded.generate(x, generation_config=other), expected), "the model's end of document stays"
    assert torch.equal(loaded.generate(x, do_sample=False, temperature=0.7, top_k=0, use_cache=True), expected)
    drawn = loaded.generate(x, do_sample=True)
    assert torch.equal(drawn, loaded.generate(x, temperature=1.0)) and not torch.equal(drawn, expected)
    refused = {
        "no argument 'top_k'": {"top_k": 5},
        "no argument 'num_beams'": {"num_beams": 2},
        "steps is 0": {"steps": 0},
        "max_new_tokens is -1": {"max_new_tokens": -1},
        "shape of input_ids": {"attention_mask": torch.ones(1, 2)},
        "1 for tokens and 0": {"attention_mask": torch.full((2, 4), -1.0)},
    }
    for message, wrong in refused.items():
        with pytest.raises(ValueError, match=message):
            loaded.generate(x, **wrong)
    for nothing in ((), (x[0],)):
        with pytest.raises(ValueError, match="needs input_ids"):
            loaded.generate(*nothing)
