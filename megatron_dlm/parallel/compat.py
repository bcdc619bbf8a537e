"""Every difference between the supported megatron-core versions, one function each.

Supported: 0.16.1 (the newest for Python 3.11) up to, not including, 0.20.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
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


def repair_adam_step_loading() -> None:
    """Make the distributed optimizer load checkpoints of torch's AdamW; safe to call again.

    torch's AdamW has a ``step`` tensor per parameter. The distributed optimizer stores it once, in the
    parameter groups; on loading it looks for a tensor ``step`` that no checkpoint has (``KeyError``), and it
    would hand every parameter the same tensor, which then counts parameters times steps. Seen in 0.16.1 and
    0.19.2. So ``step`` is kept out of the way, and every parameter gets a tensor of its own.
    """
    original = DistributedOptimizer._set_main_param_and_optimizer_states
    if getattr(original, "repaired_by_megatron_dlm", False):
        return

    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = state.pop("step", None)
        original(self, model_param, tensors)
        if step is not None:
            state["step"] = step.clone()

    set_states.repaired_by_megatron_dlm = True  # type: ignore[attr-defined]
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


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
