"""The last layer on scored positions is the whole layer at those positions, with the same gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dlm.model import last_layer, layer_spec
from megatron_dlm.model.transformer import DiffusionTransformer, build_model
from megatron_dlm.parallel.topology import initialize
from tests.runs import tiny_config

SEQ, VOCAB = 32, 260


def pair(data: Path, **model: Any) -> tuple[DiffusionTransformer, DiffusionTransformer]:
    """The same fp64 model, which computes the last layer at the scored positions, and at all."""
    chunks = []
    for rows in ("scored", "all"):
        config = tiny_config(data, model=model, kernels={"last_layer_rows": rows})
        chunks += build_model(config, initialize(config.parallel), vocab_size=VOCAB)
    for chunk in chunks:
        chunk.double()
    assert [chunk.last_layer_rows for chunk in chunks] == [True, False]
    assert list(chunks[0].state_dict()) == list(chunks[1].state_dict())
    return chunks[0], chunks[1]


def make_batch(size: int, lengths: list[int] | None, masks: list[int], padding: int) -> Any:
    """Distinct numbers of masked tokens for each sequence, with a padded list of rows."""
    from megatron_dlm.diffusion.objective import Batch

    generator = torch.Generator().manual_seed(size)
    rows = [
        i * SEQ + torch.randperm(lengths[i] if lengths else SEQ, generator=generator)[:count].sort().values
        for i, count in enumerate(masks)
    ]
    found = torch.cat([*rows, torch.full((padding,), size * SEQ)])
    return Batch(
        inputs=torch.randint(VOCAB, (size, SEQ), generator=generator),
        rows=found,
        targets=torch.randint(VOCAB, found.shape, generator=generator),
        weights=torch.rand(found.shape, generator=generator) * (found < size * SEQ),
        sample_index=(found // SEQ).clamp(max=size - 1),
        num_eligible=size * SEQ,
        divisor=torch.tensor(size * SEQ),
        lengths=None if lengths is None else torch.tensor(lengths),
    )


@pytest.mark.parametrize(
    "case",
    [
        dict(size=3, masks=[7, 31, 1]),
        dict(size=3, masks=[32, 0, 5], padding=20),
        dict(size=3, masks=[4, 3, 32], lengths=[9, 3, 32], padding=1),
        dict(size=3, masks=[4, 3, 7], lengths=[9, 3, 32], padding=9, as_on_gpu=True),
        dict(size=1, masks=[11], padding=3),
        dict(size=1, masks=[5], lengths=[5]),
        dict(size=2, masks=[0, 0]),
    ],
    ids=lambda case: " ".join(f"{key}={value}".replace(" ", "") for key, value in case.items()),
)
@pytest.mark.parametrize("model", [{}, {"qk_norm": False, "num_query_groups": 4, "tie_embeddings": True}], ids=str)
def test_loss_and_gradients_are_those_of_the_whole_layer(
    model: dict[str, Any], case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = {"lengths": None, "padding": 0, **case}
    if case.pop("as_on_gpu", False):
        monkeypatch.setattr(last_layer, "_most_queries", lambda numbers, limit: limit)
    batch = make_batch(**case)
    results = []
    for chunk in pair(tmp_path, **model):
        loss, entropy, correct = chunk(batch.inputs, batch.lengths, batch)
        loss.backward()
        results.append((loss, entropy, correct, {name: p.grad for name, p in chunk.named_parameters()}))
    (loss, entropy, correct, gradients), (whole_loss, whole_entropy, whole_correct, whole) = results
    torch.testing.assert_close(loss, whole_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(entropy, whole_entropy, rtol=1e-12, atol=1e-12)
    assert torch.equal(correct, whole_correct)
    for name, gradient in whole.items():
        assert (gradients[name] - gradient).norm() <= 1e-12 * gradient.norm(), name


@torch.no_grad()
def test_logits_and_hidden_states_are_those_of_the_whole_layer(tmp_path: Path) -> None:
    """Padding behind short sequences included, which a sampler has."""
    scored, every = pair(tmp_path)
    batch = make_batch(3, [9, 3, 32], [4, 3, 32], 0)
    seen: list[int] = []
    scored.decoder.layers[-1].mlp.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    logits, whole = (chunk(batch.inputs, batch.lengths, rows=batch.rows) for chunk in (scored, every))
    torch.testing.assert_close(logits, whole, rtol=1e-12, atol=1e-12)
    assert seen == [39], "the MLP of the last layer sees the rows only"
    torch.testing.assert_close(scored(batch.inputs), every(batch.inputs), rtol=0, atol=0)


@pytest.mark.parametrize(
    "model", [{"attention_dropout": 0.1}, {"hidden_dropout": 0.1}, {"objective": "autoregressive"}]
)
def test_it_is_off_where_all_positions_are_needed(model: dict[str, Any], tmp_path: Path) -> None:
    (chunk,) = build_model(tiny_config(tmp_path, model=model), initialize(tiny_config(tmp_path).parallel), vocab_size=9)
    assert type(chunk.decoder.layers[-1]) is type(chunk.decoder.layers[0])


def test_transformer_engine_s_layers_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path)
    assert layer_spec.last_layer_takes_rows(config)
    monkeypatch.setattr(layer_spec, "uses_transformer_engine", lambda: True)
    assert not layer_spec.last_layer_takes_rows(config)
