"""Memory and time of a planned run, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dlm.figures.style import COLORS, STYLE, save
from megatron_dlm.rehearsal.machines import Machine
from megatron_dlm.rehearsal.prediction import Prediction


def draw(prediction: Prediction, machine: Machine, output: Path, *, title: str) -> None:
    """Two panels of stacked bars: bytes of a rank against the card's, and milliseconds of a micro-batch.

    Raises ``OSError`` where it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        figure, (memory, time) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
        figure.suptitle(title, fontsize=11)
        _bars(memory, prediction.memory, 1e-9)
        memory.axhline(machine.memory / 1e9, color="#444444", linestyle=":", linewidth=1.2)
        memory.set(title="Memory of a rank, every token masked (GB)")
        _bars(time, prediction.stages, 1e3)
        time.set(title=f"A micro-batch (ms); the step {prediction.seconds:.2f} s, MFU {100 * prediction.mfu:.0f} %")
        save(figure, output)
        pyplot.close(figure)


def _bars(axes: Any, stages: Sequence[Any], scale: float) -> None:
    names = ["first", "middle", "last"] if len(stages) == 3 else ["first", "last"][: len(stages)]
    bottom = [0.0] * len(stages)
    for color, field in zip(COLORS, stages[0]._fields, strict=False):
        heights = [getattr(stage, field) * scale for stage in stages]
        axes.bar(names, heights, 0.55, bottom=bottom, color=color, label=field.replace("_", " "))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
