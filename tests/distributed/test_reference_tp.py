"""The losses with a vocabulary that is split over two ranks, with and without sequence parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dlm_kernels.reference import cross_entropy, linear_cross_entropy
from tests.ranks import run_ranks

TOKENS, HIDDEN, LOCAL = 24, 8, 12
# Real columns of 24: all; the second rank has some padding; nothing but padding; targets at the edges of the shards.
VOCAB_SIZES = [24, 17, 12]
COUNTS = [0, 1, 5, 13]


def test_two_ranks_equal_the_fp64_oracle(tmp_path: Path) -> None:
    errors = run_ranks(_compare, 2, tmp_path)
    assert len(errors) == 2 * len(VOCAB_SIZES) * len(COUNTS) * 3
    for case, values in errors.items():
        tolerance = 1e-14 if "float64" in case else 1e-6
        assert values["bitwise"], case
        for name in ("loss", "entropy", "hidden", "weight", "correct"):
            assert values[name] <= tolerance, (case, name, values[name])


def _compare() -> dict[str, dict[str, Any]]:
    """On every rank: relative errors of each case, the worst over the ranks."""
    results = {}
    for dtype in (torch.float64, torch.float32):
        for vocab_size in VOCAB_SIZES:
            for count in COUNTS:
                for mode in ("logits", "TP", "TP+SP"):
                    results[f"{dtype} V={vocab_size} n={count} {mode}"] = _case(dtype, vocab_size, count, mode)
    return results


def _case(dtype: torch.dtype, vocab_size: int, count: int, mode: str) -> dict[str, Any]:
    rank, group = dist.get_rank(), dist.group.WORLD
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(2 * LOCAL, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    rows = torch.randperm(TOKENS, generator=generator)[:count].sort().values
    targets = torch.randint(0, vocab_size, (count,), generator=generator)
    targets[:3] = torch.tensor([LOCAL - 1, vocab_size - 1, 0])[:count]
    weights = 10 ** (3 * torch.rand(count, generator=generator))
    targets[6:8] = torch.tensor([-100, vocab_size])[: max(count - 6, 0)]  # ignored, though they have a weight
    known = (targets >= 0) & (targets < vocab_size)
    given, targets = targets, targets.masked_fill(~known, -100)

    h, w = (x.double().clone().requires_grad_() for x in (hidden, weight))
    logits = h[rows] @ w.t()
    expected_entropy = torch.nn.functional.cross_entropy(logits[:, :vocab_size], targets, reduction="none")
    expected_loss = (expected_entropy * weights.double()).sum()
    expected_correct = (logits[:, :vocab_size].argmax(1) == targets) & known
    expected_hidden, expected_weight = torch.autograd.grad(0.37 * expected_loss, (h, w))

    shard = slice(rank * LOCAL, (rank + 1) * LOCAL)
    tokens = slice(rank * TOKENS // 2, (rank + 1) * TOKENS // 2) if mode == "TP+SP" else slice(None)
    weight[vocab_size:] = float("nan")
    mine = weight[shard].clone().requires_grad_()
    if mode == "logits":
        # All negative, and for the first target, which is on rank 0, nothing is possible on rank 1.
        whole = (h[rows] @ w.t()).detach().to(dtype) - 50
        whole[:1, LOCAL:vocab_size] = float("-inf")
        whole[:, vocab_size:] = float("nan")
        local = whole[:, shard].clone().requires_grad_()
        logits = whole.double()
        expected_entropy = torch.nn.functional.cross_entropy(logits[:, :vocab_size], targets, reduction="none")
        expected_loss = (expected_entropy * weights.double()).sum()
        expected_correct = logits[:, :vocab_size].argmax(1) == targets
        loss, entropy, correct = cross_entropy(local, given, weights, vocab_size=vocab_size, group=group)
        (d_logits,) = torch.autograd.grad(0.37 * loss, local)
        probability = torch.zeros(count, 2 * LOCAL, dtype=torch.float64)
        probability[:, :vocab_size] = logits[:, :vocab_size].softmax(1)
        one_hot = torch.nn.functional.one_hot(targets.clamp(min=0), 2 * LOCAL)
        expected_logits = 0.37 * (weights.double() * known)[:, None] * (probability - one_hot)
        gradient_errors = {"hidden": 0.0, "weight": _relative(d_logits, expected_logits[:, shard], expected_logits)}
    else:
        part = hidden[tokens].clone().requires_grad_()
        loss, entropy, correct = linear_cross_entropy(
            part,
            mine,
            rows,
            given,
            weights,
            vocab_size=vocab_size,
            group=group,
            sequence_parallel=mode == "TP+SP",
            chunk_size=4,
        )
        d_hidden, d_weight = torch.autograd.grad(0.37 * loss, (part, mine))
        gradient_errors = {
            "hidden": _relative(d_hidden, expected_hidden[tokens], expected_hidden),
            "weight": _relative(d_weight, expected_weight[shard], expected_weight),
        }
    losses = [torch.zeros_like(loss.detach()) for _ in range(2)]
    dist.all_gather(losses, loss.detach())
    errors = {
        "loss": _relative(loss.detach(), expected_loss.detach()),
        "entropy": _relative(entropy, expected_entropy.detach()),
        "correct": float((correct != expected_correct).sum()),
        **gradient_errors,
    }
    worst = torch.tensor(list(errors.values()), dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return {**dict(zip(errors, worst.tolist(), strict=True)), "bitwise": torch.equal(losses[0], losses[1])}


def _relative(value: Tensor, expected: Tensor, whole: Tensor | None = None) -> float:
    """Relative Frobenius error; infinite if the value is not finite."""
    norm = (expected if whole is None else whole).norm().clamp(min=1e-300)
    error = float((value.double() - expected).norm() / norm)
    return error if error == error else float("inf")
