"""One way through megatron's pipeline schedules, for training, evaluation and generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from megatron_dlm.diffusion.objective import Batch
from megatron_dlm.model.transformer import DiffusionTransformer, TokenLosses
from megatron_dlm.parallel.pulse import PULSE

Chunk: TypeAlias = "DistributedDataParallel | DiffusionTransformer"


class MicroBatch(NamedTuple):
    """One micro-batch as a pipeline stage needs it."""

    sample_ids: np.ndarray
    """[micro_batch] int64; -1 where a place only fills up the last micro-batch."""
    inputs: Tensor | None
    """[micro_batch, seq] int64 model inputs (xt); None on the middle stages, which read no tokens."""
    lengths: Tensor | None
    """[micro_batch] int64 on the CPU; None where every row is full."""
    batch: Batch | None = None
    """Targets and weights, where a loss is wanted; None on the middle stages, and for logits."""
    rows: Tensor | None = None
    """[n] int64, flat indices into [micro_batch * seq] of the positions whose logits are wanted; None: of all."""


def run_pipeline(
    chunks: list[Any],
    batches: Callable[[bool], Iterator[MicroBatch]],
    output: Callable[..., Any],
    *,
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool = False,
) -> list[Any]:
    """Run the micro-batches through megatron's schedule for the layout; collective.

    Args:
        chunks: this rank's chunks, wrapped or bare.
        batches: ``batches(reads_tokens)`` iterates over this rank's micro-batches; called once a chunk.
        output: ``output(micro_batch, model_output)`` on the last stage gives (loss sum, number of tokens,
            report) for training, or with ``forward_only`` anything at all.

    Returns:
        The reports (or the outputs), one per micro-batch, on the last stage; an empty list elsewhere.
    """
    # Under interleaving every chunk goes through the micro-batches by itself, so each has an iterator of its own.
    iterators = [batches(_reads_tokens(chunk)) for chunk in chunks]

    def forward_step(iterator: Iterator[MicroBatch], model: Chunk) -> tuple[Any, Callable[..., Any]]:
        PULSE.beat()
        micro_batch = next(iterator)
        model_output = model(micro_batch.inputs, micro_batch.lengths, micro_batch.batch, micro_batch.rows)
        if isinstance(model_output, TokenLosses):  # the schedule wants a tensor; the rest goes to our function
            return model_output.loss_sum, partial(_call, output, micro_batch, model_output)
        return model_output, partial(_call, output, micro_batch)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _call(output: Callable[..., Any], micro_batch: MicroBatch, *outputs: Any, non_loss_data: bool = False) -> Any:
    """Adapt ``output(micro_batch, model_output)`` to the schedule, which appends its own tensor to the arguments."""
    return output(micro_batch, outputs[0])


def _reads_tokens(chunk: Chunk) -> bool:
    bare = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
    return bare.pre_process or bare.post_process
