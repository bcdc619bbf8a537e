"""FLOPs, formats, and the files a run writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_dlm.config.tree import ModelConfig
from megatron_dlm.flops import parameter_count, training_flops
from megatron_dlm.formatting import format_count, format_duration
from megatron_dlm.parallel.topology import initialize
from megatron_dlm.training import throughput
from megatron_dlm.training.held_out import summarize, unigram_cross_entropy
from megatron_dlm.training.progress import Progress
from megatron_dlm.training.reporter import Reporter, averaged
from megatron_dlm.training.setup import build
from megatron_dlm.training.step import accumulate_gradients
from megatron_dlm.training.throughput import Throughput
from tests.runs import tiny_config

PAPER_1B = dict(num_layers=26, hidden_size=1792, num_attention_heads=14, ffn_hidden_size=4736, qk_norm=False)


def test_parameter_count_of_a_published_size() -> None:
    """The 1B table entry: 26 layers x 1792, 14 heads of 128, SwiGLU 4736, tied 50,304-row vocabulary."""
    model = ModelConfig(**PAPER_1B, tie_embeddings=True)
    layer = 4 * 1792 * 1792 + 3 * 1792 * 4736 + 2 * 1792
    assert parameter_count(model, 50304) == 26 * layer + 1792 + 50304 * 1792
    assert 1.08e9 < parameter_count(model, 50304) < 1.10e9


def test_flops_are_three_forwards_with_the_head_on_computed_rows() -> None:
    model = ModelConfig(**PAPER_1B)
    body = parameter_count(model, 0)
    flops = training_flops(model, tokens=1, head_rows=0, sequence_length=2048, vocab_size=50304)
    assert flops == 3 * (2 * body + 4 * 2048 * 1792 * 26)
    with_head = training_flops(model, tokens=1, head_rows=0.5, sequence_length=2048, vocab_size=50304)
    assert with_head - flops == 3 * 2 * 1792 * 50304 * 0.5
    fewer = {"sequence_length": 2048, "vocab_size": 50304, "last_layer_rows": True}
    saved = 2 * (2 * 1792 * 1792 + 3 * 1792 * 4736) + 4 * 2048 * 1792
    assert with_head - training_flops(model, tokens=1, head_rows=0.5, **fewer) == 3 * saved * 0.5
    causal = ModelConfig(**PAPER_1B, objective="autoregressive")
    half = training_flops(causal, tokens=1, head_rows=0, sequence_length=2048, vocab_size=50304)
    assert flops - half == 3 * 2 * 2048 * 1792 * 26


@pytest.mark.parametrize(
    ("objective", "last_layer"),
    [("masked_diffusion", "scored"), ("masked_diffusion", "all"), ("autoregressive", "all")],
)
def test_flops_are_those_that_torch_counts(objective: str, last_layer: str, tiny_data: Path) -> None:
    """To the last one, but for three terms of the convention, which are added here.

    The convention counts the weights of the norms like those of matrices, half of causal attention, and no queries that
    pad; torch counts only matrix products, and its MATH backend (the only one it counts on a CPU) also computes the
    half that is masked.
    """
    config = tiny_config(
        tiny_data,
        model={"objective": objective},
        diffusion={"random_length_probability": 0.0},
        kernels={"last_layer_rows": last_layer},
    )
    training = build(config, initialize(config.parallel))
    model, stream, seq, tokens = config.model, training.train_stream, 32, 2 * 2 * 32

    def in_place(total: Any, left: Any, right: Any, **unused: Any) -> int:  # of shapes; torch has forgotten this one
        return 2 * left[0] * left[1] * right[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})
    with counter, sdpa_kernel(SDPBackend.MATH):
        batches = lambda reads: stream.training(Progress(), reads_tokens=reads)  # noqa: E731
        accumulate_gradients(training, batches, step=0, num_microbatches=2)
    scored = [micro_batch.batch for micro_batch in stream.training(Progress(), reads_tokens=True)][:2]
    head_rows = sum(len(batch.targets) for batch in scored)
    assert head_rows == tokens if objective == "autoregressive" else 0 < head_rows < tokens
    formula = training_flops(
        model,
        tokens=tokens,
        head_rows=head_rows,
        sequence_length=seq,
        vocab_size=training.tokenizer.vocab_size,
        last_layer_rows=last_layer == "scored",
    )
    counts = [batch.sample_index.bincount(minlength=2) for batch in scored]
    padded = sum(int((count.max() - count).sum()) for count in counts) if last_layer == "scored" else 0
    assert (padded > 0) == (last_layer == "scored")
    norms = model.num_layers * 2 * (model.hidden_size + model.resolved_head_dim) + model.hidden_size
    masked_half = 2 * seq * model.hidden_size * model.num_layers if objective == "autoregressive" else 0
    assert counter.get_total_flops() == formula + 3 * (
        (masked_half - 2 * norms) * tokens + 4 * seq * model.hidden_size * padded
    )
    assert 2 * norms * tokens < 0.01 * formula, "the first term is small even here"


def test_rates_and_flops_of_a_run_and_of_its_continuation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(throughput, "peak_tflops", lambda: 1e-3)
    config = tiny_config(tmp_path)
    tokens = 16 * 32
    sizes: dict[str, Any] = {"tokens": tokens, "sequence_length": 32, "vocab_size": 300, "last_layer_rows": True}
    step_flops, nominal = (training_flops(config.model, head_rows=rows, **sizes) for rows in (200, tokens))

    def steps(count: int, **settings: float | None) -> list[dict[str, float | None]]:
        rates = Throughput(config, vocab_size=300, devices=2, steps=10, **settings)  # type: ignore[arg-type]
        records = []
        for _ in range(count):
            rates.restart()
            clock[0] += 0.5
            records.append(rates.after_step(200))
            clock[0] += 1.5  # an evaluation
        return records

    first, second = steps(2, first_step=0, flops_before=0.0)
    assert second["training_flops"] == 2 * step_flops == 2 * first["training_flops"]
    assert second["tokens_per_second"] == 2 * tokens == 2 * second["tokens_per_second_per_device"]
    assert second["tflops_per_device"] == pytest.approx(step_flops / 0.5 / 2 / 1e12)
    assert second["mfu"] == pytest.approx(step_flops / 0.5 / 2 / 1e12 / 1e-3)
    assert second["mfu_nominal"] == pytest.approx(nominal / 0.5 / 2 / 1e12 / 1e-3)
    assert second["eta_seconds"] == pytest.approx(8 * (0.5 + 1.5 / 2)), "evaluations take time too"
    (continued,) = steps(1, first_step=2, flops_before=second["training_flops"])
    (estimated,) = steps(1, first_step=2, flops_before=None)
    assert continued["training_flops"] == estimated["training_flops"] == 3 * step_flops
    assert continued["eta_seconds"] == pytest.approx(7 * 0.5)


def test_a_line_averages_the_steps_that_had_a_loss() -> None:
    record = {"step_seconds": 1.0, "tokens_per_second_per_device": 8.0, "tflops_per_device": 1.0, "mfu": None}
    records = [record | {"loss": loss} for loss in (2.0, math.nan, 4.0)]
    assert averaged(records)["loss"] == 3.0
    assert math.isnan(averaged(records[1:2])["loss"])


@pytest.mark.parametrize(("value", "text"), [(950, "950"), (61234, "61.2k"), (1.07e6, "1.07M"), (8.19e9, "8.19B")])
def test_counts_have_three_digits_and_a_unit(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(42, "42s"), (187, "3m07s"), (18720, "5h12m")])
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_interval_takes_pairs_as_units_and_covers() -> None:
    """Antithetic neighbours (z, -z plus noise): the pairs' interval covers, and is narrower than the naive one."""
    generator, covered, narrower = np.random.default_rng(0), 0, 0
    for _ in range(400):
        z = generator.normal(size=32)
        values = np.stack([5 + z, 5 - z], axis=1).reshape(-1) + 0.3 * generator.normal(size=64)
        result = summarize(values)
        covered += abs(result.nelbo - 5) <= result.ci95
        narrower += result.ci95 < 1.96 * values.std(ddof=1) / 8
    assert 0.90 <= covered / 400 <= 0.98
    assert narrower == 400


