"""A step whose gradient is not finite, on whatever rank, is skipped on all of them; too many in a row end the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import megatron_dlm.training.setup  # noqa: F401  (imported once, in the parent of the forked ranks)
from megatron_dlm.config.tree import Config
from megatron_dlm.errors import TrainingError
from megatron_dlm.parallel.topology import initialize
from megatron_dlm.training.progress import Progress
from megatron_dlm.training.setup import build
from megatron_dlm.training.state import Training
from megatron_dlm.training.step import train_step
from megatron_dlm.training.trainer import train
from tests.ranks import run_ranks
from tests.resuming import digest
from tests.runs import tiny_config

STEPS, BAD_STEP, BAD_RANK = 5, 2, 3
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}


class Case(NamedTuple):
    """Where a value that is not finite comes up, on the last rank only."""

    layout: dict[str, Any]
    precision: str
    where: str
    """The end of a parameter's name, whose gradient gets it; or "loss", whose weights get it."""
    value: float
    tied: bool = False


CASES = {
    "NaN in a sharded matrix": Case({**TP2, **PP2}, "fp32", "linear_fc2.weight", math.nan),
    "inf in one replica": Case(PP2, "bf16", "linear_qkv.weight", math.inf),
    # The norms of all tensor-parallel ranks are one parameter, whose gradient the global norm counts once.
    "NaN in a copy that the norm leaves out": Case({**TP2, **PP2}, "fp32", "final_layernorm.weight", math.nan),
    "-inf in such a copy": Case({**TP2, "sequence_parallel": True}, "bf16", "q_layernorm.weight", -math.inf),
    "NaN in the tied embedding's copy": Case({**TP2, **PP2}, "bf16", "output_layer.weight", math.nan, tied=True),
    "NaN loss": Case(PP2, "fp32", "loss", math.nan),
    "NaN loss on one tensor-parallel rank": Case({**TP2, **PP2}, "bf16", "loss", math.nan),
}


def poison(training: Training, case: Case, is_bad: Callable[[int], bool]) -> None:
    """From now on, put the value into the bad rank's gradient (before any reduction), or loss, of the bad steps."""
    stream, original, now = training.train_stream, training.train_stream.training, [0]
    on_this_rank = dist.get_rank() == BAD_RANK

    def batches(progress: Progress, *, reads_tokens: bool) -> Iterator[Any]:
        now[0] = progress.step
        for micro_batch in original(progress, reads_tokens=reads_tokens):
            if micro_batch.batch and case.where == "loss" and on_this_rank and is_bad(progress.step):
                weights = micro_batch.batch.weights * case.value
                micro_batch = micro_batch._replace(batch=replace(micro_batch.batch, weights=weights))
            yield micro_batch

    def spoil(parameter: Any, gradient: torch.Tensor) -> None:
        if is_bad(now[0]):  # in the buffer that gradients are added to: the head's gets there without autograd
            parameter.main_grad.view(-1)[1] = case.value

    stream.training = batches  # type: ignore[method-assign]
    if on_this_rank and case.where != "loss":
        names = [(n, p) for chunk in training.chunks for n, p in chunk.named_parameters() if n.endswith(case.where)]
        names[-1][1].register_hook(partial(spoil, names[-1][1]))


def gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def skip_cases(cases: list[tuple[Case, Config]]) -> list[tuple[list[Any], list[list[str]]]]:
    """For every case: [step][rank] of the reports' figures, and the digests after every step."""
    results = []
    for case, config in cases:
        training = build(config, initialize(config.parallel))
        poison(training, case, lambda step: step == BAD_STEP)
        reports, digests = [], []
        for step in range(STEPS):
            report = train_step(training, training.progress_at(step))
            reports.append(gather((report.applied, report.loss, report.grad_norm, report.lr)))
            digests.append(digest(training).split())
        results.append((reports, digests))
    return results


def test_one_bad_rank_makes_all_skip(tiny_data: Path, tmp_path: Path) -> None:
    configs = [
        tiny_config(
            tiny_data,
            parallel=case.layout,
            model={"num_layers": 2, "tie_embeddings": case.tied},
            train={"steps": 20, "precision": case.precision, "micro_batch_size": 2, "global_batch_size": 8},
        )
        for case in CASES.values()
    ]
    results = run_ranks(skip_cases, 4, tmp_path, list(zip(CASES.values(), configs, strict=True)))
    for (name, case), (reports, digests) in zip(CASES.items(), results, strict=True):
        for step, ranks in enumerate(reports):
            assert len(set(map(str, ranks))) == 1, f"{name}: the ranks disagree in step {step}"
            applied, loss, norm, lr = ranks[0]
            assert applied == (step != BAD_STEP) == math.isfinite(norm), (name, step)
            assert math.isfinite(loss) or (step, case.where) == (BAD_STEP, "loss"), (name, step)
            assert lr == pytest.approx(1e-3 * min(1, (step + 1) / 3)), "the schedule goes on"
        assert digests[BAD_STEP] == digests[BAD_STEP - 1], f"{name}: parameters or moments have changed"
        assert all(a != b for a, b in zip(digests[BAD_STEP], digests[BAD_STEP + 1], strict=True)), name


def give_up_and_continue(config: Config, straight: Config) -> dict[str, Any]:
    """A run in which every step from 4 on is bad; its continuation; and a run without. Step 1 is bad in all of them."""
    found: dict[str, Any] = {}
    for name, settings in (("bad", config), ("again", config), ("straight", straight)):
        training = build(settings, initialize(settings.parallel))
        case = Case(TP2, "fp32", "linear_fc1.weight", math.inf)
        poison(training, case, lambda step, name=name: step == 1 or (name == "bad" and step >= 4))
        try:
            found[name] = train(training)
        except TrainingError as error:
            found[name] = gather(str(error))
            root = Path(settings.run.directory, "checkpoints")
            found["kept"] = sorted(path.name for path in root.iterdir())
        else:
            found[f"{name} digest"] = digest(training)
            records = Path(settings.run.directory, "metrics.jsonl").read_text().splitlines()
            found[f"{name} skipped"] = [r["skipped"] for r in map(json.loads, records) if "loss" in r]
    return found


def test_too_many_skips_end_the_run_and_the_checkpoint_before_them_continues(tiny_data: Path, tmp_path: Path) -> None:
    def config(name: str) -> Config:
        return tiny_config(
            tiny_data,
            run={"directory": str(tmp_path / name), "seed": 7},
            model={"num_layers": 2},
            parallel={**TP2, **PP2},
            train={"steps": 9, "micro_batch_size": 2, "global_batch_size": 8, "max_skipped_steps": 2},
            checkpoint={"interval": 4},
        )

    found = run_ranks(give_up_and_continue, 4, tmp_path, config("run"), config("straight"))
    (message,) = set(found["bad"])
    assert message.startswith("3 steps in a row had a non-finite gradient (now at step 7)") and "\n" not in message
    assert found["kept"] == ["latest", "step-00000004"]
    assert found["again"] and found["straight"]
    assert found["again digest"] == found["straight digest"]
    assert found["again skipped"] == found["straight skipped"] == [0] + 8 * [1], "the count survives"
