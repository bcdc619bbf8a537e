"""Draws the loss curves of one or several runs.

    python tools/plot.py runs/demo [runs/other ...] [--output FILE.png]

Left: training loss (faint, with its running mean) and held-out NELBO with its 95 % interval, over training tokens; the
dotted line is the held-out unigram cross-entropy, which token frequencies alone reach. Middle: cross-entropy of the
masked tokens by the mask ratio of their sequence, over the last quarter of the steps. Right: gradient norm and learning
rate over steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)

STEP_KEYS = {"step", "loss", "grad_norm", "lr", "consumed_tokens", "loss_by_mask_ratio"}


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
        if "valid_nelbo" in record:
            evaluations.append(record)
        elif STEP_KEYS <= record.keys():
            steps.append(record)
    if not steps:
        raise ValueError(f"{path} has no training steps; give a run's metrics.jsonl")
    return steps, evaluations


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the finite ones of the last ``width`` values (fewer at the start), [n] -> [n]."""
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    return (total[end] - total[start]) / np.maximum(count[end] - count[start], 1)


def loss_by_mask_ratio(steps: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Middles of the mask-ratio buckets that have tokens, and their mean cross-entropy over the steps."""
    values = np.array([r["loss_by_mask_ratio"] for r in steps], dtype=float)  # None becomes NaN
    buckets = np.flatnonzero(~np.isnan(values).all(axis=0))
    return (buckets + 0.5) / values.shape[1], np.nanmean(values[:, buckets], axis=0)


def draw(paths: list[Path], output: Path) -> None:
    """Write the figure. Raises ``ValueError`` or ``OSError`` for files that cannot be drawn."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.5), width_ratios=[3, 2, 2], layout="constrained")
    left, middle, right = panels
    rates = right.twinx()
    unigrams: dict[float, str] = {}
    for index, path in enumerate(paths):
        steps, evaluations = read_records(path)
        color, name = f"C{index}", path.name if path.is_dir() else path.parent.name or path.stem
        tokens = np.array([r["consumed_tokens"] for r in steps]) / 1e6
        loss = np.array([r["loss"] for r in steps], dtype=float)  # None, of a skipped step, becomes NaN
        left.plot(tokens, loss, color=color, alpha=0.2, linewidth=0.8)
        smooth = running_mean(loss, max(1, len(loss) // 50))
        left.plot(tokens, smooth, color=color, linewidth=1.6, label=f"{name}: training loss")
        if evaluations:
            at = {r["step"]: x for r, x in zip(steps, tokens, strict=True)}
            shown = [r for r in evaluations if r["step"] in at]
            left.errorbar(
                [at[r["step"]] for r in shown],
                [r["valid_nelbo"] for r in shown],
                yerr=[r["valid_nelbo_ci95"] or 0.0 for r in shown],
                color=color,
                fmt="o--",
                markersize=4,
                capsize=2,
                label=f"{name}: held-out NELBO (95 %)",
            )
            unigrams.setdefault(round(evaluations[-1]["valid_unigram"], 6), color)
        ratios, by_ratio = loss_by_mask_ratio(steps[-max(1, len(steps) // 4) :])
        middle.plot(ratios, by_ratio, "o-", color=color, markersize=4, label=name)
        number, norms = [r["step"] for r in steps], [r["grad_norm"] or np.nan for r in steps]
        right.plot(number, norms, color=color, linewidth=0.8, label=f"{name}: gradient norm")
        rates.plot(number, [r["lr"] for r in steps], color=color, linestyle="--", linewidth=1.2)
    for value, color in unigrams.items():
        left.axhline(value, color=color, linestyle=":", label="held-out unigram cross-entropy")
    left.set(xlabel="training tokens (millions)", ylabel="nats per token", title="Loss")
    middle.set(xlabel="mask ratio", ylabel="nats per masked token", title="Loss by noise level", xlim=(0, 1))
    right.set(xlabel="step", ylabel="gradient norm", yscale="log", title="Optimisation")
    rates.set_ylabel("learning rate (dashed)")
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, framealpha=0.6, loc="best" if panel is not right else "lower left")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", nargs="+", type=Path, help="directory of a run, or its metrics.jsonl")
    parser.add_argument("--output", type=Path, help="the figure (default: loss.png beside the first file)")
    options = parser.parse_args(arguments)
    first = options.metrics[0]
    output = options.output or (first / "loss.png" if first.is_dir() else first.with_name("loss.png"))
    try:
        draw(options.metrics, output)
    except (ValueError, OSError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
