"""Start the workers of a run, or join those that torchrun, srun or mpirun started; exit codes and status.json.

Exit codes: 0 done, 2 the configuration or the data cannot be used, 75 stopped by a signal with nothing lost
(start it again), 1 anything else. The code and its reason are also in ``<run.directory>/status.json`` once a run
has ended, because torchrun turns any worker's code into 1. What is refused before it begins leaves the directory as
it was, except under a launcher, where nothing else keeps the reason.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_dlm.config.load import to_dict
from megatron_dlm.config.tree import Config
from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.launch import outcome, place, restart
from megatron_dlm.launch.run_lock import directory_in_use
from megatron_dlm.launch.stop_signal import SecondSignal, StopHandler, Stopped, was_warned
from megatron_dlm.run_folder import DONE, FAILED, INVALID, STOPPED, RunFolder, Status

Worker = Callable[[dict[str, Any]], None]
Check = Callable[[Config, int], None]


class Refused(Exception):
    """The check found an error (the cause) before anything began."""


def count_workers(config: Config) -> int:
    """Processes to start on this machine. Raises ``ConfigError`` if it has too few GPUs."""
    parallel, gpus = config.parallel, _gpus()
    if gpus and parallel.data_parallel_size is None:
        return gpus
    wanted = parallel.model_parallel_size * (parallel.data_parallel_size or 1)
    if gpus and wanted > gpus:
        raise ConfigError(
            f"the layout needs {wanted} GPUs but this machine has {gpus}; lower parallel.data_parallel_size or the "
            "model-parallel sizes, or start the run on more machines with torchrun"
        )
    return wanted


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def launch(fn: Worker, config: Config, world_size: int | None = None, check: Check | None = None) -> int:
    """Run ``fn(to_dict(config))`` in processes of this machine (``count_workers`` of them) and return the exit code.

    ``check(config, world_size)`` runs before, here; forked workers share what it imported. One process is not
    started but is this one, so that a debugger works. What the check refuses leaves the run's directory as it was.
    """
    with StopHandler() as stop, contextlib.ExitStack() as directory:
        outcome.record_fatal_with(lambda error: _write_status(config, outcome.report(error)))
        try:
            world_size = count_workers(config) if world_size is None else world_size
            ended = _launch(fn, config, world_size, check, stop, directory)
        except Stopped:
            ended = outcome.STOPPED_EARLY
        except SecondSignal:
            ended = outcome.SECOND_SIGNAL
            outcome.say(ended.reason)
        except SystemExit as end:
            ended = outcome.of_exit(end)
        except Refused as refused:
            return outcome.report(refused.__cause__).exit_code
        except Exception as error:
            ended = outcome.report(error)
        _write_status(config, ended)
    return ended.exit_code


def join(fn: Worker, config: Config, check: Check | None = None) -> int:
    """Run ``fn(to_dict(config))`` as one of the processes that a launcher started and return the exit code.

    ``check(config, world_size)`` runs in one process of each machine. What it finds wrong with the configuration is
    printed by rank 0; what it finds wrong with data files by every machine that finds it.
    """
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    with StopHandler(), directory_in_use(config) if rank == 0 else contextlib.nullcontext():
        outcome.record_fatal_with(lambda error: _write_status(config, outcome.report(error, f"[rank {rank}] ")))
        try:
            if restart.is_unwanted(config, first=rank == 0):
                ended = outcome.SAVED
            else:
                place.refuse_idle_gpus(_gpus())
                if check and local_rank == 0:
                    check(config, int(os.environ["WORLD_SIZE"]))
                ended = _run_joined(fn, config, rank)
        except Stopped:
            ended = outcome.STOPPED_EARLY
        except Exception as error:
            ended = Status(INVALID, str(error))
            if rank == 0 or not isinstance(error, ConfigError):
                ended = outcome.report(error)
        if rank == 0:
            _write_status(config, ended)
            if ended.exit_code == STOPPED and was_warned():
                restart.refuse(config)
        if ended == outcome.SECOND_SIGNAL:
            sys.stdout.flush()
            os._exit(FAILED)  # the process groups would wait for the others
    return ended.exit_code


def _run_joined(fn: Worker, config: Config, rank: int) -> Status:
    try:
        fn(to_dict(config))
        return Status(DONE, "done")
    except SecondSignal:
        outcome.say(f"[rank {rank}] {outcome.SECOND_SIGNAL.reason}")
        return outcome.SECOND_SIGNAL
    except SystemExit as end:
        return outcome.of_exit(end)
    except Exception as error:
        return outcome.report(error, f"[rank {rank}] ")


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
        with _environment(RANK=0, LOCAL_RANK=0):
            fn(to_dict(config))
        return Status(DONE, "done")

    import torch

    from megatron_dlm.launch.workers import start_workers  # multiprocessing, which one process does without

    with _environment(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", 1)):
        # A process that has used a pool of threads cannot be forked: the pool's threads are missing in the child.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            _begin(config, world_size, check, directory)
            return start_workers(fn, to_dict(config), world_size, stop)
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


def _write_status(config: Config, ended: Status) -> None:
    """Say how the run ended; not where another rank (its watchdog) has said so, or there is no folder yet."""
    folder = RunFolder(Path(config.run.directory))
    if not folder.path.exists() or folder.status_file.exists():
        return
    try:
        folder.write_status(ended)
    except OSError as error:
        print(f"megatron-dlm: cannot write {folder.status_file}: {error.strerror}", file=sys.stderr)


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
