"""How long a step takes and what it needs: what its ranks do, over a table of constants. Nothing is measured."""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

from megatron_dlm.config.tree import Config
from megatron_dlm.flops import training_flops
from megatron_dlm.model.layer_spec import last_layer_takes_rows
from megatron_dlm.rehearsal import machines
from megatron_dlm.rehearsal.ledger import Collective, Wait
from megatron_dlm.rehearsal.machines import Machine
from megatron_dlm.rehearsal.step import FINALIZE, MICRO_BATCHES, OPTIMIZER, REPORT, RankStep, rehearse

_ORDINARY = 0.5
"""Of the tokens, that an ordinary step masks."""


class Memory(NamedTuple):
    """Bytes of one rank at the peak of the heaviest step, in which every token is masked."""

    weights: int
    gradients: int
    optimizer: int
    saved: int
    """Activations that wait for the backward pass."""
    temporary: int
    """The rest of what exists at the peak: logits, gradients of activations."""
    reserved: int

    @property
    def total(self) -> int:
        return sum(self)


class StageTime(NamedTuple):
    """Seconds of one micro-batch, forward and backward, on one pipeline stage; nothing overlaps."""

    matmul: float
    attention: float
    elementwise: float
    tensor_parallel: float
    """Collectives of the tensor-parallel group."""
    pipeline: float
    """Sends and receives."""

    @property
    def total(self) -> float:
        return sum(self)


class Prediction(NamedTuple):
    """Of one layout on one kind of machine."""

    layout: str
    micro_batches: int
    """Of each rank in a step."""
    memory: list[Memory]
    """Of the first rank of every stage that was rehearsed."""
    stages: list[StageTime]
    """The same stages: first, those between, last (one alone where there is one)."""
    bubble: float
    """Seconds of a step in which the slowest stage waits for the pipeline to fill and to drain."""
    gradients: float
    """Seconds of reducing gradients over the replicas, after the last micro-batch."""
    update: float
    """Seconds of the optimizer, with the all-gather of its parameters."""
    seconds: float
    """Of a step."""
    tokens_per_second: float
    """Of all GPUs."""
    mfu: float
    """FLOPs of the model, without recomputation, over the peak of all GPUs."""
    collectives: dict[tuple[str, Collective], tuple[int, int]]
    """Calls and bytes of the last stage's first rank in an ordinary step with a filled pipeline, by phase and kind."""
    waits: dict[Wait, int]
    """Where the host waits for the device in a step, and how often, on that rank."""

    def fits(self, machine: Machine) -> bool:
        """Whether every rank's memory suffices."""
        return max(memory.total for memory in self.memory) <= machine.memory


def predict(config: Config, world_size: int, machine: Machine, *, vocab_size: int, quick: bool = False) -> Prediction:
    """Rehearse the first rank of the first, a middle and the last stage. Raises ``ConfigError`` as ``rehearse``.

    Args:
        quick: a quarter of the work, to compare layouts: middle stages are taken to be as slow as the first, and the
            time is that of the heaviest step.
    """
    tensor, stages = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    chosen = sorted({0, 0 if quick else min(1, stages - 1), stages - 1})
    replicas = world_size // (tensor * stages)
    ranks = [stage * tensor * replicas for stage in chosen]  # megatron's order: tensor, data, pipeline
    heaviest = [rehearse(config, rank, world_size, vocab_size=vocab_size) for rank in ranks]
    ordinary = (
        heaviest
        if quick
        else [rehearse(config, rank, world_size, vocab_size=vocab_size, scored=_ORDINARY) for rank in ranks]
    )
    times, last = [stage_time(step, machine) for step in ordinary], ordinary[-1].ledger
    count = config.train.global_batch_size // (config.train.micro_batch_size * replicas)
    middle = times[1] if len(times) == 3 else times[0]
    every = [times[0], *[middle] * (stages - 2), times[-1]] if stages > 1 else times
    slowest = max(time.total for time in every)
    # The first micro-batch goes through all stages; interleaved, through a part of each at a time (Megatron-LM, SC21).
    bubble = (sum(time.total for time in every) - slowest) / (config.parallel.virtual_pipeline_model_parallel_size or 1)
    # What overlaps with the micro-batches is counted too, once: nothing is taken to be hidden.
    gradients = max(
        phase_time(step, FINALIZE, machine) + _communication(step, MICRO_BATCHES, machine, only=("data",))
        for step in ordinary
    )
    update = max(phase_time(step, OPTIMIZER, machine) + phase_time(step, REPORT, machine) for step in ordinary)
    seconds = count * slowest + bubble + gradients + update
    tokens = config.train.global_batch_size * config.data.sequence_length
    kind = config.model.kind
    flops = training_flops(
        config.model,
        tokens=tokens,
        head_rows=tokens * kind.scored_share,
        sequence_length=config.data.sequence_length,
        vocab_size=vocab_size,
        last_layer_rows=last_layer_takes_rows(config),
    )
    return Prediction(
        layout=ordinary[0].layout,
        micro_batches=count,
        memory=[memory_of(step) for step in heaviest],
        stages=times,
        bubble=bubble,
        gradients=gradients,
        update=update,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        mfu=flops / (seconds * world_size * machine.matmul),
        collectives={key: (calls, last.sent[key]) for key, calls in last.calls.items()},
        waits=dict(last.waits),
    )


