"""Draws what one or several runs have learned, from their metrics.jsonl.

    python tools/plot.py runs/demo [runs/other ...] [--x tokens|epochs|steps|flops] [--output FILE.png]

Six panels; a colour is a run. Loss: the training loss (faint, with its running mean), the held-out NELBO with its 95 %
interval, and the held-out unigram cross-entropy (dotted), which token frequencies alone reach. Cross-entropy and
accuracy of the masked tokens by the mask ratio of their sequence, over the last quarter of the steps; a run that always
scores all tokens (autoregressive) is a dashed line. Gradient norm, with crosses at skipped steps. Learning rate.
Throughput of one device: tokens per second, and TFLOP/s (dashed). What a file does not have is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

from megatron_dlm.figures.style import COLORS, STYLE  # noqa: E402

AXES = {
    "tokens": ("consumed_tokens", "training tokens"),
    "epochs": ("epoch", "epochs over the unique tokens"),
    "steps": ("step", "training steps"),
    "flops": ("training_flops", "training FLOPs"),
}


class Run(NamedTuple):
    """One run's records and how it is drawn."""

    name: str
    color: str
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    x: np.ndarray
    """[steps], in units of the axis."""

    def values(self, key: str) -> np.ndarray:
        """[steps] float; NaN where a step has none."""
        return np.array([record.get(key) for record in self.steps], dtype=float)

    def smooth(self, key: str) -> np.ndarray:
        """Running mean of ``values`` over a fiftieth of the run."""
        return running_mean(self.values(key), max(1, len(self.steps) // 50))


def read_records(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training records, evaluation records) of a metrics.jsonl. Raises ``ValueError`` where there are none."""
    steps, evaluations = [], []
    if path.is_dir():
        path = path / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a run's directory or its metrics.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # cut short by a kill
                break
            raise ValueError(f"{path}:{number} is not JSON; give a run's metrics.jsonl") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number} is not a record; give a run's metrics.jsonl")
        if "valid_nelbo" in record:
            if record["valid_nelbo"] is not None:  # not finite
                evaluations.append(record)
        elif {"step", "loss"} <= record.keys():
            steps.append(record)
    if not steps:
        raise ValueError(f"{path} has no training steps; give a run's metrics.jsonl")
    return steps, evaluations


def read_runs(paths: Sequence[Path], axis: str) -> tuple[list[Run], str]:
    """The runs, and the label of the x axis. Raises ``ValueError`` for files that cannot be drawn over ``axis``."""
    key, label = AXES[axis]
    read = [read_records(path) for path in paths]
    for path, (steps, _) in zip(paths, read, strict=True):
        if any(record.get(key) is None for record in steps):
            known = [
                name for name, (other, _) in AXES.items() if all(record.get(other) is not None for record in steps)
            ]
            raise ValueError(f"{path} does not record {key}; choose --x from: {', '.join(known)}")
    largest = max(float(record[key]) for steps, _ in read for record in steps)
    scale, unit = _unit(largest, axis)
    runs = []
    for index, (path, (steps, evaluations)) in enumerate(zip(paths, read, strict=True)):
        name = path.resolve().name if path.is_dir() else path.resolve().parent.name
        x = np.array([record[key] for record in steps], dtype=float) / scale
        runs.append(Run(name, COLORS[index % len(COLORS)], steps, evaluations, x))
    return runs, label + unit


def _unit(largest: float, axis: str) -> tuple[float, str]:
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
    values = np.array(recent, dtype=float)  # None becomes NaN
    buckets = np.flatnonzero(~np.isnan(values).all(axis=0))
    return (buckets + 0.5) / values.shape[1], np.nanmean(values[:, buckets], axis=0)


def skipped(run: Run) -> np.ndarray:
    """Where on the x axis steps were skipped."""
    count = run.values("skipped")
    return run.x[np.flatnonzero(np.diff(count, prepend=0.0) > 0)]


def draw_loss(axes: Axes, runs: list[Run]) -> None:
    """Training loss, held-out NELBO, unigram cross-entropy."""
    unigrams: dict[float, str] = {}
    shown = []
    for run in runs:
        axes.plot(run.x, run.values("loss"), color=run.color, alpha=0.16, linewidth=0.7)
        axes.plot(run.x, run.smooth("loss"), color=run.color, linewidth=1.3, alpha=0.75)
        shown.append(run.smooth("loss")[len(run.x) // 100 :])
        at = {record["step"]: x for record, x in zip(run.steps, run.x, strict=True)}
        known = [record for record in run.evaluations if record["step"] in at]
        if known:
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
        axes.axhline(value, color=color if len(unigrams) > 1 else "#444444", linestyle=":", linewidth=1.4)
    # A single step is noisy; the axis shows the curves and cuts the noise.
    finite = np.concatenate([np.array(list(unigrams)), *shown])
    finite = finite[np.isfinite(finite)]
    if finite.size and finite.max() > finite.min():
        margin = 0.06 * (finite.max() - finite.min())
        axes.set_ylim(finite.min() - 2 * margin, finite.max() + margin)
    entries = [
        ("training", "-", "", 1.0),
        ("held-out, 95 % interval", "-", "o", 2.0),
        ("held-out unigram", ":", "", 1.4),
    ]
    axes.legend(
        handles=[
            Line2D([], [], color="#444444", linestyle=line, marker=marker, markersize=4.5, linewidth=width, label=label)
            for label, line, marker, width in entries
        ],
        loc="upper right",
    )


def draw_by_mask_ratio(axes: Axes, runs: list[Run], key: str) -> None:
    """One curve a run over the mask ratio; a dashed line where there is only one bucket."""
    for run in runs:
        ratios, values = by_mask_ratio(run.steps, key)
        if len(ratios) == 1:
            axes.axhline(float(values[0]), color=run.color, linestyle="--", linewidth=1.5, label="all tokens scored")
        elif len(ratios):
            axes.plot(ratios, values, "o-", color=run.color, markersize=4.5, linewidth=1.5, markeredgecolor="white")
    axes.set_xlim(0, 1)
    axes.set_xticks(np.linspace(0, 1, 6))
    if axes.get_legend_handles_labels()[1]:
        axes.legend(handles=[Line2D([], [], color="#444444", linestyle="--", label="all tokens scored")])


def draw_gradient_norm(axes: Axes, runs: list[Run]) -> None:
    """Gradient norm on a logarithmic axis; crosses at the bottom mark skipped steps."""
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
        axes.legend(handles=[Line2D([], [], color="#444444", linestyle="", marker="x", label="skipped step")])


def draw_learning_rate(axes: Axes, runs: list[Run]) -> None:
    """Learning rate of every step."""
    for run in runs:
        axes.plot(run.x, run.values("lr"), color=run.color, linewidth=1.6)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}" if value else "0")


def draw_throughput(axes: Axes, runs: list[Run]) -> None:
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


def draw(paths: Sequence[Path], output: Path, axis: str = "tokens") -> None:
    """Write the figure. Raises ``ValueError`` or ``OSError`` for files that cannot be drawn."""
    runs, label = read_runs(paths, axis)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, 3, figsize=(15.5, 8.6), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
        (loss, loss_by_ratio, accuracy_by_ratio), (gradient, rate, throughput) = panels
        draw_loss(loss, runs)
        loss.set(title="Loss", ylabel="nats per token", xlabel=label)
        draw_by_mask_ratio(loss_by_ratio, runs, "loss_by_mask_ratio")
        loss_by_ratio.set(title="Loss by mask ratio", ylabel="nats per masked token", xlabel="mask ratio")
        draw_by_mask_ratio(accuracy_by_ratio, runs, "accuracy_by_mask_ratio")
        accuracy_by_ratio.set(title="Accuracy by mask ratio", ylabel="masked tokens predicted", xlabel="mask ratio")
        accuracy_by_ratio.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
        accuracy_by_ratio.set_ylim(bottom=0)
        draw_gradient_norm(gradient, runs)
        gradient.set(title="Gradient norm", ylabel="L2 norm before clipping", xlabel=label)
        draw_learning_rate(rate, runs)
        rate.set(title="Learning rate", xlabel=label)
        draw_throughput(throughput, runs)
        throughput.set(title="Throughput", ylabel="tokens per second and device", xlabel=label)
        for panel in panels.flat:
            if not any(np.isfinite(line.get_ydata(orig=False).astype(float)).any() for line in panel.lines):
                panel.text(0.5, 0.5, "not on record", transform=panel.transAxes, ha="center", color="#999999")
                panel.set_yticks([])
            if panel not in (loss_by_ratio, accuracy_by_ratio):
                panel.set_xlim(0, 1.02 * max(float(run.x[-1]) for run in runs))
        names = [Line2D([], [], color=run.color, linewidth=3, label=run.name) for run in runs]
        figure.legend(handles=names, loc="outside upper center", ncols=min(len(runs), 6), fontsize=11, frameon=False)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=130)
        plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", nargs="+", type=Path, help="directory of a run, or its metrics.jsonl")
    parser.add_argument("--x", choices=AXES, default="tokens", help="the x axis of what changes over training")
    parser.add_argument("--output", type=Path, help="the figure (default: loss.png beside the first file)")
    options = parser.parse_args(arguments)
    first = options.metrics[0]
    output = options.output or (first / "loss.png" if first.is_dir() else first.with_name("loss.png"))
    if not output.suffix:
        parser.error(f"--output {output} has no suffix, such as .png, .svg or .pdf")
    try:
        draw(options.metrics, output, options.x)
    except (ValueError, OSError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
