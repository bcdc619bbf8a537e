"""Checkpoints as files: where they are, what they say, their tensors one at a time. No megatron, no process groups."""
