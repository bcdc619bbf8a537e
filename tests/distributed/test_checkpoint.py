"""Which checkpoint a run continues from, what is refused, and what a save leaves behind."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import megatron_dlm.training.saving as checkpoint
from megatron_dlm.checkpoint import manifest
from megatron_dlm.checkpoint.stored import open_checkpoint
from megatron_dlm.config.tree import Config
from megatron_dlm.data.tokenizer import load_tokenizer
from megatron_dlm.errors import ConfigError
from megatron_dlm.parallel import topology as parallel
from megatron_dlm.training.progress import Progress
from megatron_dlm.training.setup import build, open_data
from megatron_dlm.training.step import train_step
from tests.ranks import run_ranks
from tests.resuming import continue_run, digest
from tests.runs import tiny_config


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Any:
    def make(**sections: dict[str, Any]) -> Config:
        return tiny_config(tiny_data, run={"directory": str(tmp_path / "run"), "seed": 7}, **sections)

    return make


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


def test_keys_may_have_had_other_names(config: Any, tmp_path: Path) -> None:
    """The configuration in a checkpoint is read with the names of its time, to continue from it and to open it."""
    settings = config(evaluate={"prompts": ["a", "b"]})
    run_ranks(continue_run, 1, tmp_path, settings, 0, 1, 1)
    directory = tmp_path / "run" / "checkpoints" / "step-00000001"
    text = (directory / "config.yaml").read_text()
    assert text.count("prompts: [a, b]") == 1
    (directory / "config.yaml").write_text(text.replace("prompts: [a, b]", "samples: [a, b]"))
    manifest.write(directory, {})
    tokenizer = load_tokenizer("byte")
    data, _ = open_data(settings, tokenizer)
    assert checkpoint.resumable(settings, tokenizer, data, steps=20) == directory
    assert open_checkpoint(directory).config == settings


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


def test_what_the_user_puts_there_is_left_alone(config: Any, tmp_path: Path) -> None:
    settings = config(checkpoint={"keep": 1})
    run_ranks(continue_run, 1, tmp_path, settings, 0, 2, 2)
    root = tmp_path / "run" / "checkpoints"
    shutil.copytree(root / "step-00000002", root / "step-best")
    (root / "step-00000002.bak").symlink_to("step-best")
    (root / "step-notes.txt").write_text("mine")
    elsewhere = tmp_path / "other-disk"
    (root / "step-00000002").rename(elsewhere)
    (root / "step-00000002").symlink_to(elsewhere)
    run_ranks(continue_run, 1, tmp_path, settings, 2, 3, 3)
    left = ["latest", "step-00000002.bak", "step-00000003", "step-best", "step-notes.txt"]
    assert sorted(path.name for path in root.iterdir()) == left
    assert (elsewhere / "checkpoint.json").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x80", b"../../x", b"\0", b"step-00000009", None])
def test_a_useless_pointer_is_as_none(content: bytes | None, config: Any, tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    for name in ("step-00000001", "step-00000002"):
        (root / name).mkdir(parents=True)
    if content is None:
        (root / "latest").mkdir()
    else:
        (root / "latest").write_bytes(content)
    tokenizer, settings = load_tokenizer("byte"), config()
    data, _ = open_data(settings, tokenizer)
    with pytest.raises(ConfigError, match="can be used .step-00000002: it has no manifest.*step-00000001: it has no"):
        checkpoint.resumable(settings, tokenizer, data, steps=20)


def test_checkpoints_that_is_no_directory_is_refused_at_once(config: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    tokenizer, settings = load_tokenizer("byte"), config()
    data, _ = open_data(settings, tokenizer)
    with pytest.raises(ConfigError, match="checkpoints is not a directory; move it away"):
        checkpoint.resumable(settings, tokenizer, data, steps=20)


def other_settings(config: Config, changed: Config) -> tuple[float, float, list[Any]]:
    """Largest change of a parameter in one step after resuming with other settings, the rate said, and the betas."""
    training = build(changed, parallel.initialize(changed.parallel))
    checkpoint.resume(training)[1]
    before = [p.detach().clone() for chunk in training.chunks for p in chunk.parameters()]
    report = train_step(training, training.progress_at(2))
    after = [p.detach() for chunk in training.chunks for p in chunk.parameters()]
    change = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
    groups = [group for part in training.optimizer.parts for group in part.optimizer.param_groups]
    assert {group["lr"] for group in groups} == {report.lr}
    return change, report.lr, [tuple(group["betas"]) for group in groups]


def test_settings_of_the_optimizer_may_change_at_a_resume(config: Any, tmp_path: Path) -> None:
    settings = config()
    run_ranks(continue_run, 1, tmp_path, settings, 0, 2, 2)
    changed = config(optimizer={"lr": 1e-6, "min_lr": 1e-7, "beta1": 0.5, "beta2": 0.6, "warmup_steps": 1})
    change, rate, betas = run_ranks(other_settings, 1, tmp_path, settings, changed)
    assert rate == pytest.approx(1e-6) and set(betas) == {(0.5, 0.6)}
    assert 0 < change < 1e-5  # Adam's steps are about as large as the rate


def save_before_any_update(config: Config) -> None:
    training = build(config, parallel.initialize(config.parallel))
    checkpoint.save(training, Progress(1, 16, skipped=1, skipped_in_a_row=1))
    begun = digest(training)
    again = build(config, parallel.initialize(config.parallel))
    assert checkpoint.resume(again)[1] == Progress(1, 16, 1, 1)
    assert digest(again) == begun
    assert train_step(again, again.progress_at(1)) == train_step(training, training.progress_at(1))
    assert digest(again) == digest(training)


def test_a_run_whose_first_step_was_skipped_can_be_saved(config: Any, tmp_path: Path) -> None:
    run_ranks(save_before_any_update, 2, tmp_path, config(parallel={"pipeline_model_parallel_size": 2}))


def test_other_data_of_the_same_size_is_refused(config: Any, tmp_path: Path) -> None:
    settings = config()
    run_ranks(continue_run, 1, tmp_path, settings, 0, 1, 1)
    tokenizer = load_tokenizer("byte")
    other = tmp_path / "other"
    for suffix in ("bin", "idx", "json"):
        shutil.copy(f"{settings.data.train[0].path}.{suffix}", f"{other}.{suffix}")
    # Where a sample of the tokens does not differ, the digest of `prepare` does; early corpora have none.
    path, described = other.with_suffix(".json"), json.loads(other.with_suffix(".json").read_text())
    settings.data.train[0].path = str(other)
    for digest_now, refused in ((described["bin_sha256"], False), ("0" * 64, True), (None, False)):
        path.write_text(json.dumps({**described, "bin_sha256": digest_now}))
        data, _ = open_data(settings, tokenizer)
        with pytest.raises(ConfigError, match="SHA-256 of data.train is") if refused else contextlib.nullcontext():
            assert checkpoint.resumable(settings, tokenizer, data, steps=20) is not None
    content = bytearray(other.with_suffix(".bin").read_bytes())
    content[0], content[2] = content[2], content[0]
    other.with_suffix(".bin").write_bytes(content)
    settings.data.train[0].weight = 5.0
    data, _ = open_data(settings, tokenizer)
    with pytest.raises(ConfigError, match=r"the list of \(fingerprint, share\) of data.train is"):
        checkpoint.resumable(settings, tokenizer, data, steps=20)
