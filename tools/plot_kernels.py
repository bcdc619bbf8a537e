"""Draws the figure and prints the table of a kernel benchmark, from its results file and nothing else.

    python tools/plot_kernels.py benchmarks/results/kernels-<gpu>-<date>*.json [--output FILE.png]

Left: the loss on logits, milliseconds and the share of the card's own copy bandwidth. Right: LM head and loss at the
largest shape; hatched bars compute every token, plain ones the masked half, which is all that has a loss.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)

OURS, PEER = "#0072B2", "#BBBBBB"


def read(path: Path) -> dict[str, Any]:
    """The results. Raises ``ValueError`` for a file that is none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if {"device", "date", "rows", "ceilings"} <= result.keys():
            return result
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{path} is no results file; tools/benchmark_kernels.py writes them")


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One benchmark that was measured in several parts. Raises ``ValueError`` if the devices or dates differ."""
    if len({(result["device"], result["date"]) for result in results}) > 1:
        raise ValueError("the files are of several devices or dates; give those of one")
    return {**results[0], "rows": [row for result in results for row in result["rows"]]}


def largest(result: dict[str, Any], kernel: str) -> list[dict[str, Any]]:
    """The timed rows of a kernel at its largest shape, fastest first."""
    rows = [row for row in result["rows"] if row["kernel"] == kernel and "ms" in row]
    keys = ("vocab", "hidden", "tokens", "rows", "batch", "seq")

    def shape(row: dict[str, Any]) -> tuple[int, ...]:
        return tuple(row.get(key, 0) for key in keys)

    top = max((shape(row) for row in rows), default=())
    return sorted((row for row in rows if shape(row) == top), key=lambda row: row["ms"])


def table(result: dict[str, Any]) -> str:
    """A markdown table of the largest shapes."""
    lines = ["| kernel | shape | implementation | ms | of the ceiling | note |", "|---|---|---|---|---|---|"]
    for kernel in ("mask_tokens", "cross_entropy", "linear_cross_entropy"):
        for row in largest(result, kernel):
            keys = ("batch", "seq", "rows", "tokens", "hidden", "vocab")
            shape = " ".join(f"{key} {row[key]}" for key in keys if key in row)
            ceiling = row.get("of_copy", row.get("of_gemm"))
            share = "" if ceiling is None else f"{100 * ceiling:.0f} %"
            name = row["implementation"] + (f", {row['form']}" if "form" in row else "")
            lines.append(f"| {kernel} | {shape} | {name} | {row['ms']:.4g} | {share} | {row['note']} |")
    return "\n".join(lines)


def draw(result: dict[str, Any], output: Path) -> None:
    """Write the figure."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    titles = {"cross_entropy": "Cross-entropy of logits", "linear_cross_entropy": "LM head and cross-entropy"}
    for axes, (kernel, title) in zip(panels, titles.items(), strict=True):
        rows = largest(result, kernel)[::-1]
        if not rows:
            axes.set_axis_off()
            continue
        names = [row["implementation"] + (f" ({row['form']})" if "form" in row else "") for row in rows]
        colors = [OURS if row["implementation"].startswith("ours") else PEER for row in rows]
        bars = axes.barh(names, [row["ms"] for row in rows], color=colors)
        for bar, row in zip(bars, rows, strict=True):
            if row.get("form") == "dense":
                bar.set_hatch("//")
            axes.text(bar.get_width(), bar.get_y() + bar.get_height() / 2, f" {row['ms']:.3g}", va="center", fontsize=8)
        shape = ", ".join(f"{key} {rows[0][key]}" for key in ("rows", "tokens", "hidden", "vocab") if key in rows[0])
        axes.set(title=f"{title} ({shape})", xlabel="milliseconds, forward and backward")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result['device']}, {result['date']}")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files of tools/benchmark_kernels.py, parts of one run")
    parser.add_argument("--output", type=Path, help="the figure (default: beside the file, .png)")
    options = parser.parse_args(arguments)
    output = options.output or options.results[0].with_suffix(".png")
    try:
        result = merge([read(path) for path in options.results])
        draw(result, output)
    except (ValueError, OSError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    print(table(result))
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
