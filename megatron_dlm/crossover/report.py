"""What a grid of paired runs says: the table, and a verdict in words that claims no more than was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_dlm.crossover.cells import Cell, Pairing, mean
from megatron_dlm.crossover.curves import Comparison, Curve, Potential, best
from megatron_dlm.formatting import format_count

DEFINITIONS = {
    "loss": "held-out nats per token: of a DLM the NELBO, a bound that its likelihood may beat; of an AR exact",
    "crossing": "the epoch from which on the DLM is better than the AR at equal epochs, linear between evaluations",
    "intervals": "(a to b) is the range over seeds; +- is the 95 % interval of the held-out error, from the sequences",
    "best": "of all evaluations of a run, so chosen on the held-out data; of the AR also over its variants",
    "data potential": "unique tokens with which the AR at its best reaches the DLM's best, over those of the DLM",
    "FLOPs": "of training, forward and backward, without recomputation, up to the best evaluation",
}


def spread(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """``2.41 (2.40 to 2.42)``: mean and range, or the one value that rounding leaves; ``sign`` "+" shows every sign."""
    middle, low, high = (f"{value:{sign}.{digits}f}" for value in (mean(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def table(cells: Sequence[Cell]) -> str:
    """Every kind of arm on a line of a Markdown table, means over seeds with their ranges."""
    rows = [
        ["model", "unique tokens", "arm", "seeds", "best loss", "at epoch", "last loss", "at epoch", "FLOPs at best"]
    ]
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
                    spread([float(run.loss.values[-1]) for run in runs.values()]),
                    f"{mean(float(run.loss.epochs[-1]) for run in runs.values()):.1f}",
                    f"{mean(b.flops for b in found):.3g}",
                ]
            )
    return _markdown(rows)


def crossing_table(cells: Sequence[Cell]) -> str:
    """Every comparison of same-epoch curves on a line of a Markdown table."""
    rows = [["model", "unique tokens", "figure", "DLM against", "seeds that cross", "at epoch", "last gap", "at epoch"]]
    for cell in cells:
        for pairing in cell.pairings:
            known = [c for c in pairing.by_seed.values() if c.gap is not None and c.last_epoch is not None]
            rows.append(
                [
                    cell.model,
                    f"{cell.unique_tokens:,}",
                    pairing.metric,
                    pairing.variant,
                    f"{len(pairing.epochs)} of {len(pairing.by_seed)}",
                    spread(pairing.epochs, 1) if pairing.epochs else "none",
                    spread([c.gap for c in known if c.gap is not None], sign="+") if known else "",
                    f"{mean(c.last_epoch for c in known):.1f}" if known else "",
                ]
            )
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def verdict(cell: Cell) -> list[str]:
    """Sentences on one cell: same-epoch crossings, best against best, data potential, FLOPs."""
    if not cell.pairings:
        return ["No finished pair of a DLM and an AR with one seed: nothing can be compared."]
    lines = [_crossing_sentence(pairing) for pairing in cell.pairings]
    return [*lines, _best_sentence(cell), _potential_sentence(cell), _flops_sentence(cell)]


def _crossing_sentence(pairing: Pairing) -> str:
    figure = "loss" if pairing.metric == "loss" else f"`{pairing.metric}`"
    unit = " nats per token" if pairing.metric == "loss" else ""
    known = {seed: c for seed, c in pairing.by_seed.items() if c.kind != "apart"}
    start = f"Same epochs, {figure}, DLM against {pairing.variant}: "
    if not known:
        return start + "fewer than two common epochs, so nothing can be compared."
    found = [_crossings([c for c in known.values() if c.kind == "crosses"], pairing.epochs)] if pairing.epochs else []
    kinds = {
        "crosses": found[0] if found else "",
        "always": "the DLM is better from the first evaluation on",
        "never": "no crossing, the DLM is not better at the last common epoch",
    }
    parts = []
    for kind, words in kinds.items():
        seeds = [str(seed) for seed, c in known.items() if c.kind == kind]
        if seeds:
            parts.append(words if len(seeds) == len(known) else f"in {len(seeds)} of {len(known)} seeds {words}")
    compared = list(known.values())
    gaps = [c.gap for c in compared if c.gap is not None]
    error = max(c.gap_ci95 for c in compared if c.gap_ci95 is not None)
    epoch = mean(c.last_epoch for c in compared if c.last_epoch is not None)
    parts.append(
        f"at the last common epoch ({epoch:.1f}) DLM minus AR is {spread(gaps, sign='+')} +- {error:.3f}{unit}"
    )
    return start + "; ".join(parts) + "."


def _crossings(crossing: Sequence[Comparison], epochs: Sequence[float]) -> str:
    """Where they cross, in words, with both kinds of error."""
    earliest = min(c.low for c in crossing if c.low is not None)
    late = [c.high for c in crossing if c.high is not None]
    latest = f"{max(late):.1f}" if len(late) == len(crossing) else "beyond the last"
    several = max(c.crossings for c in crossing)
    repeated = f", the last of up to {several} crossings" if several > 1 else ""
    error = f"with the held-out error {earliest:.1f} to {latest}"
    return f"the curves cross at epoch {spread(epochs, 1)}{repeated}, {error}"


def _best_sentence(cell: Cell) -> str:
    gaps, errors = zip(*cell.best_gap.values(), strict=True)
    dlm = [cell.best("DLM", seed) for seed in cell.pairs]
    ar = [b for seed in cell.pairs if (b := cell.best_ar(seed))]
    values = (
        f"DLM {spread([b.value for b in dlm])} at epoch {spread([b.epoch for b in dlm], 1)}, "
        f"AR {spread([b.value for b in ar])} at epoch {spread([b.epoch for b in ar], 1)}"
    )
    if all(gap + error < 0 for gap, error in cell.best_gap.values()):
        claim = "the best DLM is better than the best AR"
    elif all(gap - error > 0 for gap, error in cell.best_gap.values()):
        claim = "the best AR is better than the best DLM"
        if any(p.epochs and p.metric == "loss" for p in cell.pairings):
            claim += " (a crossing of same-epoch curves does not make the better model)"
    else:
        claim = "which is better is not decided"
    late = "; the DLM's best is its last evaluation, so longer training may move this and what follows"
    rest = late if any(b.at_end for b in dlm) else ""
    return f"Best against best: {claim}: {values}, difference {spread(gaps, sign='+')} +- {max(errors):.3f}{rest}."


def _potential_sentence(cell: Cell) -> str:
    potential = cell.potential
    assert potential is not None, "a pair has a potential"
    each = [_multiple(p, cell) for p in cell.potential_by_seed.values()]
    seeds = f" (by seed: {', '.join(each)})" if len(set(each)) > 1 else ""
    start = f"Data potential at {cell.unique_tokens:,} unique tokens: {_multiple(potential, cell)}{seeds}: "
    if potential.relation == ">":
        return (
            f"{start}not reached within the grid, with up to {potential.tokens:,.0f} no AR is as good as the best DLM."
        )
    if potential.relation == "<=":
        return f"{start}with {potential.tokens:,.0f}, the smallest budget, the best AR is no worse than the best DLM."
    return f"{start}the best AR is as good as the best DLM with about {format_count(potential.tokens)}, interpolated."


def _multiple(potential: Potential, cell: Cell) -> str:
    words = {"=": "", ">": "more than ", "<=": "at most "}
    return f"{words[potential.relation]}{potential.tokens / cell.unique_tokens:.3g}x"


def _flops_sentence(cell: Cell) -> str:
    known = [costs for costs in cell.costs.values() if math.isfinite(costs.ratio_at_best)]
    if not known:
        return "Training FLOPs: not on record."
    equal = [ratio for costs in known if (ratio := costs.ratio_at_equal_loss) is not None]
    seeds = f" in {len(equal)} of {len(known)} seeds" if len(equal) < len(known) else ""
    reached = f"it gets to the AR's best loss with {spread(equal, 2)}{seeds}" if equal else "it never gets there"
    at_best = spread([costs.ratio_at_best for costs in known], 2)
    return f"Training FLOPs: the DLM at its best has used {at_best} times those of the AR at its best loss; {reached}."


def markdown(cells: Sequence[Cell], unfinished: Sequence[str]) -> str:
    """The whole report."""
    parts = ["# Crossover", table(cells), crossing_table(cells)]
    for cell in cells:
        parts.append(f"## {cell.model}, {cell.unique_tokens:,} unique tokens")
        parts.append("\n".join(f"- {line}" for line in verdict(cell)))
    if unfinished:
        parts.append(f"Not finished, so left out: {', '.join(unfinished)}.")
    parts.append("\n".join(f"{name}: {text}." for name, text in DEFINITIONS.items()))
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
                "best_gap": {seed: {"gap": gap, "ci95": ci95} for seed, (gap, ci95) in cell.best_gap.items()},
                "flops_multiple": {seed: costs.ratio_at_best for seed, costs in cell.costs.items()},
                "flops_multiple_at_equal_loss": {seed: costs.ratio_at_equal_loss for seed, costs in cell.costs.items()},
                "data_potential": cell.potential._asdict() if cell.potential else None,
                "data_potential_by_seed": {seed: p._asdict() for seed, p in cell.potential_by_seed.items()},
                "verdict": verdict(cell),
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
