"""Megatron-style training of masked diffusion (and paired autoregressive) language models."""

__version__ = "0.1.0"
