"""One rank of a layout of any size: process groups that connect nothing, tensors that hold nothing.

Everything that a rank does is done by the code that does it in a run (megatron's schedules, wrapper and optimizer, our
model, the host code of our Triton kernels). What is put in its place for a while is listed in ``one_rank``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore  # its import registers the backend "fake"

from dlm_kernels import implementation
from megatron_dlm.config.tree import ParallelConfig
from megatron_dlm.model import last_layer
from megatron_dlm.parallel import topology as parallel
from megatron_dlm.parallel.topology import Topology


@contextlib.contextmanager
def one_rank(layout: ParallelConfig, rank: int, world_size: int, *, gpu: bool = True) -> Iterator[Topology]:
    """Be rank ``rank`` of ``world_size`` in ``layout`` while the block lasts; tensors made in it are fake.

    Args:
        gpu: have the memory and the work of a GPU, although there is none: Triton's kernels (their host code runs, the
            kernels do not) and a fused RMSNorm, which keeps its input and a number for each row, where torch's CPU
            build keeps every intermediate.

    Raises:
        RuntimeError: this process has process groups already.
        ConfigError: the layout does not fit the number of ranks.
    """
    if dist.is_initialized():
        raise RuntimeError("a process that has process groups cannot be another rank")
    with contextlib.ExitStack() as stack:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        stack.callback(parallel.shutdown)
        create_group, patch = parallel_state.create_group, mock.patch.object
        for target, name, value in (
            # Gloo groups, which megatron makes beside the others, would really connect.
            (parallel_state, "create_group", lambda *a, **k: create_group(*a, **{**k, "backend": "fake"})),
            (dist, "all_gather_object", _all_gather_object),
            # Random streams are real tensors; nothing is drawn here.
            (Topology, "seed_dropout", lambda *a: None),
            (CudaRNGStatesTracker, "fork", lambda *a: contextlib.nullcontext()),
            (layers, "get_cuda_rng_tracker", lambda *a, **k: _NoStreams()),
            # Not read from the tensor, which has no numbers: as on a GPU, and as it is where everything is masked.
            (last_layer, "_most_queries", lambda numbers, limit: limit),
        ):
            stack.enter_context(patch(target, name, value))
        if gpu:
            stack.enter_context(_as_on_a_gpu())
        topology = parallel.initialize(layout)
        # Creating groups makes real tensors in some versions; from here on all are fake.
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield topology


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(F, "rms_norm", _fused_rms_norm))
        if implementation.triton_is_installed() and os.environ.get("TRITON_INTERPRET") != "1":
            from triton.runtime.jit import JITFunction

            stack.enter_context(mock.patch.object(implementation, "resolve", lambda impl, device: "triton"))
            stack.enter_context(mock.patch.object(JITFunction, "run", _launch))
        yield


def _launch(self: Any, *args: Any, **options: Any) -> None:
    """In place of a kernel: reads and writes every tensor that it is given, as far as a ledger is concerned."""
    tensors = [value for value in (*args, *options.values()) if isinstance(value, Tensor)]
    if tensors:
        torch.ops.megatron_dlm_rehearsal.kernel(tensors)


def _fused_rms_norm(hidden: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    return _RMSNorm.apply(hidden, weight)


class _RMSNorm(torch.autograd.Function):
    """The shapes of torch's CUDA kernel, which keeps the input and a number in fp32 for every row."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        scale = hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(hidden, scale, weight)
        output = torch.empty_like(hidden)
        torch.ops.megatron_dlm_rehearsal.kernel([hidden, output])
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        hidden, _, weight = ctx.saved_tensors
        result = torch.empty_like(hidden)
        torch.ops.megatron_dlm_rehearsal.kernel([gradients[0], hidden, result])
        return result, torch.empty_like(weight)


class _NoStreams:
    """megatron's tracker of random streams, where nothing is drawn."""

    def fork(self, *args: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def is_initialized(self) -> bool:
        return True


def _all_gather_object(found: list[Any], value: Any, group: Any = None) -> None:
    found[:] = [value] * len(found)


_library = torch.library.Library("megatron_dlm_rehearsal", "DEF")
_library.define("kernel(Tensor[] tensors) -> ()")
for _key in ("CPU", "Meta", "CUDA"):
    _library.impl("kernel", lambda tensors: None, _key)
