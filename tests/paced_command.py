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
from megatron_dlm.training.state import Progress, Training
from megatron_dlm.training.step import StepReport, train_step


def paced(training: Training, progress: Progress, **options: Any) -> StepReport:
    """``train_step``, once it may take the step behind ``progress``."""
    while progress.step >= int(Path(os.environ["PACE"]).read_text()):
        time.sleep(0.01)
    return train_step(training, progress, **options)


if __name__ == "__main__":
    trainer.train_step = paced
    sys.exit(main(sys.argv[1:]))
