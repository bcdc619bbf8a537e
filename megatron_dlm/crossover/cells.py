"""A grid of paired runs, cell by cell: each cell is one model and one budget of unique tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_dlm.costs.training import Point, TrainingCosts, compare_training
from megatron_dlm.crossover.curves import (
    Best,
    Comparison,
    Curve,
    Potential,
    Run,
    best,
    compare,
    data_potential,
    higher_is_better,
)


@dataclass
class Pairing:
    """The DLM beside one variant of the AR, in one metric."""

    metric: str
    variant: str
    by_seed: dict[int, Comparison]

    @property
    def epochs(self) -> list[float]:
        """Where they cross, of the seeds in which they do."""
        return [c.epoch for c in self.by_seed.values() if c.epoch is not None]


@dataclass
class Cell:
    """All arms of one model and one budget of unique tokens."""

    model: str
    unique_tokens: int
    arms: dict[str, dict[int, Run]]
    """By variant and seed."""
    pairings: list[Pairing] = field(default_factory=list)
    best_gap: dict[int, tuple[float, float]] = field(default_factory=dict)
    """By seed: the DLM's best minus the AR's best, and its 95 % half-width."""
    costs: dict[int, TrainingCosts] = field(default_factory=dict)
    """By seed: training FLOPs of both at their best."""
    potential: Potential | None = None
    """Of the means over seeds."""
    potential_by_seed: dict[int, Potential] = field(default_factory=dict)

    def best(self, variant: str, seed: int) -> Best:
        """A run's best loss."""
        return best(self.arms[variant][seed].loss)

    def best_ar(self, seed: int) -> Best | None:
        """Over the variants; None where there is none with this seed."""
        run = self.best_ar_run(seed)
        return best(run.loss) if run else None

    def best_ar_run(self, seed: int) -> Run | None:
        """The AR variant that has it."""
        found = [runs[seed] for variant, runs in self.arms.items() if variant != "DLM" and seed in runs]
        return min(found, key=lambda run: best(run.loss).value, default=None)

    @property
    def better(self) -> Literal["DLM", "AR", "undecided"]:
        """Whose best is better: what the 95 % intervals of all seeds say, else undecided."""
        if self.best_gap and all(gap + ci95 < 0 for gap, ci95 in self.best_gap.values()):
            return "DLM"
        if self.best_gap and all(gap - ci95 > 0 for gap, ci95 in self.best_gap.values()):
            return "AR"
        return "undecided"

    @property
    def pairs(self) -> list[int]:
        """Seeds of which there are a DLM and an AR."""
        return [seed for seed in self.arms.get("DLM", {}) if self.best_ar(seed)]


def analyse(runs: Iterable[Run]) -> list[Cell]:
    """The cells of a grid in ascending order of model and budget, with all that is compared in and between them."""
    cells: dict[tuple[str, int], Cell] = {}
    for run in sorted(runs, key=lambda run: (run.arm.model, run.arm.unique_tokens, run.arm.variant, run.arm.seed)):
        arm = run.arm
        cell = cells.setdefault((arm.model, arm.unique_tokens), Cell(arm.model, arm.unique_tokens, {}))
        cell.arms.setdefault(arm.variant, {})[arm.seed] = run
    for cell in cells.values():
        cell.pairings = list(_pairings(cell))
        for seed in cell.pairs:
            opponent = cell.best_ar_run(seed)
            assert opponent is not None
            dlm, ar = cell.best("DLM", seed), best(opponent.loss)
            cell.best_gap[seed] = (dlm.value - ar.value, math.hypot(dlm.ci95, ar.ci95))
            cell.costs[seed] = compare_training(_points(opponent.loss), _points(cell.arms["DLM"][seed].loss))
    for cell in cells.values():
        _find_potential(cell, [other for other in cells.values() if other.model == cell.model])
    return list(cells.values())


def _points(curve: Curve) -> list[Point]:
    return [Point(i, *map(float, row)) for i, row in enumerate(zip(curve.values, curve.flops, strict=True))]


def _pairings(cell: Cell) -> Iterable[Pairing]:
    dlm = cell.arms.get("DLM", {})
    for variant, runs in cell.arms.items():
        seeds = [seed for seed in runs if seed in dlm]
        if variant == "DLM" or not seeds:
            continue
        yield Pairing("loss", variant, {seed: compare(dlm[seed].loss, runs[seed].loss) for seed in seeds})
        for task in sorted(set().union(*(dlm[seed].tasks.keys() & runs[seed].tasks.keys() for seed in seeds))):
            having = [seed for seed in seeds if task in dlm[seed].tasks and task in runs[seed].tasks]
            higher = higher_is_better(task)
            compared = {s: compare(dlm[s].tasks[task], runs[s].tasks[task], higher=higher) for s in having}
            yield Pairing(task, variant, compared)


def _find_potential(cell: Cell, cells: Sequence[Cell]) -> None:
    """The AR's budget that matches the DLM of ``cell``, for each seed and for the means over seeds."""

    def potential(seeds: Sequence[int]) -> Potential | None:
        # A budget counts if it has an AR with each of the seeds; whether it has a DLM is no matter.
        known = [c for c in cells if seeds and all(c.best_ar(seed) for seed in seeds)]
        if not known:
            return None
        ar = {c.unique_tokens: mean(c.best_ar(seed).value for seed in seeds) for c in known}  # type: ignore[union-attr]
        return data_potential(mean(cell.best("DLM", seed).value for seed in seeds), ar)

    cell.potential = potential(cell.pairs)
    found = {seed: potential([seed]) for seed in cell.pairs}
    cell.potential_by_seed = {seed: value for seed, value in found.items() if value}


def mean(values: Iterable[float]) -> float:
    """The plain mean of at least one value."""
    numbers = list(values)
    return sum(numbers) / len(numbers)
