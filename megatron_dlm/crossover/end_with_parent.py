"""Become a command that is asked to stop when the process that started it dies, even if that was killed.

    python -m megatron_dlm.crossover.end_with_parent PARENT_PID PROGRAM [ARGUMENT ...]

The request is a flag of the process (PR_SET_PDEATHSIG of Linux), which the program that takes its place keeps. It is
set here and not by ``preexec_fn`` of ``subprocess.Popen``: no Python code should run in the fork of a process that has
threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from megatron_dlm.run_folder import STOPPED

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Replace this process by the command, or end it where the parent has died before the flag was set."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(STOPPED)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
