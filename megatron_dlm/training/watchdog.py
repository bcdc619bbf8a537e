"""Ends a run that does not go on, and says which rank the others wait for.

Every rank tells the store of the process groups every few seconds what it is doing, from a thread of its own. When one
has not gone on for as long as its phase may take, all write their Python stacks and their last collectives into the
run's folder, one of them says in a line who is missing, and they end with exit code 1. A rank that does not even tell
is stopped or stuck outside Python: a sibling that still runs has it write its stacks and die (SIGABRT, which
`faulthandler` answers without the help of Python).
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, TypeVar

import psutil
import torch
import torch.distributed as dist

import megatron_dlm
from megatron_dlm.config.tree import RunConfig
from megatron_dlm.errors import TrainingError
from megatron_dlm.launch import outcome
from megatron_dlm.parallel.pulse import PULSE, VERIFYING
from megatron_dlm.run_folder import RunFolder

T = TypeVar("T")
_LONGEST_INTERVAL = 5.0
"""Seconds between two beats, at most."""
_ALARM, _VERDICT = "alarm", "verdict"
_SECONDS_TO_WRITE = 10.0
"""For stacks and status: the file system may be what does not go on."""


class Beat(NamedTuple):
    """What a rank tells about itself."""

    rank: int
    host: str
    process: int
    told: int
    """How often it has."""
    phase: str
    step: int
    where: str
    """The innermost line of our code that its main thread is in."""

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"

    @property
    def doing(self) -> tuple[str, int]:
        """Phase and step: what ranks that wait for each other have in common."""
        return self.phase, self.step


class Watchdog:
    """Watches this rank while the block lasts; nothing is watched in phases whose limit is 0.

    Time in which this process was stopped, by Ctrl-Z say, does not count.
    """

    def __init__(self, config: RunConfig, rank: int, world_size: int) -> None:
        step, other = config.step_timeout_minutes * 60, config.timeout_minutes * 60
        self._limits = {"training": step, "evaluating": step, VERIFYING: 0.0}
        self._other_limit = other
        self._interval = min((limit / 8 for limit in (step, other) if limit), default=math.inf)
        self._interval = min(self._interval, _LONGEST_INTERVAL)
        self._rank, self._world_size = rank, world_size
        self._folder = RunFolder(Path(config.directory)).stacks
        self._store = _own_connection(world_size)
        self._store.set_timeout(datetime.timedelta(seconds=4 * self._interval))
        self._count = 0
        self._over, self._alarmed = threading.Event(), threading.Event()

    def __enter__(self) -> Watchdog:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = (self._folder / f"rank-{self._rank:05d}.txt").open("a", encoding="utf-8")
        if self._world_size > 1:
            faulthandler.enable(self._file)
        self._tell_once()
        for target in (self._tell, self._watch):
            threading.Thread(target=target, name=f"watchdog{target.__name__}", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        if self._world_size > 1:
            faulthandler.enable(sys.__stderr__ or 2)
        self._file.close()
        with contextlib.suppress(OSError):
            if Path(self._file.name).stat().st_size == 0:
                os.unlink(self._file.name)
            self._folder.rmdir()  # unless another rank has a file there

    def _tell(self) -> None:
        """Tell the others again and again, and hear whether one of them has raised the alarm."""
        while not self._over.wait(self._interval):
            with contextlib.suppress(RuntimeError):  # the store is gone: whoever waits for this run will find out
                self._tell_once()
                if self._store.check([_ALARM]):
                    self._alarmed.set()

    def _tell_once(self) -> None:
        self._count += 1
        place = (self._rank, socket.gethostname(), os.getpid(), self._count)
        beat = Beat(*place, PULSE.phase, PULSE.step, where_is_main_thread())
        self._store.set(f"beat/{self._rank}", json.dumps(beat))

    def _watch(self) -> None:
        """Wait for an alarm, or for too long a time without progress; then end this process."""
        seen, waited = PULSE.progress, 0.0
        while not self._alarmed.is_set():
            if self._over.wait(self._interval):
                return
            # Intervals are counted, not the clock's seconds: there are none while this process is stopped.
            waited += self._interval
            if PULSE.progress != seen:
                seen, waited = PULSE.progress, 0.0
            limit = self._limits.get(PULSE.phase, self._other_limit)
            if limit and waited >= limit:
                self._raise_alarm(limit)
        try:
            self._end()
        finally:
            outcome.end_at_once()

    def _raise_alarm(self, limit: float) -> None:
        """The first rank to come here finds out who is missing and says so; the others get its verdict."""
        first = _in_time(lambda: self._store.add(_ALARM, 1) == 1, 4 * self._interval)
        if first is not False:
            beats = _in_time(self._observe, 8 * self._interval) if first else None
            missing = _find_missing(beats) if beats else ([], "the store of the process groups does not answer")
            error = TrainingError(
                f"no progress in {limit:g} seconds of {PULSE.phase} at step {PULSE.step}: {missing[1]}; Python stacks "
                f"are in {self._folder}, and the same command continues from the last checkpoint"
            )
            _in_time(lambda: outcome.record_fatal(error), _SECONDS_TO_WRITE)
            silent = json.dumps(missing[0])
            _in_time(lambda: self._store.set(_VERDICT, silent), 4 * self._interval)
        self._alarmed.set()

    def _observe(self) -> tuple[list[Beat], list[Beat]]:
        """The last beats of all ranks, and again after a time in which each tells once more."""

        def look() -> list[Beat]:
            return [Beat(*json.loads(self._store.get(f"beat/{rank}"))) for rank in range(self._world_size)]

        before = look()
        time.sleep(3 * self._interval)
        return before, look()

    def _end(self) -> None:
        """Write this rank's stacks, have silent siblings write theirs and die, and end."""
        _in_time(self._write_stacks, _SECONDS_TO_WRITE)

        def verdict() -> list[list]:
            while not self._store.check([_VERDICT]):  # to wait for it would keep this rank from telling
                time.sleep(self._interval / 2)
            return json.loads(self._store.get(_VERDICT))

        for beat in _in_time(verdict, 14 * self._interval) or []:
            _abort(Beat(*beat))
        time.sleep(min(self._interval, 1.0))  # all have the verdict before the store may go

    def _write_stacks(self) -> None:
        print(f"rank {self._rank}, {PULSE.phase}, step {PULSE.step}, {time.ctime()}", file=self._file, flush=True)
        faulthandler.dump_traceback(self._file)
        with contextlib.suppress(OSError, RuntimeError, AttributeError):  # torch may have no such function
            (self._folder / f"collectives-{self._rank:05d}.json").write_bytes(last_collectives())


