"""A resumed run is the same run, and any layout loads what another has saved."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import megatron_dlm.training.checkpoint as checkpoint
from megatron_dlm.config import Config, ConfigError
from megatron_dlm.data.tokenizer import load_tokenizer
from megatron_dlm.parallel import topology as parallel
from megatron_dlm.training.setup import Training, build, open_data
from megatron_dlm.training.step import train_step
from tests.ranks import run_ranks
from tests.runs import tiny_config

TP2 = {"tensor_model_parallel_size": 2}
BF16 = {"steps": 20, "precision": "bf16", "micro_batch_size": 2, "global_batch_size": 16}
DROPOUT = {"num_layers": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1}


def continue_run(config: Config, first: int, last: int, save_at: int | None) -> tuple[list[tuple[float, float]], str]:
    """(loss, gradient norm) of the steps [first, last), and a digest of all ranks' final parameters and moments.

    Loads a checkpoint unless ``first`` is 0.
    """
    training = build(config, parallel.initialize(config.parallel))
    if first:
        path = checkpoint.resumable(config, training.tokenizer, training.train_stream.dataset, steps=training.steps)
        assert checkpoint.load(training, path) == first
    figures = []
    for step in range(first, last):
        report = train_step(training, step=step)
        figures.append((report.loss, report.grad_norm))
        if step + 1 == save_at:
            checkpoint.save(training, step=step + 1)
    return figures, digest(training)


def digest(training: Training) -> str:
    """SHA-256 of the parameters, the fp32 main parameters and Adam's moments of every rank, in order."""
    own = hashlib.sha256()
    for chunk in training.chunks:
        for parameter in chunk.parameters():
            own.update(parameter.detach().float().numpy().tobytes())
    for part in training.optimizer.parts:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                for tensor in (parameter.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"]):
                    own.update(tensor.float().numpy().tobytes())
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own.hexdigest())
    return " ".join(parts)


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Any:
    def make(**sections: dict[str, Any]) -> Config:
        return tiny_config(tiny_data, run={"directory": str(tmp_path / "run"), "seed": 7}, **sections)

    return make


@pytest.mark.parametrize(
    ("world", "sections"),
    [
        (1, {}),
        (1, {"model": DROPOUT}),
        (2, {"parallel": {"pipeline_model_parallel_size": 2}}),
        (4, {"parallel": {**TP2, "sequence_parallel": True}, "train": BF16, "model": DROPOUT}),
    ],
    ids=["one", "one dropout", "PP2", "TP2+SP-DP2 bf16 dropout"],
)
def test_resume_is_bit_exact(world: int, sections: dict[str, Any], config: Any, tmp_path: Path) -> None:
    settings = config(**sections)
    straight, end = run_ranks(continue_run, world, tmp_path, settings, 0, 12, 6)
    resumed, resumed_end = run_ranks(continue_run, world, tmp_path, settings, 6, 12, None)
    assert resumed == straight[6:]
    assert resumed_end == end


def test_another_layout_continues_the_run(config: Any, tmp_path: Path) -> None:
    saved_at = config(parallel={**TP2, "pipeline_model_parallel_size": 2})
    straight, _ = run_ranks(continue_run, 4, tmp_path, saved_at, 0, 9, 6)
    for world, layout in ((1, {}), (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2})):
        here, _ = run_ranks(continue_run, world, tmp_path, config(parallel=layout), 6, 9, None)
        for (loss, norm), (expected_loss, expected_norm) in zip(here, straight[6:], strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-6)
            assert norm == pytest.approx(expected_norm, rel=1e-5)


def test_checkpoints_are_complete_pruned_and_guarded(config: Any, tmp_path: Path) -> None:
    settings = config(checkpoint={"keep": 2})
    for last in (1, 2, 3):
        run_ranks(continue_run, 1, tmp_path, settings, last - 1, last, last)
    root = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000002", "step-00000003"]
    assert (root / "latest").read_text().strip() == "step-00000003"
    info = json.loads((root / "step-00000003" / "checkpoint.json").read_text())
    assert (info["step"], info["consumed_samples"]) == (3, 48)
    assert (root / "step-00000003" / "config.yaml").exists()

    tokenizer = load_tokenizer("byte")

    def resumable(settings: Config, steps: int = 20) -> Path | None:
        data, _ = open_data(settings, tokenizer)
        return checkpoint.resumable(settings, tokenizer, data, steps=steps)

    with pytest.raises(ConfigError, match="step-00000003 is beyond the 2 steps of this run"):
        resumable(settings, steps=2)
    (root / "latest").write_text("step-00000009\n")  # a pointer to nothing: the newest complete one is taken
    assert resumable(settings).name == "step-00000003"
    (root / "step-00000003" / "checkpoint.json").unlink()  # incomplete: never loaded
    assert resumable(settings).name == "step-00000002"
    for section, values, message in (
        ("model", {"hidden_size": 32}, "model.hidden_size is 32 but was 64"),
        ("train", {"steps": 20, "global_batch_size": 32}, "train.global_batch_size is 32 but was 16"),
        ("checkpoint", {"resume": "never"}, "checkpoint.resume is never"),
        ("data", {"sequence_length": 16}, "data.sequence_length is 16 but was 32"),
    ):
        with pytest.raises(ConfigError, match=message):
            resumable(config(**{section: values}))


def test_going_back_to_an_older_checkpoint_gives_up_the_newer_ones(config: Any, tmp_path: Path) -> None:
    settings = config(checkpoint={"keep": 2})
    for last in (1, 2):
        run_ranks(continue_run, 1, tmp_path, settings, last - 1, last, last)
    root = tmp_path / "run" / "checkpoints"
    (root / "step-00000002").rename(root / "step-00000005")  # what training went on to before it was called back
    (root / "latest").write_text("step-00000001\n")
    run_ranks(continue_run, 1, tmp_path, settings, 1, 3, 3)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000001", "step-00000003"]
    assert (root / "latest").read_text().strip() == "step-00000003"
