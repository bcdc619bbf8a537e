"""Starts torch.distributed and megatron's process groups once, and hands them down."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from dlm_kernels.philox import Stream, random_bits
from megatron_dlm.config.tree import ParallelConfig
from megatron_dlm.errors import ConfigError, TrainingError

_LOOPBACK_ADDRESS, _LOOPBACK = "127.0.0.1", "lo0" if sys.platform == "darwin" else "lo"
# torch's flight recorder: the last collectives of every rank, which the watchdog writes down when they do not end.
_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


@dataclass(frozen=True)
class Topology:
    """This process's place in the parallel layout, and the process groups it belongs to.

    ``str(topology)`` is the layout, such as ``TP2-PP2-DP4`` (``TP2+SP``, ``PP2xVP2`` where in use).
    """

    tensor_size: int
    pipeline_size: int
    virtual_size: int
    data_size: int
    sequence_parallel: bool
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    rank: int
    world_size: int
    device: torch.device
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup

    def __str__(self) -> str:
        tensor = f"TP{self.tensor_size}" + ("+SP" if self.sequence_parallel else "")
        pipeline = f"PP{self.pipeline_size}" + (f"xVP{self.virtual_size}" if self.virtual_size > 1 else "")
        return f"{tensor}-{pipeline}-DP{self.data_size}"

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the first pipeline stage (it embeds the noised tokens)."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last pipeline stage (it computes the loss)."""
        return self.pipeline_rank == self.pipeline_size - 1

    def sum_over_world(self, values: torch.Tensor) -> torch.Tensor:
        """All-reduce ``values`` over all ranks, in place; returns it.

        A figure that tensor-parallel ranks have in common is given by ``reports_loss`` ranks only.
        """
        dist.all_reduce(values)
        return values

    @property
    def reports_loss(self) -> bool:
        """Whether this rank is the one that reports its data-parallel replica's losses."""
        return self.is_last_stage and self.tensor_rank == 0

    def seed_dropout(self, seed: int, step: int) -> None:
        """Reset the dropout streams from (seed, step, pipeline rank, data rank).

        Seeding every step makes a resumed run draw the same masks with nothing to store. The data rank
        is part of it: otherwise all data-parallel replicas drop the same units. megatron adds the tensor
        rank itself where the ranks must differ, so neighbouring places must not have neighbouring seeds.
        """
        place = self.pipeline_rank * self.data_size + self.data_rank
        bits = random_bits(seed, Stream.DROPOUT, place, step)
        model_parallel_cuda_manual_seed(bits >> 1, force_reset_rng=True)  # megatron adds to it, within 32 bits


def initialize(config: ParallelConfig, *, timeout_minutes: float = 30.0) -> Topology:
    """Start torch.distributed (NCCL with a GPU, gloo without) and megatron's groups.

    Reads torchrun's environment (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``, ``MASTER_PORT``);
    without it, one process alone. A default process group that already exists is used as it is, and
    megatron's groups of an earlier call are replaced.

    Args:
        timeout_minutes: longest that a rank waits for the others, here and in every collective.

    Raises:
        ConfigError: the world size does not fit the layout, or this machine has too few GPUs.
        TrainingError: the other ranks do not come.
    """
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(_device())
    if not dist.is_initialized():
        _meet("nccl" if gpu else "gloo", timedelta(minutes=timeout_minutes))
    tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    world, virtual = dist.get_world_size(), config.virtual_pipeline_model_parallel_size
    if world % (tensor * pipeline):
        raise ConfigError(
            f"{world} processes cannot be split into TP {tensor} x PP {pipeline}; "
            f"start a multiple of {tensor * pipeline}"
        )
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        distributed_timeout_minutes=math.ceil(timeout_minutes),
    )
    return Topology(
        tensor_size=tensor,
        pipeline_size=pipeline,
        virtual_size=virtual or 1,
        data_size=parallel_state.get_data_parallel_world_size(),
        sequence_parallel=config.sequence_parallel,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        rank=dist.get_rank(),
        world_size=world,
        device=torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu"),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
    )


def _device() -> int:
    """The GPU of this rank. Raises ``ConfigError`` where this machine has too few."""
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if count == 1:  # as Slurm shows it with --gpus-per-task=1
        return 0
    if local >= count:
        raise ConfigError(f"process {local} of this machine has no GPU: it has {count}; start as many, one for each")
    return local


def _meet(backend: str, timeout: timedelta) -> None:
    """Make the default process group. Raises ``TrainingError`` where not all ranks come."""
    world_size, address = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("MASTER_ADDR", _LOOPBACK_ADDRESS)
    for name, value in _RECORDER.items():
        os.environ.setdefault(name, value)
    if address == _LOOPBACK_ADDRESS:  # all on this machine: nobody else is to reach them
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, _LOOPBACK)
    if world_size == 1:  # without a port
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"not all of the {world_size} ranks met at {address}:{os.environ.get('MASTER_PORT')} within "
            f"{timeout.total_seconds() / 60:g} minutes ({str(error).strip().partition(chr(10))[0][:200]}); start all "
            "of them, with the same address, which every node can reach"
        ) from None


def shutdown() -> None:
    """Destroy megatron's groups and the default process group."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