def memory_of(step: RankStep) -> Memory:
    """What the rank of a rehearsed step needs."""
    ledger = step.ledger
    return Memory(*step.held, ledger.saved, ledger.peak - ledger.saved, int(machines.RESERVED))


def stage_time(step: RankStep, machine: Machine) -> StageTime:
    """Seconds of a micro-batch on the rank of a rehearsed step."""
    ledger, count = step.ledger, step.micro_batches
    flops = {kind: value / count for (phase, kind), value in ledger.flops.items() if phase == MICRO_BATCHES}
    attention = flops.get("attention", 0.0) / machines.ATTENTION
    attention += flops.get("attention_backward", 0.0) / machines.ATTENTION_BACKWARD
    return StageTime(
        matmul=flops.get("matmul", 0.0) / (machine.matmul * machines.MATMUL),
        attention=attention / machine.matmul,
        elementwise=ledger.moved[MICRO_BATCHES] / count / (machine.bandwidth * machines.BANDWIDTH),
        tensor_parallel=_communication(step, MICRO_BATCHES, machine, but=("pipeline", "data")) / count,
        pipeline=_communication(step, MICRO_BATCHES, machine, only=("pipeline",)) / count,
    )


def phase_time(step: RankStep, phase: str, machine: Machine) -> float:
    """Seconds of a phase that a step has once."""
    moved = step.ledger.moved[phase] / (machine.bandwidth * machines.BANDWIDTH)
    return moved + _communication(step, phase, machine)


def _communication(
    step: RankStep, phase: str, machine: Machine, *, only: Container[str] = (), but: Container[str] = ()
) -> float:
    """Seconds of a phase's collectives, of the groups ``only`` (all, if empty) and not of those ``but``."""
    seconds = 0.0
    for (when, collective), calls in step.ledger.calls.items():
        if when == phase and collective.group not in but and (not only or collective.group in only):
            seconds += collective_time(collective, step.ledger.sent[phase, collective], calls, machine)
    return seconds


def collective_time(collective: Collective, size: int, calls: int, machine: Machine) -> float:
    """Seconds of ``calls`` collectives of ``size`` bytes together, as rings (the bus bandwidth of NCCL's tests)."""
    if collective.ranks < 2:
        return 0.0
    near = collective.nodes < 2
    rate = machine.nvlink * machines.NVLINK if near else machine.network * machines.NETWORK
    latency = machines.LATENCY if near else machines.NETWORK_LATENCY
    if collective.kind == "receive":  # the other end of a send
        return 0.0
    share = 1.0 if collective.kind in ("send", "broadcast") else (collective.ranks - 1) / collective.ranks
    return calls * latency + size * share * (2 if collective.kind == "all_reduce" else 1) / rate
