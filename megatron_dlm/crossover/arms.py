"""Trains the arms of a crossover: each is a run of `megatron-dlm train` in a process and a folder of its own.

What is finished is not trained again; what was stopped or killed goes on from its checkpoint.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dlm.config.load import dump_yaml
from megatron_dlm.config.tree import Config
from megatron_dlm.crossover.curves import Arm
from megatron_dlm.crossover.grid import Crossover, check_recorded, first_difference, folder_of
from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.files import write_text
from megatron_dlm.formatting import format_duration
from megatron_dlm.launch import (
    DONE,
    FAILED,
    STOP_SIGNALS,
    STOPPED,
    StopHandler,
    Stopped,
    count_workers,
    directory_in_use,
)
from megatron_dlm.run_folder import RunFolder

_SECONDS_BETWEEN_LINES, _SHARE_BETWEEN_LINES = 30.0, 0.02
_SIGNAL_WHEN_PARENT_ENDS = 1  # prctl's PR_SET_PDEATHSIG


class Outcome(NamedTuple):
    """How the training of the arms ended."""

    failed: dict[str, str]
    """Reasons by the name of the arm."""
    stopped: bool
    """By a signal, with everything saved; the same command goes on."""

    @property
    def exit_code(self) -> int:
        """As of `megatron-dlm train`."""
        return FAILED if self.failed else STOPPED if self.stopped else DONE


@dataclass
class _Running:
    """An arm in training."""

    arm: Arm
    config: Config
    slot: int
    """Its place among those that run at once."""
    since: float
    said: float
    """When it was last spoken of."""


def train_arms(crossover: Crossover, say: Callable[[str], None] = print) -> Outcome:
    """Check everything, then train what is not finished, ``arms_at_once`` at a time.

    An arm that fails does not keep the others from running. A stop signal is handed to the arms, which save and end,
    and no other is started; a second one ends them at once. If this process is killed, the arms save and end too.

    Raises:
        ConfigError, DataError: one line, before anything is written or started.
    """
    with _single_thread(), StopHandler() as stop:
        try:
            facts = check_arms(crossover)
            with directory_in_use(crossover.base):
                write_arms(crossover, facts)
                return _train(crossover, stop, say)
        except Stopped:
            return Outcome({}, stopped=True)


def check_arms(crossover: Crossover) -> dict[Arm, dict[str, Any]]:
    """Find what would keep any arm from being trained here; nothing is written.

    Returns what ``write_arms`` takes: fingerprints of every arm's data. Raises ``ConfigError`` or ``DataError``.
    """
    check_recorded(crossover)
    return {arm: _preflight(arm, config) for arm, config in crossover.arms.items()}


def write_arms(crossover: Crossover, facts: dict[Arm, dict[str, Any]]) -> None:
    """Write every unfinished arm's train.yaml, for `megatron-dlm train`, and arm.json. Raises ``ConfigError``."""
    for arm, config in crossover.arms.items():
        if folder_of(config).is_finished:
            continue
        directory = Path(config.run.directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_text(directory / "arm.json", json.dumps(facts[arm], indent=2) + "\n")
            write_text(directory / "train.yaml", dump_yaml(config))
        except OSError as error:
            raise ConfigError(
                f"cannot write {directory}: {error.strerror}; make room or choose another --output"
            ) from None


def _preflight(arm: Arm, config: Config) -> dict[str, Any]:
    """Refuse what `train` would, and other data than at an earlier start; returns their fingerprints."""
    from megatron_dlm.commands.train import check
    from megatron_dlm.data.tokenizer import load_tokenizer
    from megatron_dlm.training.setup import open_data, total_steps

    try:
        if not folder_of(config).is_finished:
            check(config, count_workers(config))
        tokenizer = load_tokenizer(config.data.tokenizer)
        train, valid = open_data(config, tokenizer)
        steps = total_steps(config, train)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{arm.name}: {error}") from None
    assert valid is not None, "the grid asks for held-out data"
    if steps <= config.evaluate.interval:
        raise ConfigError(
            f"{arm.name} has {steps} steps, so evaluate.interval {config.evaluate.interval} gives no curve; lower it"
        )
    facts = {
        "train": [[f, s.weight] for f, s in zip(train.fingerprints, config.data.train, strict=True)],
        "valid": [[f, s.weight] for f, s in zip(valid.fingerprints, config.data.valid, strict=True)],
        "tokenizer": tokenizer.fingerprint,
    }
    directory = Path(config.run.directory)
    if (directory / "config.yaml").exists():
        try:
            recorded = json.loads((directory / "arm.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ConfigError(f"{directory / 'arm.json'} cannot be read; restore it, or remove that folder") from None
        if difference := first_difference(recorded, facts):
            raise ConfigError(
                f"{directory} was trained with other data.{difference[0]} than there are now; restore them, choose "
                "another --output, or remove that folder to train the arm again"
            )
    return facts


def _train(crossover: Crossover, stop: StopHandler, say: Callable[[str], None]) -> Outcome:
    waiting = [arm for arm, config in crossover.arms.items() if not folder_of(config).is_finished]
    running: dict[BaseProcess, _Running] = {}
    failed: dict[str, str] = {}
    stopped = announced = False
    say(
        f"arms     {len(crossover.arms)} in {crossover.directory}, {len(crossover.arms) - len(waiting)} finished before"
    )
    while running or (waiting and not stop.received):
        while waiting and len(running) < crossover.arms_at_once and not stop.received:
            slot = min(set(range(crossover.arms_at_once)) - {other.slot for other in running.values()})
            arm = waiting.pop(0)
            now = time.monotonic()
            say(f"start    {arm.name}")
            process = _start(crossover.arms[arm], slot, crossover.arms_at_once)
            running[process] = _Running(arm, crossover.arms[arm], slot, now, now)
            if stop.received:  # it came before there was a process that it could be handed to
                process.terminate()
        wait([process.sentinel for process in running], timeout=1.0)
        if stop.received and not announced:
            announced = True
            say("stopping the arms, which save; once more to end them at once")
        for process in [process for process in running if not process.is_alive()]:
            process.join()
            ended = running.pop(process)
            took = format_duration(time.monotonic() - ended.since)
            if process.exitcode == DONE and folder_of(ended.config).is_finished:
                say(f"finished {ended.arm.name} after {took}{_last_figures(folder_of(ended.config))}")
            elif process.exitcode in (STOPPED, -signal.SIGTERM):
                stopped = True
                say(f"stopped  {ended.arm.name} after {took}{_last_figures(folder_of(ended.config))}")
            else:
                twice = "stopped by a second signal before a checkpoint was saved" if stop.received > 1 else None
                failed[ended.arm.name] = twice or _reason(folder_of(ended.config), process.exitcode)
                say(f"failed   {ended.arm.name} after {took}: {failed[ended.arm.name]}")
        for other in running.values():
            now = time.monotonic()
            if now - other.said > max(_SECONDS_BETWEEN_LINES, _SHARE_BETWEEN_LINES * (now - other.since)):
                other.said = now
                say(f"running  {other.arm.name}{_last_figures(folder_of(other.config))}")
    return Outcome(failed, stopped or bool(stop.received))


def _reason(folder: RunFolder, code: int) -> str:
    """Why an arm failed, in a line that names its log."""
    if status := folder.status():
        reason = status.reason
    else:
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{reason} (see {folder.path / 'train.log'})"


def _last_figures(folder: RunFolder) -> str:
    """Epoch, held-out loss and remaining time of the last records of a run; empty where there are none."""
    steps, evaluations = folder.last_records()
    step, evaluation = (records[-1] if records else {} for records in (steps, evaluations))
    epoch, eta, loss = step.get("epoch"), step.get("eta_seconds"), evaluation.get("valid_nelbo")
    figures = [
        "" if epoch is None else f" | epoch {epoch:.1f}",
        "" if loss is None else f" | held-out {loss:.4f} nats/tok",
        f" | eta {format_duration(eta)}" if eta else "",
    ]
    return "".join(figures)


def _start(config: Config, slot: int, slots: int) -> BaseProcess:
    """Start one arm; ``slot`` of ``slots`` decides which GPUs it gets where there are several."""
    import torch

    gpus = torch.cuda.device_count()
    # Forked processes share what this one has imported, but CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn" if gpus else "fork")
    devices = None
    if gpus:
        workers = count_workers(config)
        devices = ",".join(str((slot * workers + i) % gpus) for i in range(workers))
    threads = max(1, len(os.sched_getaffinity(0)) // slots) if hasattr(os, "sched_getaffinity") else 1
    sys.stdout.flush()
    sys.stderr.flush()
    process = context.Process(target=_train_arm, args=(config.run.directory, os.getpid(), threads, devices))
    process.start()
    return process


def _train_arm(directory: str, parent: int, threads: int, devices: str | None) -> None:
    """The body of an arm's process: `megatron-dlm train`, with its output in train.log."""
    os.setpgid(0, 0)  # a terminal's Ctrl-C comes to the crossover, which hands it on
    for number in STOP_SIGNALS:
        if isinstance(signal.getsignal(number), StopHandler):
            signal.signal(number, signal.SIG_DFL)
    _end_with(parent)
    log = open(Path(directory, "train.log"), "a", buffering=1, encoding="utf-8")
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    sys.stdout = sys.stderr = log
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices

    import torch

    cli = import_module("megatron_dlm.cli")

    given = os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(int(given) if given.isdigit() and int(given) else threads)
    sys.exit(cli.main(["train", "--config", str(Path(directory, "train.yaml"))]))


def _end_with(parent: int) -> None:
    """Have this process stopped, so that it saves, when ``parent`` is killed (on Linux)."""
    try:
        ctypes.CDLL(None).prctl(_SIGNAL_WHEN_PARENT_ENDS, signal.SIGTERM)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        os._exit(STOPPED)


@contextmanager
def _single_thread() -> Iterator[None]:
    """A process that has used a pool of threads cannot be forked: the pool's threads are missing in the child."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
