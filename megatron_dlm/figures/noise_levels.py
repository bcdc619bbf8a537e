"""The figure of loss by noise level, for one checkpoint or two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dlm.errors import DataError
from megatron_dlm.evaluation.likelihood import LogLikelihood
from megatron_dlm.evaluation.noise_level_table import Estimate, NoiseLevelTable, compare
from megatron_dlm.figures.style import COLORS, GREY, STYLE, save


def draw(tables: Sequence[NoiseLevelTable], output: Path) -> None:
    """Draw cross-entropy and accuracy over the mask ratio, and under them the differences where there are two tables.

    Bands are 95 % intervals. The format is the one that the suffix of ``output`` names; written beside, then renamed.

    Raises:
        ConfigError: two tables cannot be compared.
        DataError: it cannot be written; then what was there before is unchanged.
    """
    import matplotlib
    from matplotlib.figure import Figure

    difference = compare(*tables) if len(tables) == 2 else None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.6, 7.6 if difference else 5.2))
        figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
        panels = figure.subplots(
            2 if difference else 1, 2, squeeze=False, sharex=True, height_ratios=[2.4, 1] if difference else [1]
        )
        for axes, field in zip(panels[0], ("cross_entropy", "accuracy"), strict=True):
            for table, color in zip(tables, COLORS, strict=False):
                _draw_curve(axes, table, field, color)
            axes.set_ylim(bottom=0)
        for table, color in zip(tables, COLORS, strict=False):
            panels[0][0].axhline(table.nelbo.value, color=color, linestyle="--", linewidth=1.2)
        panels[0][0].set(title="Cross-entropy", ylabel="nats per masked token")
        panels[0][1].set(title="Accuracy", ylabel="masked tokens predicted")
        if difference:
            for axes, field in zip(panels[1], ("cross_entropy", "accuracy"), strict=True):
                axes.axhline(0, color=COLORS[0], linewidth=1.4)
                _draw_curve(axes, difference, field, COLORS[1])
                axes.set_ylabel("difference to the first")
        for axes in panels[:, 1]:
            axes.yaxis.set_major_formatter(lambda value, _: f"{round(100 * value, 6):g} %")
        for axes in panels[-1]:
            axes.set(xlabel="mask ratio", xlim=(0, 1), xticks=np.linspace(0, 1, 11))
        _legend(figure, tables)
        try:
            save(figure, output)
        except OSError as error:
            raise DataError(f"cannot write {output}: {error.strerror}; choose another file") from None


def _draw_curve(axes: Any, table: NoiseLevelTable, field: str, color: str) -> None:
    """The means with their 95 % intervals."""
    ratios = [row.mask_ratio for row in table.rows]
    values = np.array([getattr(row, field).value for row in table.rows])
    half = np.array([_half_width(getattr(row, field), table.windows) for row in table.rows])
    axes.fill_between(ratios, values - half, values + half, color=color, alpha=0.16, linewidth=0)
    style: dict[str, Any] = {"markersize": 5.5, "markeredgecolor": "white", "markeredgewidth": 0.7, "clip_on": False}
    axes.plot(ratios, values, "o-", color=color, linewidth=1.9, zorder=3, **style)


def _legend(figure: Any, tables: Sequence[NoiseLevelTable]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for table, color in zip(tables, COLORS, strict=False):
        name = table.name if len(table.name) <= 70 else f"...{table.name[-67:]}"
        half = _half_width(table.nelbo, table.windows)
        label = f"{name}: NELBO {table.nelbo.value:.3f} \u00b1 {half:.3f} nats per token"
        handles.append(Line2D([], [], color=color, linewidth=2.5, marker="o", markeredgecolor="white", label=label))
    average = "average over the mask ratio, which is the NELBO (bands and \u00b1: 95 % intervals)"
    handles.append(Line2D([], [], color=GREY, linestyle="--", label=average))
    figure.legend(handles=handles, loc="outside upper left", ncols=1, fontsize=9.5, frameon=False)


def _half_width(estimate: Estimate, windows: int) -> float:
    """Of the 95 % interval; NaN, which is not drawn, where it is not known."""
    if not math.isfinite(estimate.standard_error):
        return math.nan
    interval = LogLikelihood(0.0, estimate.standard_error, None, windows - 1).interval95()
    assert interval is not None
    return interval[1]
