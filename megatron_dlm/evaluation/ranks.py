"""What the first rank alone does, for all ranks of a model's layout."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.generation.text_model import TextModel

T = TypeVar("T")


def is_first_rank() -> bool:
    """Whether this process prints and writes; known before there are process groups."""
    return os.environ.get("RANK", "0") == "0"


def on_first_rank(model: TextModel, function: Callable[[], T]) -> T:
    """What ``function`` gives on rank 0, on every rank; collective. Its ``ConfigError`` and ``DataError`` are raised
    on every rank."""
    if model.topology is None or model.topology.world_size == 1:
        return function()
    box: list[Any] = [None]
    if model.topology.rank == 0:
        try:
            box = [(function(), None)]
        except (ConfigError, DataError) as error:
            box = [(None, error)]
    dist.broadcast_object_list(box, src=0)
    value, fault = box[0]
    if fault is not None:
        raise fault
    return value