def _own_connection(world_size: int) -> dist.Store:
    """The store of the process groups: another connection, since one that waits for a key lets nobody else ask."""
    if world_size == 1:
        return dist.HashStore()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun may keep the store of the one before
    store: Any = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore(f"watchdog/{attempt}", store.clone())


def _in_time(ask: Callable[[], T], seconds: float) -> T | None:
    """What ``ask`` gives; None where it fails, or takes longer, as with a machine that has left the network."""
    answer: list[T] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            answer.append(ask())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None


def _find_missing(observed: tuple[Iterable[Beat], list[Beat]]) -> tuple[list[Beat], str]:
    """The ranks that do not even tell, and a sentence about those that the others wait for."""
    before = {beat.rank: beat.told for beat in observed[0]}
    beats = observed[1]
    silent = [beat for beat in beats if beat.told == before.get(beat.rank)]
    if silent:
        return silent, f"{_several(silent)} does not answer, last heard of at {silent[0].phase}, step {silent[0].step}"
    # All tell, so the minority is what the majority waits for: elsewhere in the run, or elsewhere in the code.
    for part in (lambda beat: beat.doing, lambda beat: beat.where):
        (usual, count), *others = Counter(map(part, beats)).most_common()
        if others:
            odd = [beat for beat in beats if part(beat) != usual]
            one, other = odd[0], next(beat for beat in beats if part(beat) == usual)
            return [], (
                f"{_several(odd)} is at {one.phase}, step {one.step}, in {one.where}, while {count} of {len(beats)} "
                f"are at {other.phase}, step {other.step}, in {other.where}"
            )
    return [], f"all ranks are in {beats[0].where}" if len(beats) > 1 else f"it is in {beats[0].where}"


def _several(beats: list[Beat]) -> str:
    return str(beats[0]) + (f" (and {len(beats) - 1} more)" if len(beats) > 1 else "")


def _abort(beat: Beat) -> None:
    """Have a process of this machine write its stacks and die, if it has the same parent as this one."""
    with contextlib.suppress(psutil.Error, OSError):
        # A host name and a number may mean another process, in a container beside this one.
        if beat.host == socket.gethostname() and psutil.Process(beat.process).ppid() == os.getppid():
            os.kill(beat.process, signal.SIGABRT)
            os.kill(beat.process, signal.SIGCONT)  # one that is stopped gets the other only now


def where_is_main_thread() -> str:
    """The innermost line of this package that the main thread is in, such as ``training/step.py:44 train_step``."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    root = str(Path(megatron_dlm.__file__).parent) + os.sep
    while frame is not None and not frame.f_code.co_filename.startswith(root):
        frame = frame.f_back
    if frame is None:
        return "other code"
    return f"{frame.f_code.co_filename.removeprefix(root)}:{frame.f_lineno} {frame.f_code.co_name}"


def last_collectives() -> bytes:
    """What torch's flight recorder has of this rank's last collectives (JSON)."""
    bindings: Any = torch._C._distributed_c10d
    dump = bindings._dump_nccl_trace_json if torch.cuda.is_available() else bindings._dump_fr_trace_json
    return dump()
