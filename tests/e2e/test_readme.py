"""What the README tells a reader to type exists and is accepted."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from megatron_dlm import cli
from megatron_dlm.config.load import load_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
COMMANDS = [line.split("   #")[0].strip() for line in BLOCKS.splitlines() if line and not line.startswith("#")]


def after(command: str, words: str) -> list[str]:
    return shlex.split(command.partition(words)[2])


@pytest.mark.parametrize("command", [c for c in COMMANDS if " train " in c])
def test_training_commands_are_valid(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(after(command, " train "))
    assert config.data.train[0].path == "runs/data/train", "the tour prepares runs/data"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("megatron-dlm") and " train " not in c])
def test_other_commands_are_valid(command: str) -> None:
    name, *arguments = after(command, "megatron-dlm ")
    module = cli.module_of(name)
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    args = parser.parse_args(arguments)
    if name == "prepare":
        assert str(args.output) in ("runs/data", "runs/crossover-cpu-data")
    if getattr(args, "config", None):
        assert (ROOT / args.config).exists(), args.config


def test_files_and_make_targets_exist() -> None:
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z0-9-]+)", README):
        assert f"\n{target}:" in targets, target
    for path in re.findall(r"(?:tools|examples|docs)/[\w./-]+\.(?:py|yaml|png)", README):
        assert (ROOT / path).exists(), path


def test_there_is_something_to_check() -> None:
    assert len([c for c in COMMANDS if " train " in c]) == 4
    names = {c.split()[1] for c in COMMANDS if c.startswith("megatron-dlm")}
    assert names >= {"prepare", "sample", "export", "import", "evaluate", "noise-levels", "crossover", "doctor"}
