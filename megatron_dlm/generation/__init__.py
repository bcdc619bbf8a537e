"""Text from any model of ours: a checkpoint at any layout, an export, masked diffusion or autoregressive."""
