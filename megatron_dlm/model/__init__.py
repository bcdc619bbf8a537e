"""The denoiser: a transformer on megatron-core's building blocks, bidirectional or causal."""

import megatron_dlm.parallel  # noqa: F401  (prepares the machine before megatron is imported)
