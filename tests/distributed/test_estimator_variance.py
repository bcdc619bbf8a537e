"""The example that measures how much the masks make the loss and the gradient vary."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from megatron_dlm.config.tree import Config
from megatron_dlm.parallel.topology import initialize
from megatron_dlm.training.setup import build
from megatron_dlm.training.trainer import train
from tests.ranks import run_ranks
from tests.runs import tiny_config

SCRIPT = Path(__file__).parents[2] / "examples" / "estimator_variance.py"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("estimator_variance", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_and_measure(config: Config, figure: Path) -> tuple[int, str, Any]:
    """A checkpoint of two steps; the script's exit code and output on it, and what it measures twice over."""
    training = build(config, initialize(config.parallel))
    assert train(training)
    script, printed = example(), io.StringIO()
    arguments = ["--checkpoint", config.run.directory, "--synthetic-draws", "5", "--draws", "3"]
    with contextlib.redirect_stdout(printed):
        code = script.main([*arguments, "--output", str(figure)])
    options = {"noise_levels": "iid"}
    twice = [script.noise_of_checkpoint(training, options, 3) for _ in range(2)]
    return code, printed.getvalue(), twice


def test_checkpoint_is_measured_with_fresh_masks_on_the_same_data(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_data,
        run={"directory": str(tmp_path / "run"), "seed": 7},
        train={"steps": 2, "micro_batch_size": 4, "global_batch_size": 8},
        optimizer={"warmup_steps": 1, "decay_steps": 1},
    )
    figure = tmp_path / "figures" / "variance.png"
    code, printed, ((losses, gradients), again) = run_ranks(train_and_measure, 1, tmp_path, config, figure)
    assert code == 0 and figure.stat().st_size < 150_000
    table = printed[printed.index("run: global batches of 8 rows") :].splitlines()[2:8]
    assert [line[:24].strip() for line in table] == list(example().ROWS)
    for line in table:
        loss, _, error, ratio, gradient, *_ = line[24:].split()
        assert float(loss) > 0 and float(error) > 0 and float(ratio) > 0 and float(gradient) > 0
    np.testing.assert_array_equal(losses, again[0])
    np.testing.assert_array_equal(gradients, again[1])
    assert len(set(losses)) == 3 and np.abs(np.diff(gradients, axis=0)).max() > 0


def test_synthetic_problem_has_the_known_order() -> None:
    """Standard deviations on record: 0.324, 0.321, 0.065, 0.017, 0.0145 for a loss of 3.4117."""
    script = example()
    little, text = script.synthetic(300).values()
    std = {name: spread.std for name, spread in little.items()}
    known = dict(zip(script.ROWS, (0.324, 0.321, 0.065, 0.017, 0.0145), strict=False))
    for name, value in known.items():
        assert std[name] == pytest.approx(value, rel=0.2), name
    assert std["stratified antithetic"] < std["stratified"] < std["antithetic"] < 0.3 * std["exact count, iid"]
    assert text["stratified antithetic"].std < 0.4 * text["exact count, iid"].std
    for options in script.ROWS.values():
        losses = script.synthetic_losses(options, 300, 0.5, 0.0)
        assert abs(losses.mean() - 3.4117) < 5 * losses.std() / np.sqrt(300)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert example().main(["--synthetic-draws", "3", "--checkpoint", str(tmp_path)]) == 2
    assert "is no checkpoint and has none; give" in capsys.readouterr().err
