"""`megatron-dlm train --config FILE [--section.key value ...]`: check everything, then train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dlm.config.check import validate
from megatron_dlm.config.load import parse_config
from megatron_dlm.config.tree import Config
from megatron_dlm.launch import place
from megatron_dlm.launch.launcher import join, launch
from megatron_dlm.run_folder import RunFolder


def run(argv: Sequence[str]) -> int:
    """Train as ``argv`` says and return the exit code (see ``launch``). Raises ``ConfigError``."""
    config = parse_config(argv)
    if place.adopt():
        return join(_work, config, check)
    place.refuse_batch_script()
    return launch(_work, config, check=check)


def check(config: Config, world_size: int) -> None:
    """Find everything that would keep the run from being trained. Raises ``ConfigError`` or ``DataError``."""
    validate(config, world_size=world_size)  # before the slow imports
    RunFolder(Path(config.run.directory)).check_writable()
    from megatron_dlm.evaluation.during_training import check_questions
    from megatron_dlm.training.trainer import preflight

    check_questions(config, preflight(config, world_size=world_size))


def _work(config: dict[str, Any]) -> None:
    from megatron_dlm.evaluation.during_training import DuringTraining
    from megatron_dlm.training.trainer import run_worker

    run_worker(config, DuringTraining)
