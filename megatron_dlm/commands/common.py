"""What commands that run a model have in common: which model, and at which layout."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_dlm import launch
from megatron_dlm.config.tree import ParallelConfig
from megatron_dlm.errors import ConfigError

if TYPE_CHECKING:
    from megatron_dlm.generation.text_model import TextModel


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The option that names the model."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run directory, one of its checkpoints, or a Hugging Face directory that `megatron-dlm export` wrote",
    )


def add_layout(parser: argparse.ArgumentParser) -> None:
    """The options of the layout."""
    layout = parser.add_argument_group("layout of a checkpoint's model, under torchrun with as many processes, or more")
    layout.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N", help="(%(default)s)")
    layout.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N", help="(%(default)s)")


def layout_of(args: argparse.Namespace) -> ParallelConfig:
    """The layout that is asked for. Raises ``ConfigError`` where the processes or the model do not allow it."""
    layout = ParallelConfig(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
    )
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if getattr(layout, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(layout, name)}; it must be at least 1")
    several = launch.started_by_torchrun() and int(os.environ["WORLD_SIZE"]) > 1
    if layout.model_parallel_size > 1 and not several:
        raise ConfigError(
            f"this layout needs {layout.model_parallel_size} processes: torchrun --nproc-per-node "
            f"{layout.model_parallel_size} -m megatron_dlm {args.command} ..."
        )
    from megatron_dlm.checkpoint.stored import is_checkpoint

    if several and not is_checkpoint(args.checkpoint):
        raise ConfigError(
            f"{args.checkpoint} is no checkpoint, and only those run on several processes; leave out torchrun"
        )
    return layout


@contextmanager
def opened(path: str, layout: ParallelConfig) -> Iterator[TextModel]:
    """The model at ``path``; its process groups end with the block. Raises as ``open_text_model``."""
    import torch.distributed

    from megatron_dlm.generation.text_model import open_text_model

    try:
        yield open_text_model(path, layout)
    finally:
        if torch.distributed.is_initialized():
            from megatron_dlm.parallel.topology import shutdown

            shutdown()
