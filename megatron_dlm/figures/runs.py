"""The figure of `megatron-dlm plot`: what one or several runs have learned, from their records.

Six panels; a colour is a run. Loss: the training loss (faint, with its running mean), the held-out NELBO with its 95 %
interval, and the held-out unigram cross-entropy (dotted), which token frequencies alone reach. Cross-entropy and
accuracy of the masked tokens by the mask ratio of their sequence, over the last quarter of the steps; a run that always
scores all tokens (autoregressive) is a dashed line. Gradient norm, with crosses at skipped steps. Learning rate.
Throughput of one device: tokens per second, and TFLOP/s (dashed). What is not on record is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.figures.style import COLORS, GREY, STYLE, save
from megatron_dlm.run_folder import Records, RunFolder

AXES = {
    "tokens": ("consumed_tokens", "training tokens"),
    "epochs": ("epoch", "epochs over the unique tokens"),
    "steps": ("step", "training steps"),
    "flops": ("training_flops", "training FLOPs"),
}
"""What may be on the x axis: the key of a step's record, and the label."""


class Run(NamedTuple):
    """One run's records and how it is drawn."""

    name: str
    color: str
    steps: list[dict[str, Any]]
    curves: list[list[dict[str, Any]]]
    """The evaluations, apart for each held-out data."""
    x: np.ndarray
    """[steps], in units of the axis."""

    def values(self, key: str) -> np.ndarray:
        """[steps] float; NaN where a step has none."""
        return np.array([record.get(key) for record in self.steps], dtype=float)

    def smooth(self, key: str) -> np.ndarray:
        """Running mean of ``values`` over a fiftieth of the run."""
        return running_mean(self.values(key), max(1, len(self.steps) // 50))


def read_runs(paths: Sequence[str | Path], axis: str) -> tuple[list[Run], str]:
    """The runs, and the label of the x axis.

    Args:
        paths: folders of runs, or their metrics.jsonl.
        axis: one of ``AXES``.

    Raises:
        ConfigError: a run does not record what ``axis`` needs.
        DataError: the records of a run cannot be read, or there are none of a training step.
    """
    key, label = AXES[axis]
    folders = [RunFolder.at(path) for path in paths]
    read = [_read(folder) for folder in folders]
    for folder, records in zip(folders, read, strict=True):
        if any(record.get(key) is None for record in records.steps):
            known = [name for name, (other, _) in AXES.items() if all(r.get(other) is not None for r in records.steps)]
            raise ConfigError(f"{folder.metrics} does not record {key}; choose --x from: {', '.join(known)}")
    # One unit for all runs, which share the axis.
    scale, unit = _unit(max(float(record[key]) for records in read for record in records.steps), axis)
    runs = []
    for index, (folder, records) in enumerate(zip(folders, read, strict=True)):
        x = np.array([record[key] for record in records.steps], dtype=float) / scale
        color = COLORS[index % len(COLORS)]
        runs.append(Run(folder.path.resolve().name, color, records.steps, records.curves(), x))
    return runs, label + unit


def _read(folder: RunFolder) -> Records:
    """The records of training steps and of evaluations whose loss is finite."""
    records = folder.records()
    steps = [record for record in records.steps if "loss" in record]
    if not steps:
        raise DataError(f"{folder.metrics} has no training steps; give a run's directory or its metrics.jsonl")
    return Records(steps, [record for record in records.evaluations if record["valid_nelbo"] is not None])


def _unit(largest: float, axis: str) -> tuple[float, str]:
    """What to divide the numbers of an axis by, and how its label says so."""
    if axis == "flops":
        exponent = 3 * int(np.floor(np.log10(max(largest, 1.0)) / 3))
        return 10.0**exponent, rf" ($10^{{{exponent}}}$)" if exponent else ""
    if axis == "tokens":
        for scale, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
            if largest >= scale:
                return scale, f" ({name})"
    return 1.0, ""


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the finite ones of the last ``width`` values (fewer at the start), [n] -> [n]; NaN where none is."""
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    number = count[end] - count[start]
    return np.where(number > 0, (total[end] - total[start]) / np.maximum(number, 1), np.nan)


def by_mask_ratio(steps: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Middles of the mask-ratio buckets that have tokens in the last quarter of the steps, and their means there."""
    recent = [record[key] for record in steps[-max(1, len(steps) // 4) :] if record.get(key)]
    if not recent:
        return np.empty(0), np.empty(0)
    recent = [buckets for buckets in recent if len(buckets) == len(recent[-1])]
    values = np.array(recent, dtype=float)  # None becomes NaN
    buckets = np.flatnonzero(~np.isnan(values).all(axis=0))
    return (buckets + 0.5) / values.shape[1], np.nanmean(values[:, buckets], axis=0)


def skipped(run: Run) -> np.ndarray:
    """Where on the x axis steps were skipped."""
    count = run.values("skipped")
    return run.x[np.flatnonzero(np.diff(count, prepend=0.0) > 0)]


def _draw_loss(axes: Any, runs: list[Run]) -> None:
    """Training loss, held-out NELBO, unigram cross-entropy."""
    from matplotlib.lines import Line2D

    unigrams: dict[float, str] = {}
    shown = []
    for run in runs:
        axes.plot(run.x, run.values("loss"), color=run.color, alpha=0.16, linewidth=0.7)
        axes.plot(run.x, run.smooth("loss"), color=run.color, linewidth=1.3, alpha=0.75)
        shown.append(run.smooth("loss")[len(run.x) // 100 :])
        at = {record["step"]: x for record, x in zip(run.steps, run.x, strict=True)}
        for curve in run.curves:  # not joined: they are of other held-out data
            if not (known := [record for record in curve if record["step"] in at]):
                continue
            axes.errorbar(
                [at[record["step"]] for record in known],
                [record["valid_nelbo"] for record in known],
                yerr=[record.get("valid_nelbo_ci95") or 0.0 for record in known],
                color=run.color,
                fmt="o-",
                markersize=4.5,
                markeredgecolor="white",
                markeredgewidth=0.6,
                linewidth=1.8,
                elinewidth=1.0,
                capsize=2.5,
                zorder=3,
            )
            shown.append(np.array([record["valid_nelbo"] for record in known], dtype=float))
            if known[-1].get("valid_unigram") is not None:
                unigrams.setdefault(round(known[-1]["valid_unigram"], 6), run.color)
    for value, color in unigrams.items():
        axes.axhline(value, color=color if len(unigrams) > 1 else GREY, linestyle=":", linewidth=1.4)
    # A single step is noisy; the axis shows the curves and cuts the noise.
    finite = np.concatenate([np.array(list(unigrams)), *shown])
    finite = finite[np.isfinite(finite)]
    if finite.size and finite.max() > finite.min():
        margin = 0.06 * (finite.max() - finite.min())
        axes.set_ylim(finite.min() - 2 * margin, finite.max() + margin)
    entries: list[tuple[str, Any, str, float]] = [
        ("training", "-", "", 1.0),
        ("held-out, 95 % interval", "-", "o", 2.0),
        ("held-out unigram", ":", "", 1.4),
    ]
    axes.legend(
        handles=[
            Line2D([], [], color=GREY, linestyle=line, marker=marker, markersize=4.5, linewidth=width, label=label)
            for label, line, marker, width in entries
        ],
        loc="upper right",
    )


def _draw_by_mask_ratio(axes: Any, runs: list[Run], key: str) -> None:
    """One curve a run over the mask ratio; a dashed line where there is only one bucket."""
    from matplotlib.lines import Line2D

    for run in runs:
        ratios, values = by_mask_ratio(run.steps, key)
        if len(ratios) == 1:
            axes.axhline(float(values[0]), color=run.color, linestyle="--", linewidth=1.5, label="all tokens scored")
        elif len(ratios):
            axes.plot(ratios, values, "o-", color=run.color, markersize=4.5, linewidth=1.5, markeredgecolor="white")
    axes.set_xlim(0, 1)
    axes.set_xticks(np.linspace(0, 1, 6))
    if axes.get_legend_handles_labels()[1]:
        axes.legend(handles=[Line2D([], [], color=GREY, linestyle="--", label="all tokens scored")])


def _draw_gradient_norm(axes: Any, runs: list[Run]) -> None:
    """Gradient norm on a logarithmic axis; crosses at the bottom mark skipped steps."""
    from matplotlib.lines import Line2D

    marks = False
    for run in runs:
        axes.plot(run.x, run.values("grad_norm"), color=run.color, linewidth=0.6, alpha=0.3)
        width = max(1, len(run.steps) // 50)
        with np.errstate(divide="ignore"):  # the mean of the logarithms: one spike would lift the plain mean for long
            smooth = np.exp(running_mean(np.log(run.values("grad_norm")), width))
        axes.plot(run.x, smooth, color=run.color, linewidth=1.4)
        where = skipped(run)
        if len(where):
            marks, bottom = True, axes.get_xaxis_transform()
            axes.plot(where, np.full(len(where), 0.03), "x", color=run.color, markersize=6, transform=bottom)
    axes.set_yscale("log")
    if marks:
        axes.legend(handles=[Line2D([], [], color=GREY, linestyle="", marker="x", label="skipped step")])


def _draw_learning_rate(axes: Any, runs: list[Run]) -> None:
    """Learning rate of every step."""
    for run in runs:
        axes.plot(run.x, run.values("lr"), color=run.color, linewidth=1.6)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}" if value else "0")


def _draw_throughput(axes: Any, runs: list[Run]) -> None:
    """Tokens per second on the left axis, TFLOP/s (dashed) on the right one."""
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    right.grid(False)
    right.set_ylabel("TFLOP/s per device (dashed)")
    for run in runs:
        axes.plot(run.x, run.smooth("tokens_per_second_per_device"), color=run.color, linewidth=1.6)
        right.plot(
            run.x, run.smooth("tflops_per_device"), color=run.color, linewidth=1.2, linestyle=(0, (4, 2)), alpha=0.8
        )
    # The two are proportional in one run; different margins keep its lines apart.
    for panel, margin in ((axes, 1.1), (right, 1.6)):
        top = max((np.nanmax(line.get_ydata(), initial=0.0) for line in panel.lines), default=0.0)
        panel.set_ylim(0, margin * top or 1.0)


def draw(runs: list[Run], label: str, output: Path) -> None:
    """Write the figure in the format that the suffix of ``output`` names; written beside, then renamed.

    Args:
        runs: as ``read_runs`` returns them, with the ``label`` of their x axis.
        output: the figure; its folder must be there.

    Raises:
        DataError: it cannot be written; then what was there before is unchanged.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(15.5, 8.6), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))
        _draw_panels(figure.subplots(2, 3), runs, label)
        _legend(figure, runs)
        try:
            save(figure, output)
        except OSError as error:
            raise DataError(f"cannot write {output}: {error.strerror}; choose another file") from None


def _draw_panels(panels: Any, runs: list[Run], label: str) -> None:
    """All six (an array [2, 3] of axes), with their titles; ``label`` is that of the x axis that runs share."""
    from matplotlib.ticker import PercentFormatter

    (loss, loss_by_ratio, accuracy_by_ratio), (gradient, rate, throughput) = panels
    _draw_loss(loss, runs)
    loss.set(title="Loss", ylabel="nats per token", xlabel=label)
    _draw_by_mask_ratio(loss_by_ratio, runs, "loss_by_mask_ratio")
    loss_by_ratio.set(title="Loss by mask ratio", ylabel="nats per masked token", xlabel="mask ratio")
    _draw_by_mask_ratio(accuracy_by_ratio, runs, "accuracy_by_mask_ratio")
    accuracy_by_ratio.set(title="Accuracy by mask ratio", ylabel="masked tokens predicted", xlabel="mask ratio")
    accuracy_by_ratio.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    accuracy_by_ratio.set_ylim(bottom=0)
    _draw_gradient_norm(gradient, runs)
    gradient.set(title="Gradient norm", ylabel="L2 norm before clipping", xlabel=label)
    _draw_learning_rate(rate, runs)
    rate.set(title="Learning rate", xlabel=label)
    _draw_throughput(throughput, runs)
    throughput.set(title="Throughput", ylabel="tokens per second and device", xlabel=label)
    for panel in panels.flat:
        if not any(np.isfinite(line.get_ydata(orig=False).astype(float)).any() for line in panel.lines):
            panel.text(0.5, 0.5, "not on record", transform=panel.transAxes, ha="center", color="#999999")
            panel.set_yticks([])
        if panel not in (loss_by_ratio, accuracy_by_ratio):
            panel.set_xlim(0, 1.02 * max(float(run.x[-1]) for run in runs))


def _legend(figure: Any, runs: list[Run]) -> None:
    from matplotlib.lines import Line2D

    names = [Line2D([], [], color=run.color, linewidth=3, label=run.name) for run in runs]
    figure.legend(handles=names, loc="outside upper center", ncols=min(len(runs), 6), fontsize=11, frameon=False)
