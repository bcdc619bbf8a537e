"""What a grid of paired runs says, as tables and as JSON: no more than was measured, and all of its errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_dlm.crossover.cells import Cell, Pairing, mean
from megatron_dlm.crossover.curves import Curve, best
from megatron_dlm.formatting import markdown_table

DEFINITIONS = {
    "loss": "held-out nats per token: of a DLM the NELBO, a bound that its likelihood may beat; of an AR exact",
    "crossing": "the epoch from which on the DLM is better than the AR at equal epochs, linear between evaluations; "
    "always: it is better from the first evaluation on; never: it is not better at the last common epoch; apart: "
    "fewer than two common epochs",
    "gap": "DLM minus AR, for the last one at their last common epoch",
    "intervals": "(a to b) is the range over seeds; +- is the 95 % interval of the held-out error, from the sequences, "
    "and held-out error is the earliest and the latest crossing within it",
    "best": "of all evaluations of a run, so chosen on the held-out data; of the AR also over its variants; where it "
    "is the last evaluation, longer training may give a better one",
    "better": "whose best is better, if the intervals of all seeds say so; a crossing does not make the better model",
    "data potential": "unique tokens with which the AR at its best reaches the DLM's best, over those of the DLM; "
    "> and <=: beyond the budgets of the grid",
    "FLOPs": "of training, forward and backward, without recomputation, up to the best evaluation; at best: of the "
    "DLM over those of the AR; at equal loss: up to where the DLM reaches the AR's best",
}


def spread(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """``2.41 (2.40 to 2.42)``: mean and range, or the one value that rounding leaves; ``sign`` "+" shows every sign."""
    middle, low, high = (f"{value:{sign}.{digits}f}" for value in (mean(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def arms_table(cells: Sequence[Cell]) -> list[list[str]]:
    """A row for every kind of arm, means over seeds with their ranges; the first row is the head."""
    head = ["model", "unique tokens", "arm", "seeds", "best loss", "at epoch", "best is last", "last loss", "at epoch"]
    rows = [[*head, "FLOPs at best"]]
    for cell in cells:
        for variant, runs in cell.arms.items():
            found = [best(run.loss) for run in runs.values()]
            rows.append(
                [
                    cell.model,
                    f"{cell.unique_tokens:,}",
                    variant,
                    str(len(runs)),
                    spread([b.value for b in found]),
                    spread([b.epoch for b in found], 1),
                    f"{sum(b.at_end for b in found)} of {len(found)}",
                    spread([float(run.loss.values[-1]) for run in runs.values()]),
                    f"{mean(float(run.loss.epochs[-1]) for run in runs.values()):.1f}",
                    f"{mean(b.flops for b in found):.3g}",
                ]
            )
    return rows


def crossing_table(cells: Sequence[Cell]) -> list[list[str]]:
    """A row for every comparison of same-epoch curves; the first row is the head."""
    head = ["model", "unique tokens", "figure", "DLM against", "crossing", "at epoch", "held-out error", "last gap"]
    rows = [[*head, "+-", "at epoch"]]
    for cell in cells:
        for pairing in cell.pairings:
            found = pairing.by_seed.values()
            gaps = [c.gap for c in found if c.gap is not None]
            ends = [c.last_epoch for c in found if c.last_epoch is not None]
            rows.append(
                [
                    cell.model,
                    f"{cell.unique_tokens:,}",
                    pairing.metric,
                    pairing.variant,
                    _kinds(pairing),
                    spread(pairing.epochs, 1) if pairing.epochs else "",
                    _held_out_error(pairing),
                    spread(gaps, sign="+") if gaps else "",
                    f"{max(c.gap_ci95 for c in found if c.gap_ci95 is not None):.3f}" if gaps else "",
                    f"{mean(ends):.1f}" if ends else "",
                ]
            )
    return rows


def _kinds(pairing: Pairing) -> str:
    """``crosses``, or ``crosses 1 of 3, never 2 of 3`` where the seeds differ."""
    kinds = [comparison.kind for comparison in pairing.by_seed.values()]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    return kinds[0] if len(counts) == 1 else ", ".join(f"{k} {n} of {len(kinds)}" for k, n in counts.items())


def _held_out_error(pairing: Pairing) -> str:
    """The earliest and the latest epoch at which the seeds that cross may do so; empty where none does."""
    crossing = [comparison for comparison in pairing.by_seed.values() if comparison.kind == "crosses"]
    if not crossing:
        return ""
    late = [c.high for c in crossing if c.high is not None]
    latest = f"{max(late):.1f}" if len(late) == len(crossing) else "beyond the last"
    return f"{min(c.low for c in crossing if c.low is not None):.1f} to {latest}"


def best_table(cells: Sequence[Cell]) -> list[list[str]]:
    """A row for every cell that has pairs: best against best, and what that costs; the first row is the head."""
    head = ["model", "unique tokens", "better", "gap of the best", "+-", "data potential"]
    rows = [[*head, "FLOPs at best", "FLOPs at equal loss"]]
    for cell in cells:
        if cell.potential is None:
            continue
        gaps, errors = zip(*cell.best_gap.values(), strict=True)
        multiple = f"{cell.potential.tokens / cell.unique_tokens:.3g}x"
        at_best, at_equal_loss = _flops(cell)
        rows.append(
            [
                cell.model,
                f"{cell.unique_tokens:,}",
                cell.better,
                spread(gaps, sign="+"),
                f"{max(errors):.3f}",
                multiple if cell.potential.relation == "=" else f"{cell.potential.relation} {multiple}",
                at_best,
                at_equal_loss,
            ]
        )
    return rows


def _flops(cell: Cell) -> tuple[str, str]:
    """Multiples of the AR's training FLOPs: at best, and where the DLM reaches the AR's best loss."""
    known = [costs for costs in cell.costs.values() if math.isfinite(costs.ratio_at_best)]
    if not known:
        return "not on record", "not on record"
    equal = [ratio for costs in known if (ratio := costs.ratio_at_equal_loss) is not None]
    seeds = f" in {len(equal)} of {len(known)}" if len(equal) < len(known) else ""
    reached = f"{spread(equal, 2)}x{seeds}" if equal else "never reached"
    return f"{spread([costs.ratio_at_best for costs in known], 2)}x", reached


def markdown(cells: Sequence[Cell], unfinished: Sequence[str]) -> str:
    """The whole report."""
    tables = [arms_table(cells), crossing_table(cells), best_table(cells)]
    parts = ["# Crossover", *("\n".join(markdown_table(rows)) for rows in tables if len(rows) > 1)]
    if unfinished:
        parts.append(f"Not finished, so left out: {', '.join(unfinished)}.")
    parts.append("\n".join(f"- {name}: {text}." for name, text in DEFINITIONS.items()))
    return "\n\n".join(parts) + "\n"


def as_json(cells: Sequence[Cell], unfinished: Sequence[str]) -> dict[str, Any]:
    """All figures and curves, of every seed, as plain values; what is not finite is None."""
    described = []
    for cell in cells:
        arms = [
            {
                "name": run.arm.name,
                **asdict(run.arm),
                "best": best(run.loss)._asdict(),
                "unigram": run.unigram,
                "curves": {"loss": _lists(run.loss), **{name: _lists(curve) for name, curve in run.tasks.items()}},
            }
            for runs in cell.arms.values()
            for run in runs.values()
        ]
        described.append(
            {
                "model": cell.model,
                "unique_tokens": cell.unique_tokens,
                "arms": arms,
                "comparisons": [
                    {
                        "metric": pairing.metric,
                        "variant": pairing.variant,
                        "by_seed": {seed: c._asdict() for seed, c in pairing.by_seed.items()},
                    }
                    for pairing in cell.pairings
                ],
                "better": cell.better,
                "best_gap": {seed: {"gap": gap, "ci95": ci95} for seed, (gap, ci95) in cell.best_gap.items()},
                "flops_multiple": {seed: costs.ratio_at_best for seed, costs in cell.costs.items()},
                "flops_multiple_at_equal_loss": {seed: costs.ratio_at_equal_loss for seed, costs in cell.costs.items()},
                "data_potential": cell.potential._asdict() if cell.potential else None,
                "data_potential_by_seed": {seed: p._asdict() for seed, p in cell.potential_by_seed.items()},
            }
        )
    return _plain({"definitions": DEFINITIONS, "cells": described, "unfinished": list(unfinished)})


def _lists(curve: Curve) -> dict[str, list[float]]:
    return {name: array.tolist() for name, array in vars(curve).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
