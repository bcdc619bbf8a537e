"""Runs a function on several gloo ranks of this machine and returns rank 0's result.

Ranks are forked, so they share the imports of the parent: far cheaper than torchrun.
"""

from __future__ import annotations

import gc
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
    context = multiprocessing.get_context("fork")
    # Rank 0 inherits the listening socket: a port that is merely free now may be taken until it binds it.
    with socket.create_server(("127.0.0.1", 0), backlog=world_size) as meeting:
        ranks = [
            context.Process(target=_run, args=(function, rank, world_size, meeting, folder, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
    return ranks


def run_ranks(function: Callable[..., Any], world_size: int, folder: Path, *args: Any) -> Any:
    """Call ``function(*args)`` on every rank. Raises with the first failing rank's traceback."""
    ranks = start_ranks(function, world_size, folder, *args)
    try:
        while any(process.is_alive() for process in ranks):
            failed = next((i for i, process in enumerate(ranks) if process.exitcode not in (None, 0)), None)
            if failed is not None:
                raise RuntimeError(_failure(folder, failed, ranks[failed].exitcode))
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


def _run(
    function: Callable[..., Any], rank: int, world_size: int, meeting: socket.socket, folder: Path, args: tuple
) -> None:
    gc.freeze()  # megatron collects garbage at every save, and what was inherited is none
    port = meeting.getsockname()[1]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        server = {"is_master": True, "master_listen_fd": meeting.detach()} if rank == 0 else {}
        store = dist.TCPStore("127.0.0.1", port, world_size, wait_for_workers=False, **server)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        result = function(*args)
        if rank == 0:
            (folder / "result.pickle").write_bytes(pickle.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
