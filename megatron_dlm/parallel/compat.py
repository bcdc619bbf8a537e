"""Every difference between the supported megatron-core versions, one function each.

Supported: 0.16.1 (the newest for Python 3.11) up to, not including, 0.20.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


def wrap_data_parallel(
    config: TransformerConfig, ddp_config: DistributedDataParallelConfig, chunk: MegatronModule
) -> DistributedDataParallel:
    """The data-parallel wrapper with contiguous fp32 gradient buffers.

    0.19 computes the buffer layout itself but warns that the caller should; its own result is what we want.
    """
    with _only_errors("megatron.core.distributed.distributed_data_parallel"):
        return DistributedDataParallel(config, ddp_config, chunk)


def gradients_for_norm(optimizer: MegatronOptimizer) -> list[torch.Tensor]:
    """This rank's gradients that count in the global norm, each parameter on one rank only; 0.19 renamed the method."""
    if hasattr(optimizer, "get_grads_for_grad_norm"):
        return optimizer.get_grads_for_grad_norm()
    return optimizer.get_main_grads_for_grad_norm()


@contextlib.contextmanager
def _only_errors(name: str) -> Iterator[None]:
    """Let the logger ``name`` and those below it say nothing but errors."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
