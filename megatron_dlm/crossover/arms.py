"""Trains the arms of a crossover: each is a run of `megatron-dlm train` in a process and a folder of its own.

What is finished is not trained again; what was stopped or killed goes on from its checkpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dlm.config.load import dump_yaml
from megatron_dlm.config.tree import Config
from megatron_dlm.crossover import end_with_parent
from megatron_dlm.crossover.curves import Arm
from megatron_dlm.crossover.grid import Crossover, check_recorded, first_difference, folder_of
from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.files import json_text, read_json_object, write_text
from megatron_dlm.formatting import format_duration
from megatron_dlm.launch.launcher import count_workers
from megatron_dlm.launch.run_lock import directory_in_use
from megatron_dlm.launch.stop_signal import StopHandler, Stopped
from megatron_dlm.run_folder import DONE, FAILED, STOPPED, RunFolder

COMMAND = (sys.executable, "-m", "megatron_dlm")
"""Starts this command line in a process of its own."""

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_BETWEEN_LINES, _SHARE_BETWEEN_LINES = 30.0, 0.02


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
    folder: RunFolder
    process: subprocess.Popen[bytes]
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
    with StopHandler(hands_on=True, second=signal.SIGTERM) as stop:  # each arm's launcher kills its own workers then
        try:
            facts = check_arms(crossover)
            with directory_in_use(crossover.base) as lock:
                write_arms(crossover, facts)
                return _train(crossover, stop, lock, say)
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
            write_text(directory / "arm.json", json_text(facts[arm]))
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
    if folder_of(config).config.exists():
        recorded = read_json_object(directory / "arm.json", "restore it, or remove that folder")
        if difference := first_difference(recorded, facts):
            raise ConfigError(
                f"{directory} was trained with other data.{difference[0]} than there are now; restore them, choose "
                "another --output, or remove that folder to train the arm again"
            )
    return facts


def _train(crossover: Crossover, stop: StopHandler, lock: int, say: Callable[[str], None]) -> Outcome:
    waiting = [arm for arm, config in crossover.arms.items() if not folder_of(config).is_finished]
    running: list[_Running] = []
    failed: dict[str, str] = {}
    stopped = announced = False
    say(
        f"arms     {len(crossover.arms)} in {crossover.directory}, {len(crossover.arms) - len(waiting)} finished before"
    )
    while running or (waiting and not stop.received):
        while waiting and len(running) < crossover.arms_at_once and not stop.received:
            slot = min(set(range(crossover.arms_at_once)) - {other.slot for other in running})
            say(f"start    {waiting[0].name}")
            running.append(_start(crossover, waiting.pop(0), slot, stop, lock))
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        if stop.received and not announced:
            announced = True
            say("stopping the arms, which save; once more to end them at once")
        for ended in [arm for arm in running if arm.process.poll() is not None]:
            running.remove(ended)
            name, code = ended.arm.name, ended.process.returncode
            took = format_duration(time.monotonic() - ended.since)
            if code == DONE and ended.folder.is_finished:
                say(f"finished {name} after {took}{_last_figures(ended.folder)}")
            elif code in (STOPPED, -signal.SIGTERM):  # the latter before it could handle signals, with nothing to save
                stopped = True
                say(f"stopped  {name} after {took}{_last_figures(ended.folder)}")
            else:
                twice = "stopped by a second signal before a checkpoint was saved" if stop.received > 1 else None
                failed[name] = twice or _reason(ended.folder, code)
                say(f"failed   {name} after {took}: {failed[name]}")
        for other in running:
            now = time.monotonic()
            if now - other.said > max(_SECONDS_BETWEEN_LINES, _SHARE_BETWEEN_LINES * (now - other.since)):
                other.said = now
                say(f"running  {other.arm.name}{_last_figures(other.folder)}")
    return Outcome(failed, stopped or bool(stop.received))


def _start(crossover: Crossover, arm: Arm, slot: int, stop: StopHandler, lock: int) -> _Running:
    """Start `megatron-dlm train` for an arm, with its output in train.log."""
    config = crossover.arms[arm]
    folder = folder_of(config)
    with open(folder.path / "train.log", "ab") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", end_with_parent.__name__, str(os.getpid())),
                *(*COMMAND, "train", "--config", str(folder.path / "train.yaml")),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,  # a terminal's Ctrl-C comes to the crossover, which hands it on
            pass_fds=(lock,),  # nobody else begins with this crossover while one of its arms still saves
            env=arm_environment(config, slot, crossover.arms_at_once),
        )
    if stop.received:  # it came before there was a process that it could be handed to
        process.terminate()
    now = time.monotonic()
    return _Running(arm, folder, process, slot, since=now, said=now)


def arm_environment(config: Config, slot: int, slots: int) -> dict[str, str]:
    """Variables of an arm: its share of the cores and, where there are GPUs, those of its ``slot`` of ``slots``."""
    import torch

    found = {**os.environ, "PYTHONUNBUFFERED": "1"}  # train.log is read while it is written
    workers, gpus = count_workers(config), torch.cuda.device_count()
    given = found.get("OMP_NUM_THREADS", "")
    if workers == 1 and not (given.isdigit() and int(given)):  # several workers get one thread each from `train`
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        found["OMP_NUM_THREADS"] = str(max(1, cores // slots))
    if gpus:
        # Their names outside, where this process may see only some of them itself.
        visible = found.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = visible if len(visible) >= gpus else [str(i) for i in range(gpus)]
        found["CUDA_VISIBLE_DEVICES"] = ",".join(names[(slot * workers + i) % gpus] for i in range(workers))
    return found


def _reason(folder: RunFolder, code: int) -> str:
    """Why an arm failed, in a line that names its log."""
    status = folder.status()
    if status and status.exit_code == code:  # else it is of an earlier start, where this one did not get so far
        reason = status.reason
    else:
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{reason} (see {folder.path / 'train.log'})"


def _last_figures(folder: RunFolder) -> str:
    """Epoch, held-out loss and remaining time of the last records of a run; empty where there are none."""
    step, evaluation = (records[-1] if records else {} for records in folder.last_records())
    epoch, eta, loss = step.get("epoch"), step.get("eta_seconds"), evaluation.get("valid_nelbo")
    figures = [
        "" if epoch is None else f" | epoch {epoch:.1f}",
        "" if loss is None else f" | held-out {loss:.4f} nats/tok",
        f" | eta {format_duration(eta)}" if eta else "",
    ]
    return "".join(figures)
