"""Become a command that is asked to stop when the process that started it dies, even if that was killed.

    python -m megatron_dlm.crossover.end_with_parent PARENT_PID PROGRAM [ARGUMENT ...]

It is asked for here and not by ``preexec_fn`` of ``subprocess.Popen``: no Python code should run in the fork of a
process that has threads.
"""

from __future__ import annotations

import os
import signal
import sys

from megatron_dlm.launch.stop_signal import stop_with_parent
from megatron_dlm.run_folder import STOPPED


def main() -> None:
    """Replace this process by the command, or end it where the parent has died before the flag was set."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))  # until the command takes over, with its own
    stop_with_parent(parent)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
