"""The command line, whose training takes only as many steps as a test allows: ``python -m tests.paced_command ...``.

The environment variable ``PACE`` names a file with that number of steps, or a folder with one for each run, by the
name of the run's own; each rank waits before the step after it. The arms of a crossover are this command too.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from megatron_dlm.cli import main
from megatron_dlm.crossover import arms
from megatron_dlm.training import trainer
from megatron_dlm.training.state import Progress, Training
from megatron_dlm.training.step import StepReport, train_step


def paced(training: Training, progress: Progress, **options: Any) -> StepReport:
    """``train_step``, once it may take the step behind ``progress``."""
    pace = Path(os.environ["PACE"])
    pace = pace / Path(training.config.run.directory).name if pace.is_dir() else pace
    while progress.step >= int(pace.read_text()):
        time.sleep(0.01)
    return train_step(training, progress, **options)


if __name__ == "__main__":
    trainer.train_step = paced
    arms.COMMAND = (sys.executable, "-m", "tests.paced_command")
    sys.exit(main(sys.argv[1:]))
