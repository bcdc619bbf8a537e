"""AdamW on megatron's distributed optimizer, with a learning-rate schedule and non-finite protection."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_dlm.config.tree import Config
from megatron_dlm.model.transformer import DiffusionTransformer
from megatron_dlm.parallel.compat import gradients_for_norm, wrap_data_parallel
from megatron_dlm.parallel.megatron_config import ddp_config, optimizer_config

_SCHEDULES = {"wsd": "WSD", "cosine": "cosine", "linear": "linear", "constant": "constant"}


class Update(NamedTuple):
    """What one call of ``Optimizer.step`` did."""

    grad_norm: float
    """Global L2 norm of the gradient of the mean loss, before clipping."""
    lr: float
    applied: bool
    """False where the gradient was not finite: parameters and moments are unchanged, on all ranks."""


class OptimizerShard(NamedTuple):
    """What this rank's part of the distributed optimizer has of one parameter; the tensors are the optimizer's own."""

    parameter: torch.Tensor
    """The model's, all that this rank has of it."""
    start: int
    """First of its elements, in row-major order, that this data-parallel rank updates."""
    state: dict[str, torch.Tensor]
    """[n] fp32 each: ``param`` (the main parameter), ``exp_avg``, ``exp_avg_sq``."""


def wrap(chunks: list[DiffusionTransformer], config: Config) -> list[DistributedDataParallel]:
    """Give the bare chunks contiguous fp32 gradient buffers that are reduced over the data-parallel group."""
    settings = ddp_config(config)
    wrapped = [wrap_data_parallel(chunk.config, settings, chunk) for chunk in chunks]
    megatron_config = chunks[0].config
    megatron_config.finalize_model_grads_func = finalize_model_grads
    if settings.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        megatron_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


