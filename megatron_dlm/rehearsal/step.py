"""A training step of one rank, written down: the heaviest for its memory, an ordinary one for its work."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple, cast
from unittest import mock

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_dlm.config.tree import Config
from megatron_dlm.diffusion.objective import Batch
from megatron_dlm.model.pipeline import MicroBatch
from megatron_dlm.model.transformer import build_model
from megatron_dlm.parallel.topology import Topology
from megatron_dlm.rehearsal.ledger import Ledger
from megatron_dlm.rehearsal.one_rank import one_rank
from megatron_dlm.training.dry_batch import microbatches_that_fill
from megatron_dlm.training.optimizer import Optimizer, wrap
from megatron_dlm.training.progress import Progress
from megatron_dlm.training.state import Training
from megatron_dlm.training.step import train_step

MICRO_BATCHES, FINALIZE, OPTIMIZER, REPORT = "micro-batches", "finalize", "optimizer", "report"
"""Phases of a step: forward and backward; reduction of gradients; norm and update; the figures."""


class Held(NamedTuple):
    """Bytes that a rank holds all the time."""

    weights: int
    """As the layers use them."""
    gradients: int
    optimizer: int
    """Main parameters and both moments, of this rank's share."""

    @property
    def total(self) -> int:
        return sum(self)


@dataclass
class RankStep:
    """What one rank does in a step."""

    rank: int
    stage: int
    """Of the pipeline."""
    layout: str
    parameters: int
    held: Held
    micro_batches: int
    """That were recorded."""
    ledger: Ledger

    @property
    def activations(self) -> int:
        """Most bytes beside those that are held all the time."""
        return self.ledger.peak


def rehearse(
    config: Config, rank: int, world_size: int, *, vocab_size: int, scored: float = 1.0, gpu: bool = True
) -> RankStep:
    """Run a step of rank ``rank`` with as many micro-batches as keep the pipeline filled; nothing is allocated.

    Args:
        scored: share of the tokens that are masked: 1 is the heaviest step there can be, and half an ordinary one.
        gpu: as for ``one_rank``.

    Raises:
        ConfigError: the layout does not fit, or megatron refuses it.
    """
    with one_rank(config.parallel, rank, world_size, gpu=gpu) as topology:
        parts = build(config, topology, vocab_size)
        stream = SyntheticStream(config, topology, scored)
        return record(config, topology, *parts, stream)


def build(config: Config, topology: Topology, vocab_size: int) -> tuple[list[Any], Optimizer]:
    """The wrapped chunks and the optimizer of this rank, without values."""
    bare = build_model(config, topology, vocab_size=vocab_size, initialize=False)
    chunks = wrap(bare, config)
    return chunks, Optimizer(config, chunks, steps=max(config.train.steps or 1, config.optimizer.warmup_steps + 1))


def record(
    config: Config, topology: Topology, chunks: list[Any], optimizer: Optimizer, stream: SyntheticStream
) -> RankStep:
    """Take the step, collectively where the ranks are real ones, and write it down."""
    ledger = Ledger(groups_of(topology))
    held = held_bytes(chunks, optimizer)
    training = Training(
        config=config,
        topology=topology,
        tokenizer=cast(Any, None),
        chunks=chunks,
        optimizer=optimizer,
        train_stream=cast(Any, stream),
        valid_stream=None,
        steps=1,
    )
    model_config, finalize, update = chunks[0].config, chunks[0].config.finalize_model_grads_func, optimizer.step
    model_config.finalize_model_grads_func = _in_phase(ledger, FINALIZE, MICRO_BATCHES, finalize)
    optimizer.step = _in_phase(ledger, OPTIMIZER, REPORT, update)  # type: ignore[method-assign]
    zero = optimizer.zero_grad  # once a step, at its start
    optimizer.zero_grad = _in_phase(ledger, FINALIZE, MICRO_BATCHES, zero)  # type: ignore[method-assign]
    for part in optimizer.parts:  # torch's AdamW counts its steps on the host
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                ledger.on_host(state["step"])
    to_host = mock.patch.object(Tensor, "cpu", lambda tensor: ledger.on_host(tensor.clone(), wait="cpu"))
    ledger.phase = MICRO_BATCHES
    try:
        with warnings.catch_warnings(), to_host, ledger:
            warnings.simplefilter("ignore", UserWarning)
            train_step(training, Progress())
    finally:
        model_config.finalize_model_grads_func = finalize
        optimizer.step, optimizer.zero_grad = update, zero  # type: ignore[method-assign]
    return RankStep(
        rank=topology.rank,
        stage=topology.pipeline_rank,
        layout=str(topology),
        parameters=sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()),
        held=held,
        micro_batches=stream.num_microbatches,
        ledger=ledger,
    )


