"""Start the workers of a run, or join those that torchrun started; exit codes and status.json.

Exit codes: 0 done, 2 the configuration or the data cannot be used, 75 stopped by a signal with nothing lost
(start it again), 1 anything else. The code and its reason are also in ``<run.directory>/status.json`` once a run
has ended, because torchrun turns any worker's code into 1. What is refused before it begins leaves the directory as
it was, except under torchrun, where nothing else keeps the reason.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from megatron_dlm.config.load import to_dict
from megatron_dlm.config.tree import Config
from megatron_dlm.environment import has_rank, require_place
from megatron_dlm.errors import ConfigError, DataError, TrainingError
from megatron_dlm.run_folder import DONE, FAILED, INVALID, STOPPED, RunFolder, Status

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Worker = Callable[[dict[str, Any]], None]
Check = Callable[[Config, int], None]


STOPPED_EARLY = Status(STOPPED, "stopped by a signal before training began; there was nothing to save")


class Stopped(BaseException):
    """A stop signal came while there was no training to save."""


class Refused(Exception):
    """The check found an error (the cause) before anything began."""


class StopHandler:
    """Stop signals of the launcher, handed to whoever can save: workers, or the trainer in this process.

    They get a SIGTERM. While there is neither, ``Stopped`` is raised. Workers are in process groups of their own,
    so that a terminal's Ctrl-C comes to them once and from here: a second one tells them not to save.
    """

    def __init__(self) -> None:
        self.received = 0
        self.owner = os.getpid()
        # Of whoever calls this as a library: helpers of multiprocessing, say.
        self.others = set(psutil.Process().children())

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.owner:
            os._exit(STOPPED)  # a worker in the moment after its fork
        self.received += 1
        # Not multiprocessing.active_children(), which does not know a worker that is being started just now.
        workers = set(psutil.Process().children()) - self.others
        if signal.getsignal(signal.SIGTERM) is not self:
            os.kill(self.owner, signal.SIGTERM)
        elif workers:
            for worker in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.terminate()
        else:
            raise Stopped

    def __enter__(self) -> StopHandler:
        self.previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number, previous in self.previous.items():
            if previous is not signal.SIG_IGN:  # nohup stays in force
                signal.signal(number, self)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, previous in self.previous.items():
            signal.signal(number, previous)


def started_by_torchrun() -> bool:
    """Whether this process is already one of several. Raises ``ConfigError`` if it cannot tell which."""
    if "WORLD_SIZE" not in os.environ:
        return False
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE is set but {missing[0]} is not; start with torchrun, or unset WORLD_SIZE")
    require_place()
    return True


def is_first_rank() -> bool:
    """Whether this process is the one that prints and writes; known before there are process groups."""
    return os.environ.get("RANK", "0") == "0" or not has_rank()


def count_workers(config: Config) -> int:
    """Processes to start on this machine. Raises ``ConfigError`` if it has too few GPUs."""
    import torch

    parallel = config.parallel
    gpus = torch.cuda.device_count()
    if gpus and parallel.data_parallel_size is None:
        return gpus
    wanted = parallel.model_parallel_size * (parallel.data_parallel_size or 1)
    if gpus and wanted > gpus:
        raise ConfigError(
            f"the layout needs {wanted} GPUs but this machine has {gpus}; lower parallel.data_parallel_size or the "
            "model-parallel sizes, or start the run on more machines with torchrun"
        )
    return wanted


def launch(fn: Worker, config: Config, world_size: int | None = None, check: Check | None = None) -> int:
    """Run ``fn(to_dict(config))`` in processes of this machine (``count_workers`` of them) and return the exit code.

    ``check(config, world_size)`` runs before, here; forked workers share what it imported. One process is not
    started but is this one, so that a debugger works. What the check refuses leaves the run's directory as it was.
    """
    with StopHandler() as stop, contextlib.ExitStack() as directory:
        try:
            world_size = count_workers(config) if world_size is None else world_size
            outcome = _launch(fn, config, world_size, check, stop, directory)
        except Stopped:
            outcome = STOPPED_EARLY
        except SystemExit as end:
            outcome = _ended(end)
        except Refused as refused:
            return _report(refused.__cause__).exit_code
        except Exception as error:
            outcome = _report(error)
        _write_status(config, outcome)
    return outcome.exit_code


def join(fn: Worker, config: Config, check: Check | None = None) -> int:
    """Run ``fn(to_dict(config))`` as one of the processes that torchrun started and return the exit code.

    ``check(config, world_size)`` runs in one process of each machine. What it finds wrong with the configuration is
    printed by rank 0; what it finds wrong with data files by every machine that finds it.
    """
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    with directory_in_use(config) if rank == 0 else contextlib.nullcontext():
        try:
            if check and local_rank == 0:
                check(config, int(os.environ["WORLD_SIZE"]))
        except Exception as error:
            outcome = Status(INVALID, str(error))
            if rank == 0 or not isinstance(error, ConfigError):
                outcome = _report(error)
        else:
            outcome = _run_joined(fn, config, rank)
        if rank == 0:
            _write_status(config, outcome)
    return outcome.exit_code


def _run_joined(fn: Worker, config: Config, rank: int) -> Status:
    try:
        fn(to_dict(config))
        return Status(DONE, "done")
    except SystemExit as end:
        return _ended(end)
    except Exception as error:
        return _report(error, f"[rank {rank}] ")


def _launch(
    fn: Worker,
    config: Config,
    world_size: int,
    check: Check | None,
    stop: StopHandler,
    directory: contextlib.ExitStack,
) -> Status:
    if world_size == 1:
        _begin(config, world_size, check, directory)
        with _environment(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, LOCAL_WORLD_SIZE=1, **_address()):
            fn(to_dict(config))
        return Status(DONE, "done")

    import torch

    with _environment(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", 1)):
        # A process that has used a pool of threads cannot be forked: the pool's threads are missing in the child.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            _begin(config, world_size, check, directory)
            return _start_workers(fn, config, world_size, stop)
        finally:
            torch.set_num_threads(threads)


def _begin(config: Config, world_size: int, check: Check | None, directory: contextlib.ExitStack) -> None:
    """Check, then take the run's directory. Raises ``Refused``, with everything as it was."""
    try:
        if check:
            check(config, world_size)
        directory.enter_context(directory_in_use(config))
    except (ConfigError, DataError) as error:
        raise Refused from error


