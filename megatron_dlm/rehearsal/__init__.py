"""A training step of any rank of any layout in one process, with no GPU and no memory; and what it will cost."""

import megatron_dlm.parallel  # noqa: F401  (prepares the machine before megatron is imported)
