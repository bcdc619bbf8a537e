"""What torchrun does after a stop: it takes exit code 75 for a failure, may start the workers again, and waits
for them only so long.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import psutil

from megatron_dlm.config.tree import Config
from megatron_dlm.run_folder import RunFolder

_DEFAULT_SECONDS = 30.0


def is_unwanted(config: Config, *, first: bool) -> bool:
    """Whether torchrun has started this process again although a signal had stopped its run.

    Args:
        first: this process removes the marker of an earlier start of torchrun, and says why it ends.
    """
    marker = RunFolder(Path(config.run.directory)).stop_marker
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        if first:
            marker.unlink(missing_ok=True)
        return False
    try:
        unwanted = marker.read_text(encoding="utf-8") == _start()
    except OSError:
        return False
    if unwanted and first:
        print("megatron-dlm: stopped by a signal, so it is not started again by torchrun", file=sys.stderr, flush=True)
    return unwanted


def refuse(config: Config) -> None:
    """Have the workers that torchrun starts after this end at once. Without torchrun nothing happens.

    For a stop by a warning, which torchrun knows nothing of: a SIGTERM comes from torchrun itself, which then ends, or
    has lost another worker and is to start all of them again.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(OSError):
            RunFolder(Path(config.run.directory)).stop_marker.write_text(_start(), encoding="utf-8")


def _start() -> str:
    """Names this start of torchrun."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.environ.get('TORCHELASTIC_MAX_RESTARTS')}"


def warn_of_slow_save(seconds: float) -> str | None:
    """A line of the banner where torchrun would kill the workers during a save that takes ``seconds``."""
    limit = _seconds_to_stop()
    if limit is None or seconds < limit:
        return None
    return (
        f"warning    a save took {seconds:.0f} s, and torchrun kills what still runs {limit:g} s after a stop signal; "
        f"give it --shutdown-timeout {2 * seconds:.0f} (torch 2.13), or send the workers SIGUSR1 earlier"
    )


def _seconds_to_stop() -> float | None:
    """How long torchrun lets workers run after a stop signal; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    text = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")
    with contextlib.suppress(psutil.Error):
        for argument, following in _pairs(psutil.Process(os.getppid()).cmdline()):
            name, equals, value = argument.replace("_", "-").partition("=")
            if name == "--shutdown-timeout":
                text = value if equals else following
    try:
        return float(text)
    except ValueError:
        return _DEFAULT_SECONDS


def _pairs(arguments: list[str]) -> list[tuple[str, str]]:
    return list(zip(arguments, [*arguments[1:], ""], strict=True))
