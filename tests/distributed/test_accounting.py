"""What a run says about itself with the options that change how many rows, sequences and masked tokens there are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.config.tree import Config
from megatron_dlm.parallel.topology import initialize
from megatron_dlm.training.setup import build
from megatron_dlm.training.trainer import train
from tests.ranks import run_ranks
from tests.runs import tiny_config

SEQ, BATCH = 256, 8


def records(configs: list[Config]) -> list[tuple[list[dict[str, Any]], int, int]]:
    """Of every run: its step records, the sequences of an epoch, the unique tokens in use."""
    results = []
    for config in configs:
        training = build(config, initialize(config.parallel))
        assert train(training)
        lines = map(json.loads, (Path(config.run.directory) / "metrics.jsonl").read_text().splitlines())
        dataset = training.train_stream.dataset
        found = [line for line in lines if "loss" in line]
        results.append((found, dataset.samples_per_epoch, dataset.unique_tokens))
    return results


def test_epochs_count_sequences_and_mask_ratios_eligible_tokens(tiny_data: Path, tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "complementary": {"complementary": True},
        "plain": {},
        "unweighted": {"weighting": "none"},
        "cart": {"weighting": "cart"},
    }
    configs = [
        tiny_config(
            tiny_data,
            run={"directory": str(tmp_path / name), "seed": 7},
            model={"num_layers": 1},
            diffusion={"random_length_probability": 0.0, **options},
            data={"sequence_length": SEQ, "valid": [], "unique_tokens": 20 * SEQ},
            train={"steps": None, "epochs": 1.5, "micro_batch_size": 1, "global_batch_size": BATCH},
            optimizer={"warmup_steps": 1, "decay_steps": 1},
        )
        for name, options in cases.items()
    ]
    found = dict(zip(cases, run_ranks(records, 1, tmp_path, configs), strict=True))
    for name, (steps, per_epoch, unique) in found.items():
        rows = 2 if name == "complementary" else 1
        assert (per_epoch, unique) == (20, 20 * SEQ)
        assert len(steps) == math.ceil(1.5 * 20 * rows / BATCH)
        for number, step in enumerate(steps, start=1):
            sequences = number * BATCH // rows
            assert step["epoch"] == pytest.approx(sequences / 20)
            assert step["unique_tokens"] == min(sequences * SEQ, unique)
            assert step["consumed_tokens"] == number * BATCH * SEQ
            # A pair masks L of its 2 L tokens, an antithetic pair L + 1.
            share = 0.5 if rows == 2 else 0.5 * (1 + 1 / SEQ)
            assert step["mask_ratio"] == pytest.approx(share, rel=1e-12)
    # An untrained model's cross-entropy is ln V at all noise levels, and the weights of two of the three average to 1.
    first = {name: steps[0]["loss"] for name, (steps, _, _) in found.items()}
    assert first["unweighted"] == pytest.approx(first["plain"], rel=0.02)
    assert first["complementary"] == pytest.approx(first["plain"], rel=0.02)
    assert 0.1 * first["plain"] < first["cart"] < 0.3 * first["plain"]
