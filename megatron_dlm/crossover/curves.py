"""Curves of paired runs, compared: where the same-epoch curves cross, and what each reaches at its best.

All functions are of curves alone. Two curves are only ever compared at epochs at which both were evaluated: nothing is
interpolated but the place of a crossing between two such epochs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from megatron_dlm.config.kinds import KINDS
from megatron_dlm.errors import DataError
from megatron_dlm.run_folder import RunFolder, number

_NORMAL_95 = 1.96
_TASK = "task/"
_LOWER_IS_BETTER = ("loss", "nll", "nelbo", "perplexity", "bits_per_byte", "error")


@dataclass(frozen=True)
class Arm:
    """One run of a crossover: what it is, without what all arms have in common."""

    model: str
    """Name of the model in the grid."""
    unique_tokens: int
    objective: Literal["masked_diffusion", "autoregressive"]
    seed: int
    input_mask_ratio: float = 0.0
    """Share of the inputs that an autoregressive arm is not shown."""
    dropout: float | None = None
    """Of an autoregressive arm; None: what the base has."""

    @property
    def name(self) -> str:
        """Its directory: says all that tells it from the other arms."""
        variant = self.variant.lower().replace(" ", "-")
        return f"{self.model}-{self.unique_tokens}tokens-{variant}-seed{self.seed}"

    @property
    def variant(self) -> str:
        """``DLM``, ``AR``, ``AR mask0.3``, ``AR drop0.1``: its curve in a figure."""
        if not KINDS[self.objective].causal:
            return KINDS[self.objective].label
        mask = f" mask{self.input_mask_ratio:g}" if self.input_mask_ratio else ""
        return f"AR{mask}" + (f" drop{self.dropout:g}" if self.dropout else "")


@dataclass(frozen=True)
class Curve:
    """A figure of one run at its evaluations; arrays of [evaluations], epochs ascending."""

    epochs: np.ndarray
    values: np.ndarray
    ci95: np.ndarray
    """Half-widths of the 95 % intervals; infinite where there is none."""
    flops: np.ndarray
    """Training FLOPs so far; NaN where the run did not record them."""

    def at(self, epochs: np.ndarray) -> Curve:
        """The evaluations at these epochs, all of which it must have."""
        index = np.searchsorted(self.epochs, epochs)
        return Curve(self.epochs[index], self.values[index], self.ci95[index], self.flops[index])


class Run(NamedTuple):
    """What a finished arm has on record."""

    arm: Arm
    loss: Curve
    """Held-out loss in nats per token: the NELBO of a DLM, the NLL of an AR."""
    tasks: dict[str, Curve]
    """By the part of the key after ``task/``."""
    unigram: float | None
    """Held-out unigram cross-entropy, nats per token."""


class Best(NamedTuple):
    """The best evaluation of a run."""

    value: float
    ci95: float
    epoch: float
    flops: float
    at_end: bool
    """It is the last one, so longer training may give a better one."""


class Comparison(NamedTuple):
    """A DLM beside an AR at the same epochs. Gaps are DLM minus AR, negative where the DLM is better."""

    kind: Literal["crosses", "never", "always", "apart"]
    """crosses: the DLM is worse at first and stays better after ``epoch``. never: it is not better at the last common
    epoch. always: it is better at every one. apart: there are fewer than two common epochs."""
    epoch: float | None
    """Of the last crossing, interpolated between the evaluations around it."""
    low: float | None
    """The same if the gap were smaller by its 95 % interval; the first common epoch where that is always below 0."""
    high: float | None
    """The same if the gap were larger by it; None where the DLM would then not be better at the end."""
    crossings: int
    """Changes of the gap's sign, in either direction."""
    last_epoch: float | None
    """The last common epoch."""
    gap: float | None
    """There."""
    gap_ci95: float | None
    """Half-width of its 95 % interval, from the held-out errors of both."""


class Potential(NamedTuple):
    """The unique tokens with which an AR reaches a given loss at its best."""

    tokens: float
    relation: Literal["=", ">", "<="]
    """``>``: not reached within the grid, of which ``tokens`` is the largest budget. ``<=``: with the smallest too."""


def higher_is_better(metric: str) -> bool:
    """Of ``loss`` and of tasks' figures, told by their names."""
    return not metric.rpartition("/")[2].startswith(_LOWER_IS_BETTER)


def read_run(arm: Arm, folder: RunFolder) -> Run:
    """The curves in a run's records.

    Raises ``DataError``, one line, where they cannot be read or have no evaluation with a finite loss.
    """
    again = f"remove {folder.path} to train this arm again"
    records = folder.records(f"restore it, or {again}")
    # Evaluations know their step only; its record has the epoch and the FLOPs.
    steps = {r["step"]: (number(r.get("epoch")), number(r.get("training_flops"))) for r in records.steps}
    evaluations = [r for r in records.curve if r["step"] in steps and math.isfinite(steps[r["step"]][0])]
    loss = _curve(evaluations, steps, "valid_nelbo", "valid_nelbo_ci95", 1.0)
    if not len(loss.epochs):
        raise DataError(f"{folder.metrics} has no evaluation; {again}")
    names = sorted({key for record in evaluations for key in record if key.startswith(_TASK)})
    tasks = {
        name.removeprefix(_TASK): _curve(evaluations, steps, name, f"{name}_stderr", _NORMAL_95)
        for name in names
        if not name.endswith(("_stderr", "_ci95"))
    }
    return Run(arm, loss, {name: curve for name, curve in tasks.items() if len(curve.epochs)}, _unigram(evaluations))


