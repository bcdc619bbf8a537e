"""Checkpoints as files, and a model's weights in them at any layout."""
