"""How all figures look, and whether one can be written."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.files import check_file_output, written_beside

SUFFIXES = (".png", ".svg", ".pdf")

BLUE, RED, GREEN, PINK, SKY, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
"""Okabe and Ito's colours, which the colour-blind can tell apart."""
GREY = "#444444"
COLORS = (BLUE, RED, GREEN, PINK, SKY, ORANGE, "#555555")
"""For several of a kind, in this order."""

STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": "#999999",
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "font.family": "DejaVu Sans",
}
"""For ``matplotlib.rc_context``."""


def check_figure_output(output: Path) -> None:
    """Find what would keep a figure from being written, before anything is computed.

    Raises:
        ConfigError: ``output`` has another suffix than .png, .svg or .pdf; one line.
        DataError: matplotlib is not installed, or as ``check_file_output``; one line.
    """
    if find_spec("matplotlib") is None:
        raise DataError("a figure needs the package matplotlib: pip install 'megatron-dlm[log]'")
    if output.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--output {output} is no figure; name it with one of {', '.join(SUFFIXES)}")
    check_file_output(output, "--output")


def save(figure: Any, output: Path) -> None:
    """Write a figure in the format that the suffix of ``output`` names; beside, then renamed.

    Raises ``OSError`` where it cannot be written; then what was at ``output`` is still there.
    """
    with written_beside(output) as partial:
        figure.savefig(partial, dpi=140, format=output.suffix.lower().removeprefix("."))