def test_unigram_cross_entropy_of_a_uniform_corpus_is_log_vocabulary() -> None:
    assert unigram_cross_entropy(np.full(50, 7), np.arange(50).reshape(5, 10)) == pytest.approx(math.log(50))
    skewed = unigram_cross_entropy(np.array([98, 0]), np.zeros((1, 4), dtype=np.int64))
    assert skewed == pytest.approx(-math.log(99 / 100))


def test_resumed_metrics_hold_every_step_once(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, run={"directory": str(tmp_path / "run")})
    record = {"loss": 1.0, "grad_norm": 1.0, "lr": 1e-3}
    reporter = Reporter(config, active=True, steps=4, first_step=0)
    assert reporter.flops_before == 0.0
    for step in (1, 2, 3):
        reporter.step({"step": step, **record, "training_flops": 5.0 * step}, show=False)
    reporter.close()
    metrics = tmp_path / "run" / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    assert Reporter(config, active=False, steps=4, first_step=2).flops_before is None
    again = Reporter(config, active=True, steps=4, first_step=2)
    assert again.flops_before == 10.0
    again.step({"step": 3, **record}, show=False)
    again.close()
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3]
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_a_step_with_a_nan_loss_is_recorded_as_valid_json(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, run={"directory": str(tmp_path / "run")})
    reporter = Reporter(config, active=True, steps=2, first_step=0)
    nan = float("nan")
    record = {"step": 1, "loss": nan, "grad_norm": float("inf"), "lr": 1e-3, "loss_by_mask_ratio": [1.0, None, nan]}
    reporter.step(record, show=False)
    reporter.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    written = json.loads(line, parse_constant=refuse)
    assert written == record | {"loss": None, "grad_norm": None, "loss_by_mask_ratio": [1.0, None, None]}
