"""Kernels of masked diffusion training and their plain-torch specification (see `dlm_kernels.reference`)."""
