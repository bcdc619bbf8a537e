"""What commands have in common: which model, at which layout, and what is said to whom."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_dlm.config.tree import ModelConfig, ParallelConfig
from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.launch import place

if TYPE_CHECKING:
    from megatron_dlm.generation.text_model import TextModel

_TOKENS_PER_BATCH_ON_CPU = 4096


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


def add_tokens_per_batch(parser: argparse._ActionsContainer) -> None:
    """The option that bounds the memory of a forward."""
    parser.add_argument(
        "--tokens-per-batch",
        type=int,
        metavar="N",
        help="of one forward; less needs less memory (16384 on a GPU, 4096 without, where larger ones are slower)",
    )


def tokens_per_batch(args: argparse.Namespace) -> int:
    """What is given, or what suits this machine."""
    import torch

    from megatron_dlm.evaluation.likelihood_masks import TOKENS_PER_BATCH

    if args.tokens_per_batch is not None:
        return args.tokens_per_batch
    return TOKENS_PER_BATCH if torch.cuda.is_available() else _TOKENS_PER_BATCH_ON_CPU


def layout_of(args: argparse.Namespace) -> ParallelConfig:
    """The layout that is asked for. Raises ``ConfigError`` where the processes or the model do not allow it."""
    layout = ParallelConfig(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
    )
    check_at_least(args, tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    several = place.adopt() and int(os.environ["WORLD_SIZE"]) > 1
    if layout.model_parallel_size > 1 and not several:
        raise ConfigError(
            f"this layout needs {layout.model_parallel_size} processes: torchrun --nproc-per-node "
            f"{layout.model_parallel_size} -m megatron_dlm {args.command} ..."
        )
    from megatron_dlm.checkpoint.stored import is_checkpoint

    for path in [args.checkpoint] if isinstance(args.checkpoint, str) else args.checkpoint:
        if several and not is_checkpoint(path):
            raise ConfigError(f"{path} is no checkpoint, and only those run on several processes; leave out torchrun")
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


class ModelShape(NamedTuple):
    """A model and its vocabulary, without its weights."""

    model: ModelConfig
    vocab_size: int
    head_columns: int
    """The vocabulary, padded where the model pads it."""
    last_layer_rows: bool
    """Whether its last layer leaves out what the head does not read (an export's does not)."""


def model_shape(path: str, vocab_size: int | None) -> ModelShape:
    """The model at ``path``, with its own vocabulary where none is given; weights are not read.

    Args:
        path: a training configuration, a run, a checkpoint, or a Hugging Face directory.
        vocab_size: ids; None: those of the tokenizer, or of the checkpoint.

    Raises:
        ConfigError: there is no model, or its vocabulary is not known.
        DataError: a file of it cannot be read.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        from megatron_dlm.hf.source_config import read_source_config

        source = read_source_config(folder)
        rows = vocab_size or source.rows
        return ModelShape(source.model, rows, rows, last_layer_rows=False)
    if folder.is_dir():
        from megatron_dlm.checkpoint.stored import open_checkpoint

        stored = open_checkpoint(folder)
        config, vocab_size = stored.config, vocab_size or int(stored.info["vocab_size"])
    else:
        from megatron_dlm.config.load import load_config

        config = load_config(["--config", path])
        vocab_size = vocab_size or tokenizer_size(path, config.data.tokenizer)
    model = config.model
    return ModelShape(model, vocab_size, model.padded_vocab_size(vocab_size), config.last_layer_rows)


def tokenizer_size(path: str, tokenizer: str) -> int:
    """Ids of the tokenizer that the configuration at ``path`` names. Raises ``ConfigError``."""
    from megatron_dlm.data.tokenizer import load_tokenizer

    try:
        return load_tokenizer(tokenizer).vocab_size
    except DataError as error:
        raise ConfigError(f"the vocabulary of {path} is not known, give --vocab-size; its tokenizer: {error}") from None


@contextmanager
def refusing() -> Iterator[None]:
    """Make a ``ConfigError`` of the library's ``ValueError``: what the options contradict, or a model cannot do."""
    try:
        yield
    except (ConfigError, DataError):
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_at_least(args: argparse.Namespace, **least: int) -> None:
    """Refuse options that are given and below these numbers. Raises ``ConfigError``."""
    for name, number in least.items():
        if (value := getattr(args, name)) is not None and value < number:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least {number}")


def say(line: str) -> None:
    """Write a line to stderr, where what is no result goes, so that a pipe gets the results alone."""
    print(line, file=sys.stderr, flush=True)