def _in_phase(ledger: Ledger, phase: str, after: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        ledger.phase = phase
        try:
            return function(*args, **kwargs)
        finally:
            ledger.phase = after

    return wrapped


class SyntheticStream:
    """Micro-batches with tokens and noise of no meaning, full rows, and a given share of masked tokens."""

    def __init__(self, config: Config, topology: Topology, scored: float) -> None:
        self.micro_batch_size, self._device = config.train.micro_batch_size, topology.device
        self.dataset = SimpleNamespace(sequence_length=config.data.sequence_length)
        in_all = config.train.global_batch_size // (self.micro_batch_size * topology.data_size)
        self.num_microbatches = microbatches_that_fill(topology.pipeline_size, topology.virtual_size, in_all)
        self._scored = None if config.model.kind.scored_share == 1 else scored

    def training(self, progress: Progress, *, reads_tokens: bool) -> Iterator[MicroBatch]:
        """As ``BatchStream.training``."""
        for _ in range(self.num_microbatches):
            sample_ids = np.arange(self.micro_batch_size)
            if not reads_tokens:
                yield MicroBatch(sample_ids, None, None)
                continue
            batch = self._batch()
            yield MicroBatch(sample_ids, batch.inputs, None, batch)

    def _batch(self) -> Batch:
        size, seq, device = self.micro_batch_size, self.dataset.sequence_length, self._device
        count = size * seq if self._scored is None else round(size * seq * self._scored)
        rows = torch.arange(count, device=device)
        return Batch(
            inputs=torch.zeros(size, seq, dtype=torch.int64, device=device),
            rows=None if self._scored is None else rows,
            targets=torch.zeros_like(rows),
            weights=torch.ones(count, device=device),
            sample_index=rows // seq,
            num_eligible=size * seq,
            divisor=torch.full((), size * seq, device=device),
            lengths=None,
        )


def groups_of(topology: Topology) -> dict[str, Any]:
    """The process groups of a rank, by what they are for."""
    return {
        "world": torch.distributed.group.WORLD,
        "embedding": parallel_state.get_embedding_group(check_initialized=False),
        "tensor": topology.tensor_group,
        "pipeline": topology.pipeline_group,
        "data": topology.data_group,
    }


def held_bytes(chunks: Iterable[Any], optimizer: Optimizer) -> Held:
    """Bytes of weights, gradient buffers and optimizer state that this rank has."""
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    weights = {_storage(parameter): parameter.untyped_storage().nbytes() for parameter in parameters}
    state: dict[int, int] = {}
    for shard in optimizer.shards():
        for tensor in shard.state.values():
            if (key := _storage(tensor)) not in weights:  # in fp32 the main parameters are the weights themselves
                state[key] = state.get(key, 0) + tensor.numel() * tensor.element_size()
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    gradients = {_storage(buffer.grad_data): buffer.grad_data.untyped_storage().nbytes() for buffer in buffers}
    return Held(sum(weights.values()), sum(gradients.values()), sum(state.values()))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
