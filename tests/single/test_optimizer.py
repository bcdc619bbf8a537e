"""Learning rates by step, clipping, and steps that must not be taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dlm.parallel.topology import initialize
from megatron_dlm.training.setup import build
from megatron_dlm.training.state import Training
from megatron_dlm.training.step import train_step
from tests.runs import tiny_config


def training(data: Path, **sections: dict[str, Any]) -> Training:
    config = tiny_config(data, **sections)
    return build(config, initialize(config.parallel))


def rates(data: Path, **optimizer: Any) -> list[float]:
    settings = {"lr": 1.0, "min_lr": 0.1, "warmup_steps": 4, "decay_steps": 5, **optimizer}
    made = training(data, optimizer=settings).optimizer
    return [made._set_learning_rate(step) for step in range(20)]


def test_warmup_reaches_the_peak_and_wsd_ends_at_the_floor(tiny_data: Path) -> None:
    lr = rates(tiny_data, schedule="wsd")
    assert lr[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert lr[4:15] == pytest.approx([1.0] * 11)
    assert lr[15:] == pytest.approx([0.1 + 0.9 * (2 * 0.5 ** (i / 5) - 1) for i in range(1, 6)])


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("linear", 0.55, 0.1), ("cosine", 0.55, 0.1), ("constant", 1.0, 1.0)]
)
def test_other_schedules(schedule: str, middle: float, end: float, tiny_data: Path) -> None:
    lr = rates(tiny_data, schedule=schedule)
    assert (lr[11], lr[19]) == pytest.approx((middle, end))


def state(made: Training) -> list[torch.Tensor]:
    moments = [value for part in made.optimizer.parts for s in part.optimizer.state.values() for value in s.values()]
    return [p.detach().clone() for p in made.chunks[0].parameters()] + [m.clone() for m in moments]


def test_non_finite_gradients_change_nothing(tiny_data: Path) -> None:
    made = training(tiny_data)
    assert train_step(made, made.progress_at(0)).applied
    before = state(made)
    made.optimizer.zero_grad()
    next(iter(made.chunks[0].parameters())).main_grad.view(-1)[3] = float("inf")
    update = made.optimizer.step(1)
    assert not update.applied
    assert all(torch.equal(a, b) for a, b in zip(before, state(made), strict=True))
    assert train_step(made, made.progress_at(2)).applied
    assert not all(torch.equal(a, b) for a, b in zip(before, state(made), strict=True))


def test_gradient_norm_is_exact_for_large_matrices(tiny_data: Path) -> None:
    """Summed in fp32 on a CPU, a million squares lose four digits."""
    large = {"num_layers": 1, "hidden_size": 512, "ffn_hidden_size": 2048}
    made = training(tiny_data, model=large, optimizer={"clip_grad": 0.0})  # clipping happens in the same buffers
    report = train_step(made, made.progress_at(0))
    grads = [p.main_grad for p in made.chunks[0].parameters()]
    assert max(g.numel() for g in grads) > 2**20
    exact = sum(float(g.double().square().sum()) for g in grads) ** 0.5
    in_fp32 = sum(float(torch.norm(g)) ** 2 for g in grads) ** 0.5
    assert abs(in_fp32 / exact - 1) > 1e-6, "the case must tell the two sums apart"
    assert report.grad_norm == pytest.approx(exact, rel=1e-9)


def test_clipping_scales_the_gradient_to_its_bound(tiny_data: Path) -> None:
    """Adam hides the scale of a gradient, so look at the first moment: (1 - beta1) * clipped gradient."""
    made = training(tiny_data, optimizer={"clip_grad": 0.01, "beta1": 0.5})
    report = train_step(made, made.progress_at(0))
    assert report.grad_norm > 0.1, "the norm that is reported is the one before clipping"
    moments = [s["exp_avg"] for part in made.optimizer.parts for s in part.optimizer.state.values()]
    assert float(sum(m.square().sum() for m in moments)) ** 0.5 == pytest.approx(0.5 * 0.01, rel=1e-4)


def test_norms_and_only_they_escape_weight_decay(tiny_data: Path) -> None:
    made = training(tiny_data)
    for group in (group for part in made.optimizer.parts for group in part.optimizer.param_groups):
        decayed = group["wd_mult"] > 0
        assert group["params"] and all(p.numel() > 64 or not decayed for p in group["params"])
    assert {group["wd_mult"] for part in made.optimizer.parts for group in part.optimizer.param_groups} == {0.0, 1.0}
