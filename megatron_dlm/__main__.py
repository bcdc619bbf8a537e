"""`python -m megatron_dlm`, which is how torchrun starts the same command line."""

from __future__ import annotations

import sys

from megatron_dlm.cli import main

if __name__ == "__main__":  # workers that save checkpoints import this module again
    sys.exit(main())
