"""The denoiser on one process: initial loss, bidirectionality, the loss against full logits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_dlm.diffusion.objective import build_objective
from megatron_dlm.generation.denoiser import Denoiser
from megatron_dlm.model.transformer import DiffusionTransformer, build_model
from megatron_dlm.parallel.topology import initialize
from megatron_dlm.shipped.sampler_plan import Vocabulary
from tests.runs import tiny_config

VOCAB = 250


def model(**sections: dict[str, Any]) -> tuple[DiffusionTransformer, Any]:
    config = tiny_config(Path("data"), **sections)
    topology = initialize(config.parallel)
    (chunk,) = build_model(config, topology, vocab_size=VOCAB)
    return chunk, config


@pytest.mark.parametrize("objective", ["masked_diffusion", "autoregressive"])
def test_initial_loss_is_that_of_small_random_logits(objective: str) -> None:
    """ln V + d * sigma^2 / 2: the final norm makes |hidden|^2 = d, so logits have variance d * sigma^2."""
    hidden, std = 256, 0.05
    chunk, config = model(model={"objective": objective, "hidden_size": hidden, "init_std": std, "head_dim": 16})
    noising = build_objective(config, Vocabulary(VOCAB - 1, VOCAB - 2))
    tokens = torch.randint(0, VOCAB - 2, (64, 32), generator=torch.Generator().manual_seed(3))
    batch = noising.batch(tokens, np.arange(64), step=0, global_batch_size=64)
    loss = float(chunk(batch.inputs, batch.lengths, batch).loss_sum.detach()) / batch.num_eligible
    assert loss == pytest.approx(math.log(VOCAB) + hidden * std**2 / 2, abs=0.12)
    assert abs(loss - math.log(VOCAB)) > 0.15, "the test must tell the formula from ln V"


@pytest.mark.parametrize("objective", ["masked_diffusion", "autoregressive"])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradient_equal_those_of_full_logits(objective: str, tied: bool) -> None:
    chunk, config = model(model={"objective": objective, "tie_embeddings": tied})
    noising = build_objective(config, Vocabulary(VOCAB - 1, VOCAB - 2))
    tokens = torch.randint(0, VOCAB - 2, (4, 32), generator=torch.Generator().manual_seed(3))
    batch = noising.batch(tokens, np.arange(4), step=0, global_batch_size=4)
    losses = chunk(batch.inputs, batch.lengths, batch)
    losses.loss_sum.backward()
    ours = {name: p.grad.clone() for name, p in chunk.named_parameters()}
    chunk.zero_grad()

    logits = chunk(batch.inputs, batch.lengths)[..., :VOCAB].transpose(0, 1).reshape(-1, VOCAB).double()
    rows = slice(None) if batch.rows is None else batch.rows.long()
    cross_entropy = F.cross_entropy(logits[rows], batch.targets, reduction="none")
    loss = (cross_entropy * batch.weights).sum()
    loss.backward()
    assert float(losses.loss_sum.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    torch.testing.assert_close(losses.cross_entropy.double(), cross_entropy.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(losses.correct, logits[rows].argmax(-1) == batch.targets)
    for name, parameter in chunk.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5 * float(parameter.grad.abs().max()))


def influence(chunk: DiffusionTransformer, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """[seq, seq] bool: whether changing input j changes the output at i."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (1, 8), generator=generator)
    chunk.eval()
    with torch.no_grad():
        base = chunk(tokens, lengths)[:, 0]
        changed = torch.zeros(8, 8, dtype=torch.bool)
        for j in range(8):
            other = tokens.clone()
            other[0, j] = (other[0, j] + 1) % VOCAB
            changed[:, j] = (chunk(other, lengths)[:, 0] != base).any(-1)
    return changed


def test_every_token_sees_every_token_in_diffusion_and_the_past_in_the_causal_arm() -> None:
    assert influence(model()[0]).all()
    assert torch.equal(influence(model(model={"objective": "autoregressive"})[0]), torch.ones(8, 8).tril().bool())
    short = influence(model()[0], torch.tensor([5]))
    assert short[:5, :5].all() and not short[:5, 5:].any()


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    first, again = model()[0].state_dict(), model()[0].state_dict()
    other = model(run={"seed": 8})[0].state_dict()
    matrices = [name for name, value in first.items() if torch.is_tensor(value) and value.ndim == 2]
    assert len(matrices) == 2 + 4 * 4
    for name in matrices:
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    residual, plain = first["decoder.layers.0.mlp.linear_fc2.weight"], first["decoder.layers.0.mlp.linear_fc1.weight"]
    assert float(plain.std()) == pytest.approx(0.02, rel=0.05)
    assert float(residual.std()) == pytest.approx(0.02 / 8**0.5, rel=0.05)


def test_denoiser_gives_whole_logits_without_padded_columns() -> None:
    chunk, config = model()
    tokens = torch.randint(0, VOCAB, (3, 16), generator=torch.Generator().manual_seed(2))
    logits = Denoiser([chunk], initialize(config.parallel))(tokens, torch.tensor([16, 9, 16]))
    assert logits.shape == (3, 16, VOCAB)
    with torch.no_grad():
        direct = chunk(tokens[1:2, :9])[..., :VOCAB].transpose(0, 1)
    torch.testing.assert_close(logits[1:2, :9], direct)
