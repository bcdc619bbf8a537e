"""The commands as a user types them: prepare, train on two processes, continue, plot; and every refusal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_dlm.cli import main
from megatron_dlm.preparation.prepare import PrepareOptions, prepare
from tests.runs import TINY

ROOT = Path(__file__).parents[2]
STEP_KEYS = set(
    "step loss grad_norm lr consumed_samples consumed_tokens epoch unique_tokens accuracy mask_ratio skipped "
    "loss_by_mask_ratio accuracy_by_mask_ratio training_flops tokens_per_second tokens_per_second_per_device "
    "tflops_per_device mfu mfu_nominal memory_gib step_seconds eta_seconds".split()
)
VALID_KEYS = set(
    "step valid_data valid_nelbo valid_nelbo_ci95 valid_bits_per_byte valid_bits_per_byte_ci95 valid_perplexity_bound "
    "valid_unigram valid_sequences".split()
)


def run(*arguments: str, module: str = "megatron_dlm") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *module.split(), *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def config(tmp_path: Path, tiny_data: Path) -> Path:
    tree = {name: dict(values) for name, values in TINY.items()}
    tree["run"]["directory"] = str(tmp_path / "run")
    tree["data"] |= {"train": [{"path": str(tiny_data / "train")}], "valid": [{"path": str(tiny_data / "valid")}]}
    tree["train"] |= {"steps": 12, "log_interval": 4}
    tree["optimizer"] |= {"decay_steps": 4}
    tree["evaluate"] = {"interval": 6, "sequences": 8}
    tree["checkpoint"] = {"interval": 6}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def records(config: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.parent / "run" / "metrics.jsonl").read_text().splitlines()]


def test_train_continue_and_plot(config: Path) -> None:
    first = run("train", "--config", str(config), "--parallel.data_parallel_size", "2")
    assert first.returncode == 0, first.stderr
    directory = config.parent / "run"
    assert "TP1-PP1-DP2 on 2 x CPU" in first.stdout and "\ndry batch  ok in " in first.stdout
    assert "step 12/12 | loss " in first.stdout and " nats/tok | gnorm " in first.stdout
    assert "finished   at step 12/12" in first.stdout
    assert "Warning" not in first.stderr, "what a user cannot change is not worth a warning"
    steps = [record for record in records(config) if "loss" in record]
    valid = [record for record in records(config) if "valid_nelbo" in record]
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert all(record.keys() >= STEP_KEYS for record in steps)
    assert [record["step"] for record in valid] == [6, 12] and all(record.keys() >= VALID_KEYS for record in valid)
    assert steps[-1]["consumed_samples"] == 12 * 16 and steps[-1]["consumed_tokens"] == 12 * 16 * 32
    assert all(len(record["loss_by_mask_ratio"]) == 10 for record in steps)
    board = EventAccumulator(str(directory / "tensorboard")).Reload()
    lists = {f"{key}_by_mask_ratio/{i / 10:.1f}" for key in ("loss", "accuracy") for i in range(10)}
    # A name, lists, and what a CPU has not.
    absent = {"step", "valid_data", "mfu", "mfu_nominal", "loss_by_mask_ratio", "accuracy_by_mask_ratio"}
    assert set(board.Tags()["scalars"]) >= (STEP_KEYS | VALID_KEYS | lists) - absent
    assert [event.value for event in board.Scalars("valid_nelbo")] == pytest.approx([r["valid_nelbo"] for r in valid])
    assert json.loads((directory / "status.json").read_text())["exit_code"] == 0
    assert yaml.safe_load((directory / "config.yaml").read_text())["model"]["hidden_size"] == 64

    # Longer, at another layout, under torchrun: continues at step 12.
    longer = ("train", "--config", str(config), "--train.steps", "14", "--parallel.pipeline_model_parallel_size", "2")
    second = run("--nproc-per-node", "2", "-m", "megatron_dlm", *longer, module="torch.distributed.run")
    assert second.returncode == 0, second.stderr
    assert "resume     " in second.stdout and "step-00000012" in second.stdout
    assert [r["step"] for r in records(config) if "loss" in r] == list(range(1, 15))

    plot = run("plot", str(directory))
    assert plot.returncode == 0, plot.stderr
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_autoregressive_arm_on_one_process_with_epochs(config: Path) -> None:
    tree = yaml.safe_load(config.read_text())
    del tree["train"]["steps"]
    tree["model"]["objective"] = "autoregressive"
    tree["train"]["epochs"] = 0.05
    tree["optimizer"] |= {"warmup_steps": 1, "decay_steps": 1}
    config.write_text(yaml.safe_dump(tree))
    assert main(["train", "--config", str(config)]) == 0
    last = [record for record in records(config) if "loss" in record][-1]
    assert last["epoch"] == pytest.approx(0.05, abs=16 * 32 / 60000)
    assert last["mask_ratio"] == 1.0

    # A kill between the last save and the evaluation: the same command makes up for it.
    metrics = config.parent / "run" / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines() if "valid_nelbo" not in line]
    (lost,) = [record for record in records(config) if "valid_nelbo" in record]
    metrics.write_text("".join(line + "\n" for line in kept))
    for _ in range(2):
        assert main(["train", "--config", str(config)]) == 0
        assert [record for record in records(config) if "valid_nelbo" in record] == [lost]


def test_a_stop_signal_in_the_last_step_is_too_late(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_dlm.training import trainer

    def signalled(training: Any, progress: Any, *, stop_requested: bool) -> Any:
        return step_function(training, progress)._replace(stop_requested=progress.step == 11)

    step_function = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", signalled)
    assert main(["train", "--config", str(config)]) == 0
    assert [record["step"] for record in records(config) if "valid_nelbo" in record] == [6, 12]


@pytest.fixture
def broken_data(tiny_data: Path, tmp_path: Path) -> Path:
    prepare(PrepareOptions(output=tmp_path / "broken", inputs=[tiny_data / "chapters"], tokenizer="byte"))
    tokens = tmp_path / "broken" / "train.bin"
    tokens.write_bytes(tokens.read_bytes()[:-3])
    return tmp_path / "broken" / "train"


REFUSALS = {
    "unknown key": (["--model.hiden_size", "64"], "did you mean hidden_size?"),
    "mistyped value": (["--train.steps", "many"], "train.steps must be an integer"),
    "heads and TP": (["--parallel.tensor_model_parallel_size", "3"], "3"),
    "layers and PP": (["--parallel.pipeline_model_parallel_size", "3"], "model.num_layers (4)"),
    "batch and DP": (["--parallel.data_parallel_size", "3"], "train.global_batch_size"),
    "sequence and SP": (
        ["--parallel.tensor_model_parallel_size", "2", "--parallel.sequence_parallel", "true"]
        + ["--data.sequence_length", "31"],
        "data.sequence_length (31)",
    ),
    "pass-through typo": (
        ["--model.transformer_config", "{hiden: 1}"],
        "model.transformer_config takes no hiden",
    ),
    "pass-through of an owned key": (
        ["--optimizer.optimizer_config", "{lr: 1}"],
        "optimizer.optimizer_config.lr is set by",
    ),
    "no option": (["extra.yaml"], "extra.yaml"),
    "missing data": (["--data.train", "[{path: nowhere/train}]"], "nowhere/train"),
    "missing tokenizer": (["--data.tokenizer", "nowhere.model"], "nowhere.model"),
    "too many unique tokens": (["--data.unique_tokens", "1000000000"], "unique_tokens"),
    "schedule longer than the run": (["--optimizer.warmup_steps", "500"], "optimizer.warmup_steps (500)"),
    "truncated data": (["--data.train", "[{path: BROKEN}]"], "train.bin"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_bad_input_is_one_line_and_exit_2(
    refusal: str, config: Path, broken_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options, expected = REFUSALS[refusal]
    options = [option.replace("BROKEN", str(broken_data)) for option in options]
    assert main(["train", "--config", str(config), *options]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and error.startswith("megatron-dlm: error: "), error
    assert expected in error
    left = {path.name for path in (config.parent / "run").glob("*")}
    assert not left, "nothing half-written"


def test_another_tokenizer_than_the_datas_is_refused(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = config.parent / "other"
    prepare(PrepareOptions(output=other, inputs=[ROOT / "LICENSE"], train_sentencepiece=400))
    assert main(["train", "--config", str(config), "--data.tokenizer", str(other / "tokenizer.model")]) == 2
    assert "tokenizer" in capfd.readouterr().err
