"""The memory of an export: a tensor and a file of weights, however large the model is."""

from __future__ import annotations

import pytest

from megatron_dlm.config.load import from_dict
from tools.measure_export import SLACK, Measurement, export_and_measure, write_checkpoint, write_tokenizer

SHARD = 8_000_000
LAYER = {"hidden_size": 512, "num_attention_heads": 4, "ffn_hidden_size": 2048}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Measurement]:
    """By number of layers; 4.2 million parameters each, and half a million each in the embedding and the head."""
    folder = tmp_path_factory.mktemp("measured")
    write_tokenizer(folder / "tokenizer.json", 1024)
    found = {}
    for layers in (1, 8):
        model = {**LAYER, "num_layers": layers}
        config = from_dict({"model": model, "data": {"tokenizer": str(folder / "tokenizer.json")}})
        write_checkpoint(folder / f"source-{layers}", config)
        found[layers] = export_and_measure(
            folder / f"source-{layers}", folder / f"out-{layers}", "--max-shard-size", str(SHARD)
        )
    return found


def test_the_peak_is_within_the_bound(measured: dict[int, Measurement]) -> None:
    large = measured[8]
    assert large.parameters * 4 > 130_000_000 and large.shard <= 1.1 * SHARD
    assert large.peak <= large.bound == large.largest + large.shard + large.imports + SLACK
    assert large.parameters * 4 > 2 * SLACK, "a model held whole would be found"


def test_it_does_not_grow_with_the_model(measured: dict[int, Measurement]) -> None:
    small, large = measured[1], measured[8]
    print(f"peaks {small.peak / 1e6:.0f} and {large.peak / 1e6:.0f} MB")
    assert small.largest == large.largest and small.shard <= 1.1 * SHARD
    assert large.peak - small.peak < 40_000_000 < 4 * (large.parameters - small.parameters) / 2
