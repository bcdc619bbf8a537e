"""Runs a function on several gloo ranks of this machine and returns rank 0's result.

Ranks are forked, so they share the imports of the parent: far cheaper than torchrun.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def start_ranks(
    function: Callable[..., Any], world_size: int, folder: Path, *args: Any
) -> list[multiprocessing.process.BaseProcess]:
    """Start ``function(*args)`` on every rank; rank 0's result is left in ``folder``, and errors are too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_run, args=(function, rank, world_size, port, folder, args))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    return ranks


def run_ranks(function: Callable[..., Any], world_size: int, folder: Path, *args: Any, timeout: float = 240.0) -> Any:
    """Call ``function(*args)`` on every rank. Raises with the first failing rank's traceback, or on a time-out."""
    ranks = start_ranks(function, world_size, folder, *args)
    deadline = time.monotonic() + timeout
    try:
        while any(process.is_alive() for process in ranks):
            failed = next((i for i, process in enumerate(ranks) if process.exitcode not in (None, 0)), None)
            if failed is not None:
                raise RuntimeError(_failure(folder, failed, ranks[failed].exitcode))
            if time.monotonic() > deadline:
                raise TimeoutError(f"ranks still running after {timeout} s")
            time.sleep(0.02)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    failed = next((i for i, process in enumerate(ranks) if process.exitcode != 0), None)
    if failed is not None:
        raise RuntimeError(_failure(folder, failed, ranks[failed].exitcode))
    return pickle.loads((folder / "result.pickle").read_bytes())


def _failure(folder: Path, rank: int, code: int | None) -> str:
    report = folder / f"error-{rank}.txt"
    return f"rank {rank} ended with {code}:\n{report.read_text() if report.exists() else ''}"


def _run(function: Callable[..., Any], rank: int, world_size: int, port: int, folder: Path, args: tuple) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo")
        result = function(*args)
        if rank == 0:
            (folder / "result.pickle").write_bytes(pickle.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
