"""Training FLOPs of a DLM and of an AR run at their best points, and where the DLM reaches what AR reaches at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_dlm.config.kinds import KINDS
from megatron_dlm.config.load import read_yaml
from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.run_folder import RunFolder, number


class Point(NamedTuple):
    """One held-out evaluation of a run."""

    step: int
    loss: float
    """Held-out NELBO (of AR the exact negative log-likelihood), nats per token."""
    flops: float
    """Of all training up to here (``training.metrics.training_flops``)."""


class TrainingCosts(NamedTuple):
    """What ``compare_training`` finds."""

    autoregressive: Point
    """AR at its smallest loss, the first if there are several."""
    diffusion: Point
    """The DLM at its smallest loss."""
    reached: Point | None
    """The first evaluation of the DLM with a loss at most AR's smallest; None: it never gets there."""

    @property
    def ratio_at_best(self) -> float:
        """FLOPs of the DLM over AR's, each at its own best point, which need not be equally good."""
        return self.diffusion.flops / self.autoregressive.flops

    @property
    def ratio_at_equal_loss(self) -> float | None:
        """FLOPs that take the DLM to AR's best loss, over AR's; None where it never gets there."""
        return None if self.reached is None else self.reached.flops / self.autoregressive.flops


def compare_training(autoregressive: Sequence[Point], diffusion: Sequence[Point]) -> TrainingCosts:
    """Compare two runs at their best points.

    Losses are those of evaluations, nothing is interpolated, so the point where the DLM reaches AR's best is late by
    up to one interval between evaluations.

    Args:
        autoregressive: evaluations of the AR run, one at least, by step.
        diffusion: those of the DLM run.
    """
    best = min(autoregressive, key=lambda point: point.loss)
    return TrainingCosts(
        autoregressive=best,
        diffusion=min(diffusion, key=lambda point: point.loss),
        reached=next((point for point in diffusion if point.loss <= best.loss), None),
    )


def check_objective(path: str | Path, objective: str) -> None:
    """Refuse a run of another objective, where its configuration is still beside the metrics.

    Raises ``ConfigError``, and ``DataError`` as ``read_points``.
    """
    file = RunFolder.at(path).config
    if not file.is_file():
        return
    content = read_yaml(str(file))
    model = content.get("model") if isinstance(content, dict) else None
    found = model.get("objective") if isinstance(model, dict) else None
    if found in list(KINDS) and found != objective:
        raise ConfigError(f"{path} is a {found} run, as {file} says; give a run of {objective}")


def read_points(path: str | Path) -> list[Point]:
    """The evaluations of a run with a finite loss, by step.

    Args:
        path: a run's directory, or its metrics.jsonl.

    Raises:
        DataError: there is no such file, it is not one that a run wrote, or it has no evaluation with its FLOPs;
            one line.
    """
    folder = RunFolder.at(path)
    records = folder.records()
    steps, evaluations = records.steps, records.curve
    if not evaluations:
        raise DataError(f"{folder.metrics} has no held-out evaluation: train with data.valid")
    flops = {r["step"]: r["training_flops"] for r in steps if math.isfinite(number(r.get("training_flops")))}
    losses = {r["step"]: r["valid_nelbo"] for r in evaluations if math.isfinite(number(r["valid_nelbo"]))}
    points = [Point(step, losses[step], flops[step]) for step in sorted(losses) if flops.get(step, 0) > 0]
    if not points:
        missing = "training_flops of the step of any evaluation" if losses else "finite valid_nelbo"
        raise DataError(f"{folder.metrics} has no {missing}: train again with this version")
    return points