class Optimizer:
    """The distributed optimizer and the learning rate of every step.

    The learning rate is a pure function of the step, so there is nothing of it to save, and a skipped
    step advances it. Step 0 already has a positive rate: warm-up reaches ``lr`` at step ``warmup_steps - 1``.
    """

    def __init__(self, config: Config, chunks: list[DistributedDataParallel], *, steps: int) -> None:
        settings = config.optimizer
        self.chunks = chunks
        self.clip_grad = settings.clip_grad
        self.megatron = get_megatron_optimizer(optimizer_config(config), chunks)
        for part in self.parts:
            _create_moments(part.optimizer)
        chunks[0].config.grad_scale_func = self.megatron.scale_loss
        self._scheduler = OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.warmup_steps,
            lr_decay_steps=max(steps, settings.warmup_steps + 1),
            lr_decay_style=_SCHEDULES[settings.schedule],
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            wsd_decay_steps=max(settings.decay_steps, 1),
            lr_wsd_decay_style="exponential",
        )

    @property
    def parts(self) -> list:
        """megatron's optimizers, one unless it has chained several."""
        return getattr(self.megatron, "chained_optimizers", [self.megatron])

    def load_common_state(self, state: dict[str, Any]) -> None:
        """Take over step counts; the settings (rates, betas, epsilon) stay those of the configuration.

        megatron keeps settings in its parameter groups too: a loaded ``max_lr`` would silently win, and 0.19 finds the
        saved group of a parameter by it. So the saved groups get our settings first. Weight decay tells them apart.
        """
        ours = {group["wd_mult"]: group for part in self.parts for group in part.optimizer.param_groups}
        for saved in _param_groups(state):
            settings = ours.get(saved["wd_mult"], {})  # a rank may have none of the other group
            saved.update({key: value for key, value in settings.items() if key not in ("params", "step")})
        for part in self.parts:
            part.load_state_dict({key: value for key, value in state.items() if not key.startswith("param_state")})
            # megatron gives all parameters one and the same tensor, which would then count steps times parameters.
            for of_parameter in part.optimizer.state.values():
                if isinstance(of_parameter.get("step"), torch.Tensor):
                    of_parameter["step"] = of_parameter["step"].clone()

    def set_main_weights(self, weights: dict[str, dict[str, torch.Tensor]]) -> None:
        """Take fp32 values that the parameters have already been given; in bf16 those were rounded.

        Args:
            weights: whole parameters of this rank, by ``model{chunk}`` and name.
        """
        for part in self.parts:
            part.reload_model_params(weights)

    def shards(self) -> Iterator[OptimizerShard]:
        """This rank's share of the parameters that it has one of; the ranks of a replica together have all elements."""
        for part in self.parts:
            for buffer in part.gbuf_ranges:
                for bucket in (bucket for buckets in buffer.values() for bucket in buckets):
                    for parameter, ranges in bucket["param_map"].items():
                        state = part._get_main_param_and_optimizer_states(parameter)
                        tensors = {name: tensor.detach() for name, tensor in state.items() if name != "step"}
                        yield OptimizerShard(parameter, ranges["param"].start, tensors)

    def common_state(self) -> dict[str, Any]:
        """What is no tensor of a parameter, equal on all ranks: settings of the parameter groups, and steps."""
        (part,) = self.parts  # megatron chains several for experts, which our models do not have
        return {**part.state_dict(), "param_state_sharding_type": "fully_reshardable"}

    def zero_grad(self) -> None:
        """Clear the gradient buffers and the optimizer's gradients."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def step(self, step: int) -> Update:
        """Update the parameters from finished gradients; collective.

        The gradient norm is the sum over all ranks, so that all of them find a non-finite gradient and
        skip together.
        """
        lr = self._set_learning_rate(step)
        self.megatron.prepare_grads()
        grad_norm = self._grad_norm()
        if not math.isfinite(grad_norm):
            return Update(grad_norm, lr, applied=False)
        if self.clip_grad > 0.0:
            for part in self.parts:
                if parameters := part.get_parameters():
                    clip_grad_by_total_norm_fp32(parameters, self.clip_grad, grad_norm)
        self.megatron.step_with_ready_grads()
        return Update(grad_norm, lr, applied=True)

    def _grad_norm(self) -> float:
        """Global L2 norm, summed in fp64; not finite where the gradient of any parameter on any rank is not.

        megatron's own norm sums in fp32 where apex is absent. On a CPU a matrix then comes out too small, by 1e-5 with
        a million elements and 6e-4 with 16 million, and less so when sharded: clipping would depend on the layout.

        A parameter of which several ranks have copies (norms, tied embeddings) counts once. The other copies are added
        times zero: each rank updates its copy from its own gradient, which one faulty device spoils there alone.
        """
        total = 0.0
        for part in self.parts:
            counted = gradients_for_norm(part)
            places = {gradient.data_ptr() for gradient in counted}
            grads = [p.grad for p in part.get_parameters() if p.grad is not None]
            copies = [gradient for gradient in grads if gradient.data_ptr() not in places]
            squares = _sum_of_squares(counted) + 0.0 * _sum_of_squares(copies)
            dist.all_reduce(squares, group=part.get_grad_stats_parallel_group())
            total += float(squares)
        return math.sqrt(total)

    def _set_learning_rate(self, step: int) -> float:
        self._scheduler.num_steps = step
        self._scheduler.step(1)
        return float(self._scheduler.get_lr({}))


def _param_groups(state: Any) -> list[dict[str, Any]]:
    """All parameter groups of megatron's optimizer state, of one optimizer or of several chained ones."""
    if not isinstance(state, dict):
        return []
    return [*state.get("param_groups", []), *(group for value in state.values() for group in _param_groups(value))]


def _create_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give torch's Adam now what it creates in its first step, as it would: a save may come before, if that is skipped.

    Other implementations have states of their own and are left alone.
    """
    if not isinstance(optimizer, torch.optim.Adam):  # of which AdamW is one
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            device = parameter.device if group["capturable"] or group["fused"] else "cpu"
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _sum_of_squares(tensors: list[torch.Tensor]) -> torch.Tensor:
    """[] fp64, on the device."""
    zero = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return torch.stack([zero, *norms]).square().sum()
