"""The figure of `megatron-dlm estimate inference`: FLOPs of generating a text, and their ratio to AR, by its length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dlm.config.tree import ModelConfig
from megatron_dlm.costs.inference import LENGTHS, Curve, InferenceCosts, inference_costs
from megatron_dlm.errors import DataError
from megatron_dlm.figures.style import BLUE, GREEN, GREY, ORANGE, RED, SKY, STYLE, save
from megatron_dlm.shipped.sampler_plan import DEFAULT_BLOCK_LENGTH

# Curves of our sampler by name: colour and label.
_LINES = {
    "DLM, L steps": (RED, "DLM, one step a token"),
    "DLM, L/4 steps": (ORANGE, "DLM, one step for 4 tokens"),
    "DLM, 32 steps": (GREEN, "DLM, 32 steps"),
    "AR, recomputed": (SKY, "AR, without a cache"),
    "AR, KV cache": (BLUE, "AR, KV cache"),
}


def draw(model: ModelConfig, vocab_size: int, output: Path, *, title: str, **options: Any) -> None:
    """Write the figure in the format that the suffix of ``output`` names; written beside, then renamed.

    Lines are what our sampler spends. Circles are the published convention at its lengths, dashed lines are its text
    that grows block by block. The other arguments are those of ``inference_costs``.

    Raises:
        DataError: it cannot be written; then what was there before is unchanged.
    """
    import matplotlib
    from matplotlib.figure import Figure

    lengths = [2**power for power in range(4, 13)]
    costs = inference_costs(model, vocab_size, lengths=lengths, **options)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.4, 5.9), layout="constrained")
        flops, ratio = figure.subplots(1, 2)
        _draw_panel(flops, costs, lambda curve: curve.flops)
        flops.set_title("FLOPs of generating a text")
        _draw_panel(ratio, costs, lambda curve: curve.ratio)
        ratio.set_title("Times the FLOPs of AR with a KV cache")
        _write_published_ratios(ratio, costs)
        ratio.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}x" if value >= 1 else f"{value:g}x")
        _legend(figure)
        figure.suptitle(title, fontsize=10, color=GREY)
        try:
            save(figure, output)
        except OSError as error:
            raise DataError(f"cannot write {output}: {error.strerror}; choose another file") from None


def _draw_panel(axes: Any, costs: InferenceCosts, values: Callable[[Curve], list[Any]]) -> None:
    """Our sampler's curves as lines, the published ones on top, both axes logarithmic."""
    ours = {curve.name: curve for curve in costs.sampler}
    for name, (color, _) in _LINES.items():
        axes.plot(costs.lengths, values(ours[name]), color=color, linewidth=2.0)
    published = {curve.name: curve for curve in costs.published}
    growing = published[f"DLM, L steps, growing by {DEFAULT_BLOCK_LENGTH}"]
    axes.plot(costs.lengths, values(growing), "--", color=GREY, linewidth=1.4)
    at = [index for index, length in enumerate(costs.lengths) if length in LENGTHS]
    for curve in costs.published[:2]:
        axes.plot(
            [costs.lengths[index] for index in at],
            [values(curve)[index] for index in at],
            "o",
            markerfacecolor="none",
            markeredgecolor=GREY,
            markersize=8,
            markeredgewidth=1.3,
            clip_on=False,
            zorder=4,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(costs.lengths[0] / 1.5, costs.lengths[-1] * 1.3)
    axes.set_xticks(costs.lengths, [f"{length:,}" for length in costs.lengths])
    axes.minorticks_off()
    axes.set_xlabel("new tokens")


def _write_published_ratios(axes: Any, costs: InferenceCosts) -> None:
    """The number beside every circle of the DLM."""
    for length, value in zip(costs.lengths, costs.published[1].ratio, strict=True):
        if length in LENGTHS:
            style: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "bottom"}
            axes.annotate(f"{value:,.0f}x", (length, value), xytext=(-6, 5), fontsize=9, color=GREY, **style)


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, label=label) for color, label in _LINES.values()]
    circle: dict[str, Any] = {"marker": "o", "linestyle": "", "markerfacecolor": "none", "markersize": 8}
    handles += [
        Line2D([], [], color=GREY, label="published convention (no prompt)", **circle),
        Line2D([], [], color=GREY, linestyle="--", label=f"the convention, text growing by {DEFAULT_BLOCK_LENGTH}"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
