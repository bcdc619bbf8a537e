"""A folder that is complete or not there: written beside under a hidden name, then renamed into place."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_dlm.errors import ConfigError
from megatron_dlm.files import flush


def check_output(output: Path, *, overwrite: bool, replaceable: Callable[[str], bool], size: int) -> None:
    """Find what would keep ``output`` from being written, without changing anything.

    Args:
        output: the folder to be; its parents need not exist.
        overwrite: it may be replaced.
        replaceable: whether a file of this name may be replaced; a folder with any other is the user's.
        size: bytes that will be written.

    Raises:
        ConfigError: one line.
    """
    target = output.resolve()
    if os.path.lexists(target) and not target.is_dir():
        raise ConfigError(f"{output} is a file; choose another --output")
    if os.path.ismount(target):
        raise ConfigError(f"{output} is a mount point, which cannot be replaced; choose a folder in it as --output")
    partial, old = _beside(target)
    if target.is_dir() and (names := sorted(os.listdir(target))):
        if not overwrite:
            raise ConfigError(f"{output} is not empty; use --overwrite or choose another --output")
        if foreign := [name for name in names if not replaceable(name)]:
            raise ConfigError(
                f"{output} has {foreign[0]} in it, which is not what would be replaced; choose another --output"
            )
    if os.path.lexists(old):
        raise ConfigError(f"{old} is what {output} was when its replacement was killed; move it back or remove it")
    if os.path.lexists(partial) and not overwrite:
        raise ConfigError(
            f"{partial} is left from a command that was killed, or one is running; wait or use --overwrite"
        )
    above = next(path for path in target.parents if os.path.lexists(path))
    if not above.is_dir():
        raise ConfigError(f"{above} is a file, so {output} cannot be made; choose another --output")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{above} cannot be written to; allow it or choose another --output")
    if (free := shutil.disk_usage(above).free) < size:
        raise ConfigError(
            f"{output} needs {size:,} bytes and its disk has {free:,}; make room or choose another --output"
        )


@contextlib.contextmanager
def complete_folder(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A hidden, empty folder that becomes ``output`` when the block ends, flushed to the disk.

    After an error or an interrupt in the block nothing is left of it, and what was at ``output`` is still there.

    Args:
        output: which ``check_output`` has accepted.
        overwrite: as there.

    Raises:
        OSError: it cannot be written.
    """
    target = output.resolve()
    partial, old = _beside(target)
    made = [path for path in target.parents if not path.exists()]
    begun = False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if overwrite and os.path.lexists(partial):
            shutil.rmtree(partial)
        partial.mkdir()
        begun = True
        yield partial
        for path in (*partial.rglob("*"), partial):
            flush(path)
        _replace(partial, target, old)
        flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if begun:
            shutil.rmtree(partial, ignore_errors=True)
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()
        raise


def _beside(target: Path) -> tuple[Path, Path]:
    """Where ``target`` is written, and where what it replaces is kept meanwhile."""
    return target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")


def _replace(partial: Path, target: Path, old: Path) -> None:
    """``partial`` in the place of ``target``, which may be there; if that fails, as before."""
    try:
        if target.is_dir():
            os.rename(target, old)
        os.rename(partial, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