def _start_workers(fn: Worker, config: Config, world_size: int, stop: StopHandler) -> Status:
    """Start ``world_size`` workers with torchrun's agent, wait for them, and say how they ended."""
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed."):  # its banners repeat what the worker has said
            logging.getLogger(name).setLevel(logging.CRITICAL)
    address = _address()
    with tempfile.TemporaryDirectory(prefix="megatron-dlm-") as scratch:
        report = Path(scratch, "error.json")
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world_size,
            run_id="megatron-dlm",
            rdzv_backend="static",
            rdzv_endpoint=f"{address['MASTER_ADDR']}:{address['MASTER_PORT']}",
            rdzv_configs={"rank": 0},
            max_restarts=0,
            # Forked workers share the launcher's imports, but CUDA does not survive a fork.
            start_method="spawn" if torch.cuda.is_available() else "fork",
            logs_specs=DefaultLogsSpecs(log_dir=scratch),
            # Left to itself the agent kills workers 30 seconds after a stop signal, saved or not.
            signals_to_handle="SIGQUIT",
        )
        try:
            codes = elastic_launch(settings, _work)(fn, to_dict(config), report)
        except ChildFailedError as error:
            return _failure(error, report, stop)
    if STOPPED in codes.values():
        return Status(STOPPED, "stopped by a signal; a checkpoint is saved")
    return Status(DONE, "done")


def _work(fn: Worker, config: dict[str, Any], report: Path) -> int:
    """The body of a started worker: ``fn``, with its first error in ``report`` and on stderr."""
    import torch

    launcher = os.getppid()
    os.setpgid(0, 0)
    for number in STOP_SIGNALS:
        if isinstance(signal.getsignal(number), StopHandler):
            signal.signal(number, signal.SIG_DFL)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit():
        torch.set_num_threads(int(threads))  # the variable is only read before a fork
    code = DONE
    try:
        fn(config)
    except SystemExit as end:
        if end.code != STOPPED:
            raise
        code = STOPPED
    except Exception as error:
        # The others fail too when one is gone; only the cause is worth reading.
        try:
            with open(report, "x", encoding="utf-8") as file:
                json.dump(_report(error, f"[rank {os.environ['RANK']}] "), file)
        except FileExistsError:
            pass
        sys.exit(FAILED)
    if os.getppid() != launcher:  # it was killed, and the agent's part of this process would wait for it for ever
        os._exit(code)
    return code


