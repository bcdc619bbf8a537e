"""The figure of a crossover: one panel for each model, budget and metric, over epochs or over training FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_dlm.crossover.cells import Cell, Pairing, mean
from megatron_dlm.crossover.curves import Curve, Run, mean_curve
from megatron_dlm.figures.style import BLUE, COLORS, GREY, RED, STYLE, save

Axis = Literal["epochs", "flops"]

_LABELS = {"epochs": "epochs over the unique tokens", "flops": "training FLOPs"}
# The DLM's first, then the AR's.
_COLORS = (RED, BLUE, *COLORS[2:])


def draw(cells: Sequence[Cell], output: Path, axis: Axis = "epochs") -> None:
    """Write the figure in the format that the suffix of ``output`` names; written beside, then renamed.

    Columns are budgets of unique tokens; rows are models, and under each its tasks, where they are on record. A thin
    line is a seed, the thick one the mean over seeds, a circle its best. Over epochs a star marks where the means of
    DLM and AR cross for good, with the range over seeds; over FLOPs, where nothing is at equal epochs, nothing does.
    Raises ``OSError`` where it cannot be written.
    """
    budgets = sorted({cell.unique_tokens for cell in cells})
    variants = sorted({variant for cell in cells for variant in cell.arms}, key=lambda name: (name != "DLM", name))
    colors = {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(variants)}
    rows = [(model, metric) for model in dict.fromkeys(c.model for c in cells) for metric in _metrics(cells, model)]
    with matplotlib.rc_context(STYLE):
        size = (max(6.4, 4.4 * len(budgets)), 3.7 * len(rows) + 0.7)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(rows), len(budgets), squeeze=False)
        by_key = {(cell.model, cell.unique_tokens): cell for cell in cells}
        for (model, metric), line in zip(rows, panels, strict=True):
            for budget, axes in zip(budgets, line, strict=True):
                cell = by_key.get((model, budget))
                if cell is None or not _draw_panel(axes, cell, metric, axis, colors):
                    axes.axis("off")
        _legend(figure, colors, axis, several=any(len(runs) > 1 for cell in cells for runs in cell.arms.values()))
        save(figure, output)


def _metrics(cells: Sequence[Cell], model: str) -> list[str]:
    """The loss, then the tasks that any run of this model has."""
    runs = [run for cell in cells if cell.model == model for seeds in cell.arms.values() for run in seeds.values()]
    return ["loss", *sorted({task for run in runs for task in run.tasks})]


def _curve(run: Run, metric: str) -> Curve | None:
    return run.loss if metric == "loss" else run.tasks.get(metric)


def _draw_panel(axes: Axes, cell: Cell, metric: str, axis: Axis, colors: dict[str, str]) -> bool:
    """The curves of one cell in one metric. Returns whether there are any."""
    means: dict[str, Curve] = {}
    for variant, runs in cell.arms.items():
        curves = [curve for run in runs.values() if (curve := _curve(run, metric)) is not None]
        if not curves:
            continue
        if len(curves) > 1:
            for curve in curves:
                axes.plot(_x(curve, axis), curve.values, color=colors[variant], linewidth=0.9, alpha=0.45)
        means[variant] = average = mean_curve(curves)
        axes.plot(_x(average, axis), average.values, color=colors[variant], linewidth=2.0, zorder=3)
        if metric == "loss" and len(average.values):
            index = int(np.argmin(average.values))
            place = (_x(average, axis)[index], average.values[index])
            axes.plot(*place, "o", color=colors[variant], markersize=6, markeredgecolor="white", zorder=4)
    unigrams = [run.unigram for runs in cell.arms.values() for run in runs.values() if run.unigram is not None]
    if metric == "loss" and unigrams:
        axes.axhline(mean(unigrams), color=GREY, linestyle=":", linewidth=1.3)
    if axis == "epochs":
        axes.set_xlim(left=0)
        for pairing in cell.pairings:
            if pairing.metric == metric:
                _mark_crossing(axes, pairing, means, colors)
    else:
        axes.set_xscale("log")
    axes.set_title(f"{cell.model}, {cell.unique_tokens:,} unique tokens", fontweight="bold")
    axes.set_ylabel("held-out nats per token" if metric == "loss" else metric)
    axes.set_xlabel(_LABELS[axis])
    return bool(means)


def _x(curve: Curve, axis: Axis) -> np.ndarray:
    return curve.epochs if axis == "epochs" else curve.flops


def _mark_crossing(axes: Axes, pairing: Pairing, means: dict[str, Curve], colors: dict[str, str]) -> None:
    """A star on the AR's mean curve at the mean crossing epoch, and its range over seeds; none where none crosses."""
    if not pairing.epochs:
        return
    color, epoch, ar = colors[pairing.variant], mean(pairing.epochs), means[pairing.variant]
    value = float(np.interp(epoch, ar.epochs, ar.values))
    if len(pairing.epochs) > 1:
        axes.axvspan(min(pairing.epochs), max(pairing.epochs), color=color, alpha=0.12, linewidth=0)
    axes.plot(epoch, value, "*", color="#FFD23F", markersize=15, markeredgecolor="black", markeredgewidth=0.8, zorder=5)
    share = "" if len(pairing.epochs) == len(pairing.by_seed) else f"\n{len(pairing.epochs)}/{len(pairing.by_seed)}"
    style: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "fontsize": 8.5, "zorder": 6}
    axes.annotate(f"epoch {epoch:.1f}{share}", (epoch, value), xytext=(-6, 10), **style)


def _legend(figure: Figure, colors: dict[str, str], axis: Axis, *, several: bool) -> None:
    handles = [Line2D([], [], color=color, linewidth=2.5, label=name) for name, color in colors.items()]
    if several:
        handles.append(Line2D([], [], color=GREY, linewidth=0.9, alpha=0.6, label="one seed"))
    handles.append(Line2D([], [], color=GREY, linestyle="", marker="o", markersize=6, label="best of the mean"))
    if axis == "epochs":
        mark: dict[str, Any] = {"linestyle": "", "marker": "*", "markersize": 12, "color": "#FFD23F"}
        handles.append(Line2D([], [], label="the curves cross", markeredgecolor="black", **mark))
    handles.append(Line2D([], [], color=GREY, linestyle=":", linewidth=1.3, label="unigram cross-entropy"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=9, frameon=False)
