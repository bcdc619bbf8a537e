"""Checkpoints damaged at random, through all that reads them: each is read, or refused in one line, and at once."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dlm.checkpoint import manifest
from megatron_dlm.errors import ConfigError, DataError, TrainingError
from megatron_dlm.generation.text_model import open_text_model
from megatron_dlm.hf.export import export
from megatron_dlm.parallel import topology as parallel
from megatron_dlm.training import saving
from megatron_dlm.training.setup import build
from megatron_dlm.training.state import Training
from tests.runs import tiny_config

CASES, SECONDS = 120, 10
SMALL = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_query_groups": 1, "ffn_hidden_size": 16}
VALUES: list[Any] = [None, True, -1, 2**63, 1e300, "", "x" * 5000, "../../etc/passwd", "a\nb", [], [[]], {}, {"a": 1}]


class Hang(BaseException):
    """A reader took too long."""


@contextmanager
def at_once() -> Iterator[None]:
    def late(*unused: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 8)) if content else 0):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size + 1))


def replaced(make: Callable[[Path], Any]) -> Callable[[Path, random.Random], None]:
    def replace(path: Path, rng: random.Random) -> None:
        path.unlink()
        make(path)

    return replace


def swap(path: Path, rng: random.Random) -> None:
    other = rng.choice(sorted(p for p in path.parent.rglob("*") if p.is_file() and not p.is_symlink()))
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def field(path: Path, rng: random.Random) -> None:
    """Change an entry of a JSON file, at any depth; of another file a byte."""
    try:
        content = json.loads(path.read_text())
    except ValueError:
        flip(path, rng)
        return
    place = content
    while isinstance(place, dict) and place:
        key = rng.choice(sorted(place))
        if isinstance(place[key], dict) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        action = rng.randrange(3)
        value = place.pop(key) if action < 2 else None
        if action:
            place[rng.choice(("../outside", "/etc/passwd", "a" * 300)) if action == 1 else key] = (
                value if action == 1 else rng.choice(VALUES)
            )
        break
    path.write_text(json.dumps(content))


MUTATIONS: dict[str, Callable[[Path, random.Random], None]] = {
    "flip": flip,
    "truncate": truncate,
    "swap": swap,
    "field": field,
    "delete": replaced(lambda path: None),
    "empty": replaced(Path.touch),
    "directory": replaced(Path.mkdir),
    "pipe": replaced(os.mkfifo),
    "loop": replaced(lambda path: path.symlink_to(path.name)),
    "link": replaced(lambda path: path.symlink_to("/etc/passwd")),
    "deep": replaced(lambda path: path.write_text("[" * 100_000)),
}


def mutate(root: Path, rng: random.Random) -> str:
    """Damage one file below ``checkpoints``, and describe the checkpoint anew in half of the cases; what was done."""
    newest = root / "step-00000001"
    path = rng.choice(sorted(path for path in [root / "latest", *newest.rglob("*")] if path.is_file()))
    name = rng.choice(sorted(MUTATIONS))
    MUTATIONS[name](path, rng)
    anew = rng.random() < 0.5 and path.name not in (manifest.NAME, "latest")
    if anew:
        if rng.random() < 0.5 and (newest / manifest.BLOCKS).is_file():
            (newest / manifest.BLOCKS).unlink()
        try:
            manifest.write(newest, {})
        except OSError:  # it would wait for a pipe itself
            pass
    return f"{name} {path.relative_to(root)}{', described anew' if anew else ''}"


def readers(training: Training, run: Path) -> dict[str, Callable[[], Any]]:
    def sampled() -> None:
        tokens = torch.zeros(1, 8, dtype=torch.int64)
        assert bool(torch.isfinite(open_text_model(str(run)).denoise(tokens, None, torch.arange(8))).all())

    return {
        "sample": sampled,
        "export": lambda: export(run, run / "exported", overwrite=True),
        "train": lambda: saving.resume(training),
    }


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    run = {"directory": str(tmp_path_factory.mktemp("trained") / "run"), "seed": 7}
    config = tiny_config(tiny_data, run=run, model=SMALL, data={"valid": []})
    training = build(config, parallel.initialize(config.parallel))
    saving.save(training, training.progress_at(1))
    yield training
    parallel.shutdown()


def test_a_run_does_not_begin_with_weights_that_are_no_numbers(trained: Training, tmp_path: Path) -> None:
    sound, parameter = trained.config.run.directory, next(trained.chunks[0].parameters())
    trained.config.run.directory, value = str(tmp_path / "run"), parameter.detach().view(-1)[5].item()
    try:
        for state in (parameter.detach(), trained.optimizer.parts[0].optimizer.param_groups[0]["params"][0].detach()):
            state.view(-1)[5] = float("nan")
        saving.save(trained, trained.progress_at(1))
        with pytest.raises(TrainingError, match=r"step-00000001: [\w.]+ has values that are not finite .*; restore or"):
            saving.resume(trained)
    finally:
        trained.config.run.directory = sound
        parameter.detach().view(-1)[5] = value
        saving.resume(trained)


def test_no_damage_is_a_traceback_or_a_hang(
    trained: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rng, outcomes = random.Random(12), Counter[str]()
    sound, run = Path(trained.config.run.directory), tmp_path / "run"
    monkeypatch.setattr(trained.config.run, "directory", str(run))
    for case in range(CASES):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(sound, run)
        done = "nothing" if case == 0 else mutate(run / "checkpoints", rng)
        for reader, read in readers(trained, run).items():
            try:
                with at_once():
                    read()
                outcomes[f"{reader} ok"] += 1
            except (ConfigError, DataError, TrainingError) as error:
                outcomes[f"{reader} refused"] += 1
                assert case and "\n" not in str(error) and len(str(error)) < 3000, f"{case}: {done}: {reader}: {error}"
            except BaseException as error:
                raise AssertionError(f"case {case}: {done}: {reader}: {type(error).__name__}: {error}") from error
    print(f"FUZZ {CASES} checkpoints: {dict(outcomes)}")
    assert all(outcomes[f"{reader} refused"] > CASES // 2 for reader in ("sample", "export", "train"))
