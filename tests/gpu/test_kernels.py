"""The Triton kernels on a GPU: the same bits as their twins where those are integers, and fp64 accuracy limits else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dlm_kernels import NoiseDraw, cross_entropy, linear_cross_entropy, mask_tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest tests/gpu")


@contextmanager
def no_host_synchronisation() -> Iterator[None]:
    """An operation that waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm())


MASKINGS: list[dict[str, Any]] = [
    {"masking": masking, "draw": NoiseDraw(mode, 3, 64)}
    for masking in ("exact_count", "bernoulli")
    for mode in ("stratified_antithetic", "stratified", "antithetic", "iid")
]


@pytest.mark.parametrize("shape", [(32, 4096), (16, 8192), (3, 10007), (5, 1)])
@pytest.mark.parametrize("options", MASKINGS, ids=lambda o: f"{o['masking']}-{o['draw'].mode}")
@pytest.mark.parametrize("shortened", [False, True])
def test_mask_tokens_gives_the_bits_of_the_twin(shape: tuple[int, int], options: Any, shortened: bool) -> None:
    batch, seq = shape
    tokens = torch.randint(0, 50000, shape)
    eligible = torch.arange(seq) < torch.randint(1, seq + 1, (batch, 1)) if shortened else None
    ids = 3 * 64 + np.arange(batch)
    common = {"seed": 2**63 + 11, "mask_token_id": 50001, **options}
    twin = mask_tokens(tokens, ids, eligible=eligible, capacity=batch * seq, impl="torch", **common)
    on_gpu = tokens.cuda()
    eligible_on_gpu = None if eligible is None else eligible.cuda()
    mask_tokens(on_gpu, ids, eligible=eligible_on_gpu, capacity=batch * seq, **common)  # compiled
    with no_host_synchronisation():
        ours = mask_tokens(on_gpu, ids, eligible=eligible_on_gpu, capacity=batch * seq, **common)
    for name in ("tokens", "rows", "targets", "weights", "overflow"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(twin, name)), name


def problem(rows: int, vocab: int, hidden: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    h = torch.randn(rows, hidden, device="cuda").to(dtype)
    w = (torch.randn(vocab, hidden, device="cuda") * hidden**-0.5).to(dtype)
    targets = torch.randint(0, vocab, (rows,), device="cuda")
    return h, w, targets, 1 / torch.rand(rows, device="cuda").clamp(min=0.05)


@pytest.mark.parametrize("vocab", [16384, 32768, 50257, 131072])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cross_entropy_is_as_exact_as_its_logits(vocab: int, dtype: torch.dtype) -> None:
    h, w, targets, weights = problem(512, vocab, 256, dtype)
    logits = h @ w.t()
    wide = logits.double().requires_grad_()
    expected = (torch.nn.functional.cross_entropy(wide, targets, reduction="none") * weights.double()).sum()
    expected.backward()
    results = []
    for _ in range(2):
        leaf = logits.clone().requires_grad_()
        with no_host_synchronisation():
            loss, _, _ = cross_entropy(leaf, targets, weights)
            loss.backward()
        results.append((loss.detach(), leaf.grad))
    (loss, gradient), again = results
    assert all(torch.equal(a, b) for a, b in zip((loss, gradient), again, strict=True)), "deterministic"
    assert wide.grad is not None
    assert relative(loss, expected.detach()) < 1e-6
    assert relative(gradient, wide.grad) < (2.5e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999, 0.9999])
def test_gradient_at_a_confident_target_does_not_cancel(probability: float) -> None:
    vocab = 4096
    logits = torch.zeros(4, vocab, device="cuda")
    targets = torch.arange(4, device="cuda")
    logits[targets, targets] = float(np.log(probability / (1 - probability) * (vocab - 1)))
    leaf = logits.bfloat16().requires_grad_()
    wide = leaf.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(wide, targets, reduction="sum").backward()
    cross_entropy(leaf, targets, torch.ones(4, device="cuda"))[0].backward()
    assert wide.grad is not None and leaf.grad is not None
    expected = wide.grad[targets, targets]
    assert float(((leaf.grad[targets, targets].double() - expected) / expected).abs().max()) < 4e-3


@pytest.mark.parametrize("fp32_logits", [False, True])
@pytest.mark.parametrize("vocab", [50257, 131072])
def test_linear_cross_entropy_against_fp64(vocab: int, fp32_logits: bool) -> None:
    tokens, count = 1024, 400
    h, w, targets, weights = problem(tokens, vocab, 512)
    rows = torch.randperm(tokens, device="cuda")[:count].sort().values.int()
    h[torch.ones(tokens, dtype=torch.bool, device="cuda").index_fill(0, rows.long(), False)] = torch.nan
    targets, weights = targets[:count], weights[:count]
    wide = [x.double().requires_grad_() for x in (h[rows.long()], w)]
    expected = (
        torch.nn.functional.cross_entropy(wide[0] @ wide[1].t(), targets, reduction="none") * weights.double()
    ).sum()
    expected.backward()
    for attempt in range(2):  # the first compiles
        leaves = [x.clone().requires_grad_() for x in (h, w)]
        if attempt:
            with no_host_synchronisation():
                loss, _, _ = linear_cross_entropy(
                    *leaves, rows, targets, weights, chunk_size=128, fp32_logits=fp32_logits
                )
                loss.backward()
        else:
            linear_cross_entropy(*leaves, rows, targets, weights, chunk_size=128, fp32_logits=fp32_logits)[0].backward()
    limit = 3e-3 if fp32_logits else 2e-2
    grads = [leaf.grad for leaf in leaves]
    assert grads[0] is not None and grads[1] is not None and wide[0].grad is not None and wide[1].grad is not None
    assert relative(loss.detach(), expected.detach()) < 1e-3
    assert relative(grads[0][rows.long()], wide[0].grad) < limit
    assert relative(grads[1], wide[1].grad) < limit
    assert int((grads[0] != 0).any(1).sum()) <= count and bool(torch.isfinite(grads[0]).all())


def test_masking_can_be_captured_in_a_graph() -> None:
    tokens = torch.randint(0, 50000, (32, 4096), device="cuda")
    options: dict[str, Any] = {"seed": 1, "mask_token_id": 50001, "draw": NoiseDraw("stratified_antithetic", 0, 32)}
    options |= {"capacity": 16 * 4097 + 127}
    expected = mask_tokens(tokens, np.arange(32), **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mask_tokens(tokens, np.arange(32), **options)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured.tokens, expected.tokens) and torch.equal(captured.rows, expected.rows)
