"""One training step, the optimizer, checkpoints, metrics, and the loop."""

import megatron_dlm.parallel  # noqa: F401  (prepares the machine before megatron is imported)
