"""What the ranks of a run do about checkpoints together: rank 0 looks and decides, and tells the others.

A listing of a network file system may be stale on one node and fresh on another, so no rank acts on its own.
"""

from __future__ import annotations

import pickle
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_dlm.errors import TrainingError

T = TypeVar("T")
_SECONDS_UNTIL_SHOWN = 10.0


def on_rank_zero(action: Callable[[], T]) -> T:
    """What ``action`` gives on rank 0, on all ranks; collective. So is its error: no rank waits for another.

    A process without process groups is rank 0 of one.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return action()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def require_shared(folder: Path) -> None:
    """Find out, before anything is lost, whether all ranks see the files of rank 0 in ``folder``; collective.

    Raises:
        TrainingError: they do not, after some seconds in which a network file system shows new files; on all ranks.
    """

    def put() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        name = f".shared-{secrets.token_hex(8)}"
        (folder / name).write_text("whether all nodes share this folder\n", encoding="utf-8")
        return name

    token = folder / on_rank_zero(put)
    deadline = time.monotonic() + _SECONDS_UNTIL_SHOWN
    while not (seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, None if seen else socket.gethostname())
    on_rank_zero(token.unlink)
    if blind := [f"rank {rank} on {host}" for rank, host in enumerate(answers) if host]:
        raise TrainingError(
            f"{blind[0]} does not see what rank 0 writes into {folder}; run.directory must be an absolute path on a "
            "file system that all nodes share"
        )


def first_failure(error: BaseException) -> BaseException:
    """The error behind torch's, which has those of all ranks; itself where there is none."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return error


def cause(error: BaseException) -> str:
    """What went wrong, in a line."""
    error = first_failure(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({Path(error.filename).name})" if error.filename else "")
    # torch advises to load it all the same.
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error):
        return "a file of it has something else than tensors and plain values"
    return str(error).strip().partition("\n")[0] or type(error).__name__