def _curve(
    evaluations: list[dict[str, Any]], steps: dict[int, tuple[float, float]], key: str, error: str, scale: float
) -> Curve:
    """The evaluations that have a finite number at ``key``, in the order of their epochs."""
    rows = {}
    for record in evaluations:
        if math.isfinite(value := number(record.get(key))):
            half_width = scale * number(record.get(error))
            epoch, flops = steps[record["step"]]
            rows[epoch] = (epoch, value, half_width if math.isfinite(half_width) else math.inf, flops)
    table = np.array([rows[epoch] for epoch in sorted(rows)], dtype=float).reshape(-1, 4)
    return Curve(*table.T)


def _unigram(evaluations: list[dict[str, Any]]) -> float | None:
    value = number(evaluations[-1].get("valid_unigram"))
    return value if math.isfinite(value) else None


def common_epochs(curves: Sequence[Curve]) -> np.ndarray:
    """Epochs at which all of them were evaluated, ascending."""
    found = curves[0].epochs
    for curve in curves[1:]:
        found = np.intersect1d(found, curve.epochs)
    return found


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over seeds at their common epochs; its interval is that of independent errors."""
    parts = [curve.at(common_epochs(curves)) for curve in curves]
    ci95 = np.sqrt(np.sum([part.ci95**2 for part in parts], axis=0)) / len(parts)
    values, flops = (np.mean([getattr(part, key) for part in parts], axis=0) for key in ("values", "flops"))
    return Curve(parts[0].epochs, values, ci95, flops)


def best(curve: Curve, *, higher: bool = False) -> Best:
    """The first of the lowest values, or of the highest."""
    index = int(np.argmax(curve.values) if higher else np.argmin(curve.values))
    value, ci95, epoch, flops = (float(row[index]) for row in (curve.values, curve.ci95, curve.epochs, curve.flops))
    return Best(value, ci95, epoch, flops, at_end=index == len(curve.epochs) - 1)


def compare(dlm: Curve, ar: Curve, *, higher: bool = False) -> Comparison:
    """The two at their common epochs; ``higher`` values are better ones."""
    epochs = common_epochs([dlm, ar])
    if len(epochs) < 2:
        return Comparison("apart", None, None, None, 0, None, None, None)
    dlm, ar = dlm.at(epochs), ar.at(epochs)
    gap = (ar.values - dlm.values) if higher else (dlm.values - ar.values)
    ci95 = np.hypot(dlm.ci95, ar.ci95)
    epoch = last_crossing(epochs, gap)
    ahead = gap < 0
    low = last_crossing(epochs, gap - ci95)  # None for either reason: ahead throughout, as the gap itself crosses
    return Comparison(
        kind="crosses" if epoch is not None else "always" if ahead[-1] else "never",
        epoch=epoch,
        low=None if epoch is None else float(epochs[0]) if low is None else low,
        high=None if epoch is None else last_crossing(epochs, gap + ci95),
        crossings=int(np.sum(ahead[1:] != ahead[:-1])),
        last_epoch=float(epochs[-1]),
        gap=float(gap[-1]),
        gap_ci95=float(ci95[-1]),
    )


def last_crossing(epochs: np.ndarray, gap: np.ndarray) -> float | None:
    """Where ``gap`` [evaluations] falls below 0 for good; None where it does not, or was never at 0 or above."""
    behind = np.flatnonzero(~(gap < 0))  # not `gap >= 0`: what is not a number is not ahead either
    if not len(behind) or behind[-1] == len(gap) - 1:
        return None
    i = int(behind[-1])  # the last evaluation that is not ahead; all after it are
    if not math.isfinite(gap[i]):  # of a run without intervals: there is no line to draw to the next one
        return float(epochs[i + 1])
    # The straight line from (epochs[i], gap[i] >= 0) to (epochs[i + 1], gap[i + 1] < 0) is 0 here.
    return float(epochs[i] + (epochs[i + 1] - epochs[i]) * gap[i] / (gap[i] - gap[i + 1]))


def data_potential(target: float, ar_best: Mapping[int, float]) -> Potential:
    """The unique tokens with which an AR at its best first reaches the loss ``target``.

    Args:
        target: nats per token, a DLM's best.
        ar_best: the AR's best by unique tokens; between two of them it is taken to be linear in their logarithm.
    """
    budgets = sorted(ar_best)
    # The smallest budget that is enough. An AR that does worse with still more data does not change it.
    reached = next((i for i, tokens in enumerate(budgets) if ar_best[tokens] <= target), None)
    if reached is None:
        return Potential(float(budgets[-1]), ">")
    if reached == 0:
        return Potential(float(budgets[0]), "<=")
    # Between this budget and the one before, of which the loss is above the target.
    before, after = budgets[reached - 1], budgets[reached]
    share = (ar_best[before] - target) / (ar_best[before] - ar_best[after])
    return Potential(math.exp(math.log(before) + share * math.log(after / before)), "=")
