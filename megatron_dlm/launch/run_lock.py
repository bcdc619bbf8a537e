"""One run in a directory at a time: two would destroy each other's checkpoints."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from megatron_dlm.config.tree import Config
from megatron_dlm.errors import ConfigError, TrainingError
from megatron_dlm.launch import outcome
from megatron_dlm.run_folder import RunFolder

_BEAT = 10.0
"""Seconds between two signs of life of a run whose file system has no locks."""
_DEAD = 60.0
"""Seconds without one after which the run is taken for dead, by the file system's clock."""


@contextlib.contextmanager
def directory_in_use(config: Config) -> Iterator[int]:
    """Make the run's directory and lock it.

    An old status.json is removed, because it would be taken for this run's. Yields the lock's file descriptor: the lock
    lasts as long as any process that has inherited it, as forked workers do. On a file system without locks, a file
    with this host and process takes its place, for as long as this process shows that it lives. Raises ``ConfigError``
    if the directory is in use or cannot be written.
    """
    folder = RunFolder(Path(config.run.directory))
    with contextlib.ExitStack() as held:
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            held.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _in_use(folder, _owner(folder)) from None
            except OSError:  # a file system without locks
                held.enter_context(_owned(folder))
        except OSError as error:
            raise ConfigError(
                f"cannot write run.directory {str(folder.path)!r}: {error.strerror}; choose another"
            ) from None
        folder.status_file.unlink(missing_ok=True)
        yield lock


@contextlib.contextmanager
def _owned(folder: RunFolder) -> Iterator[None]:
    """Own the directory by a file that is made once and touched again and again. Raises ``ConfigError``."""
    owner = {"host": socket.gethostname(), "process": os.getpid(), "started": psutil.Process().create_time()}
    try:
        _claim(folder, owner)
    except FileExistsError:
        before = _owner(folder)
        if _lives(folder, before):
            raise _in_use(folder, before) from None
        _remove_dead(folder, before)
        with contextlib.suppress(FileExistsError):  # of another that has found it dead: seen below
            _claim(folder, owner)
    if _owner(folder) != owner:
        raise _in_use(folder, _owner(folder))
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT):
            if (now := _owner(folder)) and now != owner:  # this machine was stopped, and was taken for dead
                outcome.record_fatal(TrainingError(str(_in_use(folder, now))))
                outcome.end_at_once()
            with contextlib.suppress(OSError):
                os.utime(folder.owner)

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if _owner(folder) == owner:
            folder.owner.unlink(missing_ok=True)


def _claim(folder: RunFolder, owner: dict[str, Any]) -> None:
    """Make the owner's file. Raises ``FileExistsError`` where there is one."""
    with folder.owner.open("x", encoding="utf-8") as file:
        json.dump(owner, file)


def _remove_dead(folder: RunFolder, dead: dict[str, Any]) -> None:
    """Take the file of a dead run away, unless it is by now another's, who has found it dead first."""
    aside = folder.owner.with_name(f"{folder.owner.name}.{socket.gethostname()}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder.owner, aside)
        if _read_owner(aside) != dead:
            os.rename(aside, folder.owner)
        aside.unlink(missing_ok=True)


def _owner(folder: RunFolder) -> dict[str, Any]:
    """Host and process of the run that owns the directory, as far as is known."""
    return _read_owner(folder.owner)


def _read_owner(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lives(folder: RunFolder, owner: dict[str, Any]) -> bool:
    if owner.get("host") == socket.gethostname() and isinstance(owner.get("process"), int):
        try:
            return psutil.Process(owner["process"]).create_time() == owner.get("started")
        except psutil.Error:  # it is gone; and the number may be another's by now, in a container that was restarted
            return False
    now = folder.owner.with_name(f"{folder.owner.name}.now.{os.getpid()}")
    try:
        now.touch()  # the file system's own clock: this machine's may differ from that of the owner
        return now.stat().st_mtime - folder.owner.stat().st_mtime < _DEAD
    except FileNotFoundError:
        return False
    finally:
        now.unlink(missing_ok=True)


def _in_use(folder: RunFolder, owner: dict[str, Any]) -> ConfigError:
    who = f" (process {owner['process']} on {owner['host']})" if {"process", "host"} <= owner.keys() else ""
    where = f"run.directory {str(folder.path)!r}"
    return ConfigError(f"another run{who} is using {where}; wait for its end or choose another")
