"""Layouts that fit a number of GPUs, by predicted tokens per second."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from megatron_dlm.config.check import validate
from megatron_dlm.config.tree import Config
from megatron_dlm.errors import ConfigError
from megatron_dlm.flops import parameter_count
from megatron_dlm.rehearsal import machines
from megatron_dlm.rehearsal.machines import Machine
from megatron_dlm.rehearsal.prediction import Prediction, predict

_BYTES_PER_PARAMETER = {"bf16": 6, "fp32": 8}  # weights and fp32 gradients
_MICRO_BATCHES = (1, 2, 4)
_OPTIMIZER_BYTES = 8  # both moments; the main parameters are 4 more in bf16


class Candidate(NamedTuple):
    """One layout."""

    config: Config
    prediction: Prediction | None
    """None: not rehearsed, for ``reason``."""
    reason: str
    """Why it cannot be used; empty where it can."""

    @property
    def label(self) -> str:
        """Such as ``TP2 PP4 VP2 micro-batch 1 recompute full``."""
        parallel, train = self.config.parallel, self.config.train
        virtual = parallel.virtual_pipeline_model_parallel_size
        return (
            f"TP{parallel.tensor_model_parallel_size} PP{parallel.pipeline_model_parallel_size}"
            + (f" VP{virtual}" if virtual else "")
            + f" micro-batch {train.micro_batch_size} recompute {train.recompute}"
        )


def search(
    config: Config,
    world_size: int,
    machine: Machine,
    *,
    vocab_size: int,
    say: Callable[[str], None] = lambda line: None,
) -> list[Candidate]:
    """Layouts that were looked at: those that fit first, the fastest first, then the others with their reasons.

    The order is that of the heaviest step.

    Tensor parallelism within a node and with sequence parallelism, stages that divide the layers. A larger micro-batch
    is tried where the smaller one fits, recomputation where it does not fit without, interleaving where the layout
    fits without it.
    """
    found: list[Candidate] = []

    def attempt(tensor: int, stages: int, virtual: int | None, micro_batch: int, recompute: str) -> bool:
        candidate = copy.deepcopy(config)
        candidate.parallel = replace(
            candidate.parallel,
            tensor_model_parallel_size=tensor,
            sequence_parallel=tensor > 1,
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=virtual,
            data_parallel_size=None,
        )
        candidate.train = replace(candidate.train, micro_batch_size=micro_batch, recompute=recompute)  # type: ignore[arg-type]
        tried = _try(candidate, world_size, machine, vocab_size)
        found.append(tried)
        if tried.prediction:
            say(f"{tried.label}: {tried.reason or f'{tried.prediction.tokens_per_second:,.0f} tokens/s'}")
        return not tried.reason

    layers = config.model.num_layers
    for tensor in (size for size in (1, 2, 4, 8) if world_size % size == 0):
        for stages in (size for size in (1, 2, 4, 8, 16) if layers % size == 0 and world_size % (tensor * size) == 0):
            interleaved = [virtual for virtual in (2, 4) if stages > 1 and layers % (stages * virtual) == 0]
            for micro_batch in _MICRO_BATCHES:
                if attempt(tensor, stages, None, micro_batch, "none"):
                    for virtual in interleaved:
                        attempt(tensor, stages, virtual, micro_batch, "none")
                elif not attempt(tensor, stages, None, micro_batch, "full"):
                    break
    return sorted(found, key=lambda c: (bool(c.reason), -c.prediction.tokens_per_second if c.prediction else 0.0))


def _try(config: Config, world_size: int, machine: Machine, vocab_size: int) -> Candidate:
    try:
        validate(config, world_size=world_size, vocab_size=vocab_size)
    except ConfigError as error:
        return Candidate(config, None, str(error))
    if (least := _least_bytes(config, world_size, vocab_size)) > machine.memory:
        return Candidate(config, None, f"weights, gradients and optimizer alone need {least / 1e9:.0f} GB")
    try:
        prediction = predict(config, world_size, machine, vocab_size=vocab_size, quick=True)
    except ConfigError as error:
        return Candidate(config, None, str(error))
    most = max(memory.total for memory in prediction.memory)
    return Candidate(config, prediction, "" if prediction.fits(machine) else f"needs {most / 1e9:.0f} GB")


def _least_bytes(config: Config, world_size: int, vocab_size: int) -> float:
    """What no rank can do without, were the parameters divided evenly."""
    parallel, bf16 = config.parallel, config.train.precision == "bf16"
    parameters = parameter_count(config.model, config.model.padded_vocab_size(vocab_size))
    own = parameters / parallel.model_parallel_size
    replicas = world_size / parallel.model_parallel_size
    optimizer = _OPTIMIZER_BYTES + (4 if bf16 else 0)
    return own * (_BYTES_PER_PARAMETER[config.train.precision] + optimizer / replicas) + machines.RESERVED
