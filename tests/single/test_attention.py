"""Core attention against a plain softmax with a mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_dlm.model.attention import CoreAttention, RMSNorm
from megatron_dlm.parallel.megatron_config import transformer_config
from megatron_dlm.parallel.topology import initialize
from tests.runs import tiny_config

SEQ, BATCH, HEADS, GROUPS, DIM = 12, 4, 4, 2, 16


def expected(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], causal: bool) -> Tensor:
    """Written out with loops over rows and heads, in fp64."""
    out = torch.zeros(SEQ, BATCH, HEADS, DIM, dtype=torch.float64)
    for b, n in enumerate(lengths):
        for h in range(HEADS):
            g = h // (HEADS // GROUPS)
            q, k, v = (t[:n, b, i].double() for t, i in ((query, h), (key, g), (value, g)))
            scores = q @ k.T / DIM**0.5
            if causal:
                scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
            out[:n, b, h] = scores.softmax(-1) @ v
    return out.flatten(2)


def attention(causal: bool, tmp_path, dropout: float = 0.0) -> CoreAttention:
    from megatron.core.transformer.enums import AttnMaskType

    config = transformer_config(tiny_config(tmp_path, model={"attention_dropout": dropout}))
    return CoreAttention(config, 1, AttnMaskType.causal if causal else AttnMaskType.no_mask, "self")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, [12, 5, 12, 1]])
def test_attention_is_softmax_within_each_length(causal: bool, lengths: list[int] | None, tmp_path) -> None:
    torch.manual_seed(0)
    query = torch.randn(SEQ, BATCH, HEADS, DIM)
    key, value = torch.randn(2, SEQ, BATCH, GROUPS, DIM)
    mask = None if lengths is None else torch.tensor(lengths)
    got = attention(causal, tmp_path)(query, key, value, mask)
    reference = expected(query, key, value, lengths or [SEQ] * BATCH, causal)
    torch.testing.assert_close(got.double(), reference, rtol=1e-5, atol=2e-6)


def test_padding_has_no_influence_and_no_gradient(tmp_path) -> None:
    torch.manual_seed(0)
    query = torch.randn(SEQ, BATCH, HEADS, DIM)
    key, value = torch.randn(2, SEQ, BATCH, GROUPS, DIM).unbind()
    key.requires_grad_()
    module, lengths = attention(False, tmp_path), torch.tensor([12, 5, 12, 12])
    first = module(query, key, value, lengths)
    first.square().sum().backward()
    assert key.grad[5:, 1].abs().max() == 0 and key.grad[:5, 1].abs().max() > 0
    changed = key.detach().clone()
    changed[5:, 1] = float("nan")
    assert torch.equal(module(query, changed, value, lengths), first)


def test_dropout_path_has_the_right_mean_and_share(tmp_path) -> None:
    """Averaged over draws, attention with dropout is attention without; evaluation draws nothing."""
    initialize(tiny_config(tmp_path).parallel).seed_dropout(1, 1)
    torch.manual_seed(0)
    query = torch.randn(SEQ, 1, HEADS, DIM)
    key, value = torch.randn(2, SEQ, 1, GROUPS, DIM)
    module = attention(True, tmp_path, dropout=0.25)
    plain = module.eval()(query, key, value, None)
    module.train()
    draws = torch.stack([module(query, key, value, None) for _ in range(2000)])
    assert draws.std(0).max() > 0.1
    error = (draws.mean(0) - plain).abs() / (draws.std(0) / 2000**0.5 + 1e-9)
    assert error.max() < 6


def test_rms_norm_divides_by_the_root_mean_square(tmp_path) -> None:
    config = transformer_config(tiny_config(tmp_path))
    hidden = torch.randn(3, 5, 64)
    norm = RMSNorm(config, 64, eps=1e-6)
    with torch.no_grad():
        norm.weight.fill_(2.0)
    reference = 2.0 * hidden.double() / (hidden.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(hidden).double(), reference, rtol=1e-6, atol=1e-6)
    assert norm.weight.sequence_parallel is False
