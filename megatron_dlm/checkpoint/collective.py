"""What the ranks of a run decide about checkpoints together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_dlm.checkpoint import manifest
from megatron_dlm.checkpoint.stored import LATEST, SMALL
from megatron_dlm.errors import ConfigError


def shared_fault(directory: Path) -> str | None:
    """``manifest.find_fault`` with the reading shared among the ranks; collective, the same answer everywhere."""
    fault = unreadable = None
    try:
        records = manifest.read(directory)
        names = sorted({*records, *SMALL}, key=lambda name: records[name].size if name in records else 0, reverse=True)
        fault = manifest.find_fault(directory, names[dist.get_rank() :: dist.get_world_size()])
    except ValueError as error:
        fault = str(error)
    except OSError as error:
        unreadable = error.strerror
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (fault, unreadable))
    for _, unreadable in answers:
        if unreadable:
            raise unreadable(directory, unreadable)
    return next((fault for fault, _ in answers if fault), None)


def unreadable(directory: Path, reason: str | None) -> ConfigError:
    """Not a reason to fall back: the next save would replace a checkpoint that may be sound."""
    return ConfigError(f"cannot read {directory}: {reason}; correct that, or set {directory.parent / LATEST} back")


def on_rank_zero(action: Callable[[], None]) -> None:
    """Do something on rank 0 that all ranks wait for; collective. Its ``OSError`` is raised on all of them."""
    failure: list[OSError | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            failure = [error]
    dist.broadcast_object_list(failure)
    if failure[0]:
        raise failure[0]


def cause(error: Exception) -> str:
    """What went wrong, in a line; torch's exception has the errors of all ranks."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().partition("\n")[0] or type(error).__name__
