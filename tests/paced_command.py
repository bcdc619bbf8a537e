"""The command line, whose training takes only as many steps as a test allows: ``python -m tests.paced_command ...``.

The environment variable ``PACE`` names a file with that number of steps; each rank waits before the step after it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from megatron_dlm.cli import main
from megatron_dlm.training import trainer


def paced(*arguments: Any, step: int, **options: Any) -> Any:
    """``train_step``, once it may take the step from ``step`` to ``step + 1``."""
    while step >= int(Path(os.environ["PACE"]).read_text()):
        time.sleep(0.01)
    return train_step(*arguments, step=step, **options)


if __name__ == "__main__":
    train_step = trainer.train_step
    trainer.train_step = paced
    sys.exit(main(sys.argv[1:]))
