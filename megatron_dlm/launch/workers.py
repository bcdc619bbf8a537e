"""The processes of a run on this machine: started, watched, and ended together."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_dlm.launch import outcome
from megatron_dlm.launch.stop_signal import STOP_SIGNALS, SecondSignal, StopHandler, stop_with_parent
from megatron_dlm.run_folder import DONE, FAILED, STOPPED, Status

_SETTLE = 0.5
"""Seconds in which the ends of other workers are heard before one is taken for the first."""
_PATIENCE = 10.0
"""Seconds between the request that workers end and their being killed, once one has failed."""


def start_workers(
    fn: Callable[[dict[str, Any]], None], config: dict[str, Any], world_size: int, stop: StopHandler
) -> Status:
    """Run ``fn(config)`` in ``world_size`` processes, wait for them, and say how they ended.

    They meet at the loopback address, so nothing of them is reachable from other machines.
    """
    import torch

    # Forked workers share the launcher's imports, but CUDA does not survive a fork.
    gpu = torch.cuda.is_available()
    context = multiprocessing.get_context("spawn") if gpu else multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="megatron-dlm-") as scratch, _listening(world_size) as (listener, port):
        report = Path(scratch, "error.json")
        workers = [
            context.Process(target=_work, args=(fn, config, rank, world_size, port, report, os.getpid()))
            for rank in range(world_size)
        ]
        stop.hands_on = True
        try:
            for worker in workers:
                worker.start()
            # Made after the forks: it starts a thread, which a child would lack.
            store = torch.distributed.TCPStore(
                "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
            )
            failed = _wait(workers)
        finally:
            _end(workers)
            stop.hands_on = False
        del store
        if not failed:
            stopped = any(worker.exitcode == STOPPED for worker in workers)
            return outcome.SAVED if stopped else Status(DONE, "done")
        return _failure({rank: workers[rank].exitcode or 0 for rank in failed}, report, stop)


@contextlib.contextmanager
def _listening(backlog: int) -> Iterator[tuple[socket.socket, int]]:
    with socket.create_server(("127.0.0.1", 0), backlog=max(backlog, 128)) as listener:
        yield listener, listener.getsockname()[1]


def _wait(workers: Sequence[BaseProcess]) -> list[int]:
    """Wait until all have ended well, or one has not; returns the ranks that have failed by then."""
    running = list(workers)
    while running:
        wait([worker.sentinel for worker in running])
        if any(worker.exitcode not in (None, DONE, STOPPED) for worker in running):
            time.sleep(_SETTLE)  # of one that was killed the others may hear before its end is seen here
            return [rank for rank, worker in enumerate(workers) if worker.exitcode not in (None, DONE, STOPPED)]
        running = [worker for worker in running if worker.exitcode is None]
    return []


def _end(workers: Sequence[BaseProcess]) -> None:
    """Ask those that still run to end, and kill those that do not."""
    running = [worker for worker in workers if worker.is_alive()]
    for worker in running:
        worker.terminate()
    deadline = time.monotonic() + _PATIENCE
    for worker in running:
        worker.join(max(0.0, deadline - time.monotonic()))
        worker.kill()
        worker.join()


def _work(
    fn: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    rank: int,
    world_size: int,
    port: int,
    report: Path,
    launcher: int,
) -> None:
    """The body of a worker: ``fn``, with the first error of all of them in ``report`` and on stderr."""
    import torch

    os.setpgid(0, 0)
    stop_with_parent(launcher)  # the lock of the run's directory may end with it
    for number in STOP_SIGNALS:
        if isinstance(signal.getsignal(number), StopHandler):
            signal.signal(number, signal.SIG_DFL)
    gc.freeze()  # megatron collects garbage at every save, and what was inherited is none
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit():
        torch.set_num_threads(int(threads))  # the variable is only read before a fork

    def record(error: BaseException, decisive: bool = False) -> None:
        # The others fail too when one is gone; only the cause is worth reading.
        with contextlib.suppress(FileExistsError), report.open("x", encoding="utf-8") as file:
            json.dump([*outcome.report(error, f"[rank {rank}] "), decisive], file)

    outcome.record_fatal_with(lambda error: record(error, decisive=True))
    try:
        fn(config)
    except SecondSignal:
        os._exit(FAILED)
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which the launcher ends those that still run
        record(error)
        sys.exit(FAILED)


def _failure(codes: dict[int, int], report: Path, stop: StopHandler) -> Status:
    """The outcome of workers of which those of ``codes`` (exit codes by rank) failed."""
    by_request = (-signal.SIGTERM, -signal.SIGUSR1)
    # A worker that was killed explains what the others say of a lost connection.
    killed = [rank for rank, code in codes.items() if code < 0 and code not in by_request]
    if report.exists() and (text := report.read_text(encoding="utf-8")):
        *status, decisive = json.loads(text)
        if decisive or not killed:
            return Status(*status)
    rank = killed[0] if killed else min(codes)
    code = codes[rank]
    if stop.received > 1:
        found = outcome.SECOND_SIGNAL
    elif (stop.received or stop.warned) and code in by_request:
        return outcome.STOPPED_EARLY
    elif code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        found = Status(FAILED, f"the worker of rank {rank} was killed by {name}{hint}")
    else:
        found = Status(FAILED, f"the worker of rank {rank} ended with exit code {code}")
    outcome.say(found.reason)
    return found
