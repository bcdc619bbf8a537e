"""The environment variables with which torchrun tells a process its place."""

from __future__ import annotations

import os

from megatron_dlm.errors import ConfigError


def require_place() -> None:
    """Raise ``ConfigError`` where torchrun's variables are no place among its processes: somebody else has set them."""
    size = _variable("WORLD_SIZE", 1, 2**31 - 1)
    local_size = _variable("LOCAL_WORLD_SIZE", 1, size) if "LOCAL_WORLD_SIZE" in os.environ else size
    _variable("RANK", 0, size - 1)
    _variable("LOCAL_RANK", 0, local_size - 1)
    _variable("MASTER_PORT", 0, 65535)


def has_rank() -> bool:
    """Whether RANK and WORLD_SIZE are those of one of several processes."""
    try:
        _variable("RANK", 0, _variable("WORLD_SIZE", 1, 2**31 - 1) - 1)
    except ConfigError:
        return False
    return True


def _variable(name: str, low: int, high: int) -> int:
    text = os.environ.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high):
        raise ConfigError(
            f"the environment variable {name} is {text!r}; it must be from {low} to {high}: start with torchrun, or "
            "unset WORLD_SIZE"
        )
    return int(text)
