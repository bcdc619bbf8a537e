"""The heaviest step that a run can meet, before the first real one: its errors come now and not after hours."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm.config.tree import Config
from megatron_dlm.errors import ConfigError
from megatron_dlm.model.pipeline import MicroBatch, run_pipeline
from megatron_dlm.training.progress import Progress
from megatron_dlm.training.state import Training
from megatron_dlm.training.step import accumulate_gradients

# What allocators say besides torch.OutOfMemoryError: torch's on a CPU, and CUDA libraries such as NCCL and cuBLAS.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


def dry_batch(training: Training, progress: Progress) -> str:
    """Run forward and backward of the step behind ``progress`` and one evaluation on the heaviest input; collective.

    Every token is masked, so that the head computes all rows; the sequences are full, the micro-batches real, and as
    many as keep the pipeline filled. Nothing remains: the gradients are cleared and no update is made, and dropout is
    seeded anew in every step.

    Returns:
        A line for the banner: the time it took, and the memory of the rank that used most.

    Raises:
        ConfigError: the memory does not suffice; one line with the settings that need less.
    """
    started = time.perf_counter()
    with refusing_out_of_memory(lambda: _advice(training.config)):
        moments = _missing_moments(training)
        _train(training, progress)
        training.optimizer.zero_grad()
        if training.valid_stream is not None:
            _evaluate(training)
        del moments
    peak = torch.tensor([_peak_gib()], dtype=torch.float64, device=training.topology.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    if training.topology.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the log line shows what training itself takes
    return f"dry batch  ok in {time.perf_counter() - started:.1f} s | peak {float(peak):.1f} GiB"


@contextlib.contextmanager
def refusing_out_of_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Make a ``ConfigError`` with this ``advice`` of an allocation in the block that fails."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(advice()) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(phrase in str(error).lower() for phrase in _OUT_OF_MEMORY)


def microbatches_that_fill(pipeline_size: int, virtual_size: int, num_microbatches: int) -> int:
    """The fewest micro-batches of a step's ``num_microbatches`` with which every stage holds as many as it ever does.

    The first stage holds one for each stage below it. Interleaved it runs ahead by up to PP - 1 more of its chunks,
    which takes a second round; the result is then a multiple of PP, as the schedule needs.
    """
    return min(num_microbatches, pipeline_size * (1 if virtual_size == 1 else 2))


def _train(training: Training, progress: Progress) -> None:
    topology, stream = training.topology, training.train_stream
    count = microbatches_that_fill(topology.pipeline_size, topology.virtual_size, stream.num_microbatches)

    def batches(reads_tokens: bool) -> Iterator[MicroBatch]:
        micro_batches = islice(stream.training(progress, reads_tokens=reads_tokens), count)
        return (_heaviest(m, training.tokenizer.mask_token_id) for m in micro_batches)

    accumulate_gradients(training, batches, step=progress.step, num_microbatches=count)


@torch.no_grad()
def _evaluate(training: Training) -> None:
    stream, sequences = training.valid_stream, training.valid_sequences
    assert stream is not None
    count = training.topology.pipeline_size if training.topology.virtual_size > 1 else 1

    def batches(reads_tokens: bool) -> Iterator[MicroBatch]:
        micro_batches = islice(stream.validation(sequences, reads_tokens=reads_tokens), count)
        return (_heaviest(m, training.tokenizer.mask_token_id) for m in micro_batches)

    for chunk in training.chunks:
        chunk.eval()
    run_pipeline(
        training.chunks,
        batches,
        lambda micro_batch, losses: losses.cross_entropy,
        num_microbatches=count,
        seq_length=stream.dataset.sequence_length,
        micro_batch_size=stream.micro_batch_size,
        forward_only=True,
    )


def _heaviest(micro_batch: MicroBatch, mask_token_id: int) -> MicroBatch:
    """The micro-batch with full sequences in which everything is masked and scored."""
    batch = micro_batch.batch
    if batch is None or batch.rows is None:  # a stage without tokens; the autoregressive objective, which scores all
        return micro_batch._replace(lengths=None)
    size, seq = batch.inputs.shape
    rows = torch.arange(size * seq, device=batch.inputs.device)
    inputs = torch.full_like(batch.inputs, mask_token_id)
    everything = replace(
        batch,
        inputs=inputs,
        rows=rows,
        targets=torch.zeros_like(rows),
        weights=torch.ones(size * seq, dtype=batch.weights.dtype, device=rows.device),
        sample_index=rows // seq,
        num_eligible=size * seq,
        divisor=torch.full_like(batch.divisor, size * seq),
        lengths=None,
    )
    return micro_batch._replace(inputs=inputs, lengths=None, batch=everything)


def _missing_moments(training: Training) -> list[Tensor]:
    """As much memory as Adam's two moments will take where they are made in the first step (not by torch's Adam)."""
    return [
        torch.empty_like(parameter)
        for part in training.optimizer.parts
        for group in part.optimizer.param_groups
        for parameter in group["params"]
        if parameter not in part.optimizer.state
        for _ in range(2)
    ]


def _peak_gib() -> float:
    """GiB of this rank's GPU that tensors have taken at most; of its resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def _advice(config: Config) -> str:
    """One line: the cause, and the settings that would need less memory."""
    train, parallel = config.train, config.parallel
    fixes = [
        f"lower train.micro_batch_size (now {train.micro_batch_size})" if train.micro_batch_size > 1 else "",
        "set train.recompute to full" if train.recompute == "none" else "",
        f"raise parallel.tensor_model_parallel_size (now {parallel.tensor_model_parallel_size}) or "
        f"parallel.pipeline_model_parallel_size (now {parallel.pipeline_model_parallel_size})",
    ]
    return (
        f"out of memory in the dry batch before the first step ({train.micro_batch_size} x "
        f"{config.data.sequence_length} tokens per process, all of them scored): {', or '.join(filter(None, fixes))}"
    )
