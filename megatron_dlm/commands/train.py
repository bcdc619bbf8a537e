"""`megatron-dlm train --config FILE [--section.key value ...]`: check everything, then train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_dlm import launch
from megatron_dlm.config import Config
from megatron_dlm.config_loading import parse_config
from megatron_dlm.config_validation import validate


def run(argv: Sequence[str]) -> int:
    """Train as ``argv`` says and return the exit code (see ``launch``). Raises ``ConfigError``."""
    config = parse_config(argv)
    if launch.started_by_torchrun():
        return launch.join(_work, config, _check)
    return launch.launch(_work, config, check=_check)


def _check(config: Config, world_size: int) -> None:
    validate(config, world_size=world_size)  # before the slow imports
    from megatron_dlm.training.trainer import preflight

    preflight(config, world_size=world_size)


def _work(config: dict[str, Any]) -> None:
    from megatron_dlm.training.trainer import run_worker

    run_worker(config)
