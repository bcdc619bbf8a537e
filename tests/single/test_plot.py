"""The figure of one or several runs: every axis, overlays, skipped steps, and files that have less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest

from megatron_dlm.cli import main
from megatron_dlm.figures.runs import AXES, running_mean

STEPS = 40


def record(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 5.0 / step**0.3,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "consumed_tokens": 4096 * step,
        "epoch": step / 10,
        "training_flops": 3e12 * step,
        "loss_by_mask_ratio": [1.0 + i / 10 for i in range(9)] + [None],
        "accuracy_by_mask_ratio": [0.5 - i / 20 for i in range(9)] + [None],
        "skipped": 0,
        "tokens_per_second_per_device": 1000.0 + step,
        "tflops_per_device": 0.1,
    } | changes


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    evaluation = {"step": 20, "valid_nelbo": 2.0, "valid_nelbo_ci95": 0.1, "valid_unigram": 3.0}
    lines = [json.dumps(r) for r in [*records, evaluation]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 41, "lo')  # cut short by a kill
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Masked diffusion with two skipped steps, autoregressive, and an old file."""
    bad = {"loss": None, "grad_norm": None}
    diffusion = [
        record(s, skipped=(s >= 11) + (s >= 30), **(bad if s in (11, 30) else {})) for s in range(1, STEPS + 1)
    ]
    one = {"loss_by_mask_ratio": [None] * 9 + [2.0], "accuracy_by_mask_ratio": [None] * 9 + [0.4]}
    old = [{"step": s, "loss": 4.0, "consumed_tokens": 100 * s} for s in range(1, STEPS + 1)]
    return [
        write(tmp_path / "dlm", diffusion),
        write(tmp_path / "ar", [record(s, **one) for s in range(1, STEPS + 1)]),
        write(tmp_path / "old", old),
    ]


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were drawn."""
    drawn: list[Any] = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k)
    )
    return drawn


@pytest.mark.parametrize("axis", AXES)
def test_overlay_has_all_panels_on_every_axis(axis: str, runs: list[Path], figure: list[Any], tmp_path: Path) -> None:
    output = tmp_path / "figure.png"
    assert main(["plot", *map(str, runs[:2]), "--x", axis, "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    panels = {panel.get_title(loc="left"): panel for panel in figure[0].axes if panel.get_title(loc="left")}
    assert list(panels) == [
        "Loss",
        "Loss by mask ratio",
        "Accuracy by mask ratio",
        "Gradient norm",
        "Learning rate",
        "Throughput",
    ]
    assert AXES[axis][1] in panels["Loss"].get_xlabel()
    assert not any(text.get_text() == "not on record" for panel in panels.values() for text in panel.texts)
    assert [text.get_text() for text in figure[0].legends[0].texts] == ["dlm", "ar"]
    unit = {"tokens": 4096 / 1e3, "epochs": 0.1, "steps": 1.0, "flops": 3.0}[axis]
    crosses = next(line for line in panels["Gradient norm"].lines if line.get_marker() == "x")
    np.testing.assert_allclose(crosses.get_xdata(), [11 * unit, 30 * unit])
    curve, dashed = panels["Loss by mask ratio"].lines
    assert len(curve.get_xdata()) == 9 and dashed.get_linestyle() == "--" and dashed.get_ydata()[0] == 2.0


def test_an_old_file_leaves_panels_empty(runs: list[Path], figure: list[Any], tmp_path: Path) -> None:
    assert main(["plot", str(runs[2] / "metrics.jsonl")]) == 0
    empty = [panel.get_title(loc="left") for panel in figure[0].axes if panel.texts]
    assert empty == ["Loss by mask ratio", "Accuracy by mask ratio", "Gradient norm", "Learning rate", "Throughput"]
    assert (runs[2] / "loss.png").exists()


def test_what_cannot_be_drawn_is_one_line(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("step 1\nstep 2\n")
    write(tmp_path / "untrained", [])
    for arguments, message in (
        ([str(runs[2]), "--x", "flops"], "does not record training_flops; choose --x from: tokens, steps"),
        ([str(tmp_path / "nowhere")], "No such file"),
        ([str(tmp_path / "text")], "text is no run's record"),
        ([str(tmp_path / "untrained")], "has no training steps"),
        ([str(runs[0]), "--output", str(tmp_path / "figure.gif")], "name it with one of .png, .svg, .pdf"),
        ([str(runs[0]), "--output", str(tmp_path / "new" / "figure.png")], "is no directory; make it first"),
    ):
        assert main(["plot", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_running_mean_leaves_out_what_is_not_finite() -> None:
    values = np.array([np.nan, 1.0, 3.0, np.inf, 5.0])
    np.testing.assert_allclose(running_mean(values, 2), [np.nan, 1.0, 2.0, 3.0, 5.0])
