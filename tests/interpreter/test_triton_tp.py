"""The kernels with a vocabulary that is split over two and over four ranks, with and without sequence parallelism."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dlm_kernels.triton_cross_entropy import cross_entropy
from dlm_kernels.triton_linear_cross_entropy import linear_cross_entropy
from tests.ranks import run_ranks

TOKENS, HIDDEN, LOCAL = 24, 8, 12


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_the_fp64_oracle(tmp_path: Path, world: int) -> None:
    counts = (0, 1, 9) if world == 2 else (0, 9)
    errors = run_ranks(_compare, world, tmp_path, counts)
    assert len(errors) == 2 * 3 * len(counts) * 3
    for case, values in errors.items():
        tolerance = 1e-14 if "float64" in case else 1e-6
        assert values["bitwise"], case
        for name in ("loss", "entropy", "hidden", "weight", "correct"):
            assert values[name] <= tolerance, (case, name, values[name])


def _compare(counts: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """On every rank: relative errors of each case, the worst over the ranks."""
    columns = LOCAL * dist.get_world_size()
    results = {}
    for dtype in (torch.float64, torch.float32):
        # No padding; the last rank has some; it has nothing but padding, as all others but the first.
        for vocab_size in (columns, columns - 7, LOCAL):
            for count in counts:
                for mode in ("logits", "TP", "TP+SP"):
                    results[f"{dtype} V={vocab_size} n={count} {mode}"] = _case(dtype, vocab_size, count, mode)
    return results


def _case(dtype: torch.dtype, vocab_size: int, count: int, mode: str) -> dict[str, Any]:
    rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(world * LOCAL, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    rows = torch.randperm(TOKENS, generator=generator)[:count].sort().values
    targets = torch.randint(0, vocab_size, (count,), generator=generator)
    # At the edges of the shards.
    targets[:4] = torch.tensor([LOCAL - 1, min(LOCAL, vocab_size - 1), vocab_size - 1, 0])[:count]
    weights = 10 ** (3 * torch.rand(count, generator=generator))
    weights[5:6] = 0
    targets[6:8] = torch.tensor([-100, vocab_size])[: max(count - 6, 0)]  # ignored, though they have a weight
    given, targets = targets, targets.masked_fill((targets < 0) | (targets >= vocab_size), -100)

    h, w = (x.double().clone().requires_grad_() for x in (hidden, weight))
    logits = h[rows] @ w.t()
    if mode == "logits":
        # All negative; and for the first target, which is on rank 0, nothing is possible on the others.
        logits = (logits.to(dtype) - 50).detach()
        logits[:1, LOCAL:] = -torch.inf
        local = logits.clone()
        local[:, vocab_size:] = torch.nan
        logits = logits.double().requires_grad_()
    possible = logits[:, :vocab_size]
    expected_entropy = torch.nn.functional.cross_entropy(possible, targets, reduction="none") * (weights != 0)
    expected_loss = (expected_entropy * weights.double()).sum()
    expected_correct = (possible.argmax(1) == targets) & (weights != 0)

    columns = slice(rank * LOCAL, (rank + 1) * LOCAL)
    gradient_errors = {"hidden": 0.0}
    if mode == "logits":
        mine = local[:, columns].clone().requires_grad_()
        loss, entropy, correct = cross_entropy(mine, given, weights, vocab_size=vocab_size, group=group)
        (d_logits,) = torch.autograd.grad(0.37 * loss, mine)
        (expected,) = torch.autograd.grad(0.37 * expected_loss, logits)
        padding = (d_logits[:, max(vocab_size - rank * LOCAL, 0) :] != 0).sum()
        gradient_errors["weight"] = _relative(d_logits, expected[:, columns], expected) + float(padding)
    else:
        tokens = slice(rank * TOKENS // world, (rank + 1) * TOKENS // world) if mode == "TP+SP" else slice(None)
        weight[vocab_size:] = torch.nan
        part, mine = hidden[tokens].clone().requires_grad_(), weight[columns].clone().requires_grad_()
        run = partial(
            linear_cross_entropy,
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
        loss, entropy, correct = run()
        with torch.no_grad():
            evaluated = run()
        assert all(torch.equal(a, b) for a, b in zip(evaluated, (loss, entropy, correct), strict=True))
        d_hidden, d_weight = torch.autograd.grad(0.37 * loss, (part, mine))
        expected_hidden, expected_weight = torch.autograd.grad(0.37 * expected_loss, (h, w))
        gradient_errors["hidden"] = _relative(d_hidden, expected_hidden[tokens], expected_hidden)
        gradient_errors["weight"] = _relative(d_weight, expected_weight[columns], expected_weight)
    losses = [torch.zeros_like(loss.detach()) for _ in range(world)]
    dist.all_gather(losses, loss.detach())
    errors = {
        "loss": _relative(loss.detach(), expected_loss.detach()),
        "entropy": _relative(entropy, expected_entropy.detach()),
        "correct": float((correct != expected_correct).sum()),
        **gradient_errors,
    }
    worst = torch.tensor(list(errors.values()), dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    bitwise = all(torch.equal(losses[0], other) for other in losses[1:])
    return {**dict(zip(errors, worst.tolist(), strict=True)), "bitwise": bitwise}


def _relative(value: Tensor, expected: Tensor, whole: Tensor | None = None) -> float:
    """Relative Frobenius error; infinite if the value is not finite."""
    norm = (expected if whole is None else whole).norm().clamp(min=1e-300)
    error = float((value.double() - expected).norm() / norm)
    return error if error == error else float("inf")
