"""The miniature of the crossover as its file says: `pytest -m slow tests/e2e/test_crossover_cpu.py` (minutes)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.cli import main

ROOT = Path(__file__).parents[2]


def check_shape(report: dict[str, Any]) -> None:
    """What objective and data make sure of, and one seed's noise does not change."""
    (cell,) = report["cells"]
    arms = {(arm["objective"], arm["seed"]): arm for arm in cell["arms"]}
    lowest = [arms["autoregressive", seed]["best"]["epoch"] for seed in (1, 2)]
    assert 5 <= sum(lowest) / len(lowest) <= 20, "the AR over-fits"
    for seed in (1, 2):
        ar, dlm = arms["autoregressive", seed]["curves"]["loss"], arms["masked_diffusion", seed]["curves"]["loss"]
        assert ar["values"][-1] > arms["autoregressive", seed]["best"]["value"] + 0.3
        at_epoch_5 = min(range(len(dlm["epochs"])), key=lambda index: abs(dlm["epochs"][index] - 5))
        assert dlm["values"][-1] < dlm["values"][at_epoch_5] - 0.1
        assert dlm["values"][-1] < arms["masked_diffusion", seed]["unigram"]
        assert dlm["epochs"] == ar["epochs"]
    (comparison,) = cell["comparisons"]
    crossings = [found["epoch"] for found in comparison["by_seed"].values()]
    assert None not in crossings and 20 <= sum(crossings) / len(crossings) <= 45


@pytest.mark.slow
def test_the_miniature_crosses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = ROOT / "examples" / "configs" / "crossover_cpu.yaml"
    commands = [line.split()[2:] for line in config.read_text().splitlines() if line.startswith("#   megatron-dlm ")]
    assert [command[0] for command in commands] == ["prepare", "crossover"]
    assert main(commands[0]) == 0
    assert main(["crossover", "--config", str(config)]) == 0
    check_shape(json.loads(Path("runs/crossover-cpu/crossover.json").read_text()))