def _failure(error: Any, report: Path, stop: StopHandler) -> Status:
    """The outcome of workers of which at least one failed (``error`` is the agent's ``ChildFailedError``)."""
    # A worker that was killed explains what the others say of a lost connection. The agent's own way to end them is
    # SIGTERM.
    killed = [(rank, f) for rank, f in error.failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM]
    if report.exists() and not killed:
        return Status(*json.loads(report.read_text(encoding="utf-8")))
    rank, failure = killed[0] if killed else error.get_first_failure()
    if stop.received > 1:
        outcome = Status(FAILED, "stopped by a second signal before a checkpoint was saved")
    elif stop.received and failure.exitcode in (-signal.SIGTERM, STOPPED):
        return STOPPED_EARLY
    elif failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        outcome = Status(FAILED, f"the worker of rank {rank} was killed by {name}{hint}")
    else:
        outcome = Status(FAILED, f"the worker of rank {rank} ended with exit code {failure.exitcode}")
    print(f"megatron-dlm: error: {outcome.reason}", file=sys.stderr, flush=True)
    return outcome


def _ended(end: SystemExit) -> Status:
    """The outcome of a worker function that ended its process."""
    if end.code == STOPPED:
        return Status(STOPPED, "stopped by a signal; a checkpoint is saved")
    if end.code in (None, 0):
        return Status(DONE, "done")
    return Status(FAILED, f"the worker ended with exit code {end.code}")


def _report(error: BaseException | None, prefix: str = "") -> Status:
    """Print ``error``, in one line if its message says all that there is to say, else with its traceback."""
    invalid = isinstance(error, ConfigError | DataError)
    if invalid or isinstance(error, TrainingError):
        print(f"megatron-dlm: error: {prefix}{error}", file=sys.stderr, flush=True)
        return Status(INVALID if invalid else FAILED, str(error))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or "a file of the run"
        reason = f"cannot write {where}: {error.strerror}; make room, and the same command continues the run"
        print(f"megatron-dlm: error: {prefix}{reason}", file=sys.stderr, flush=True)
        return Status(FAILED, reason)
    text = "".join(traceback.format_exception(error))
    print(f"{prefix}{text}", file=sys.stderr, end="", flush=True)
    return Status(FAILED, text.rstrip().rpartition("\n")[2])


@contextlib.contextmanager
def directory_in_use(config: Config) -> Iterator[int]:
    """Make the run's directory and lock it: two runs in one would destroy each other's checkpoints.

    An old status.json is removed, because it would be taken for this run's. Yields the lock's file descriptor: the lock
    lasts as long as any process that has inherited it, as forked workers do. Raises ``ConfigError`` if the directory is
    in use or cannot be written.
    """
    folder = RunFolder(Path(config.run.directory))
    directory = folder.path
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder.lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"cannot write run.directory {str(directory)!r}: {error.strerror}; choose another") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            where = f"run.directory {str(directory)!r}"
            raise ConfigError(f"another run is using {where}; wait for its end or choose another") from None
        except OSError:  # a file system without locks
            pass
        folder.status_file.unlink(missing_ok=True)
        yield lock
    finally:
        os.close(lock)


def _write_status(config: Config, outcome: Status) -> None:
    folder = RunFolder(Path(config.run.directory))
    if not folder.path.exists():  # stopped before there was anything to say
        return
    try:
        folder.write_status(outcome)
    except OSError as error:
        print(f"megatron-dlm: cannot write {folder.status_file}: {error.strerror}", file=sys.stderr)


def _address() -> dict[str, str]:
    """Where the workers of this machine meet: a free port (of torch.distributed's own variables)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}


@contextlib.contextmanager
def _environment(**variables: object) -> Iterator[None]:
    """Set environment variables that torch reads, for a while."""
    previous = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        for name, value in previous.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
