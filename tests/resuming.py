"""Runs that are saved, continued and compared bit by bit."""

from __future__ import annotations

import hashlib
from typing import Any

import torch.distributed as dist

from megatron_dlm.config.tree import Config
from megatron_dlm.parallel import topology as parallel
from megatron_dlm.training import saving as checkpoint
from megatron_dlm.training.setup import build
from megatron_dlm.training.state import Training
from megatron_dlm.training.step import train_step

Figures = list[tuple[float, float]]


def continue_runs(configs: list[Config], first: int, last: int, save_at: int | None) -> list[tuple[Figures, str]]:
    """``continue_run`` for several configurations on this rank's process group, one after the other."""
    return [continue_run(config, first, last, save_at) for config in configs]


def continue_run(config: Config, first: int, last: int, save_at: int | None) -> tuple[Figures, str]:
    """(loss, gradient norm) of the steps [first, last), and a digest of all ranks' final parameters and moments.

    Loads a checkpoint unless ``first`` is 0.
    """
    training = build(config, parallel.initialize(config.parallel))
    if first:
        assert checkpoint.resume(training)[1] == training.progress_at(first)
    figures = []
    for step in range(first, last):
        report = train_step(training, training.progress_at(step))
        figures.append((report.loss, report.grad_norm))
        if step + 1 == save_at:
            checkpoint.save(training, training.progress_at(step + 1))
    return figures, digest(training)


def digest(training: Training) -> str:
    """SHA-256 of the parameters, the fp32 main parameters and Adam's moments of every rank, in order; collective."""
    own = hashlib.sha256()
    for chunk in training.chunks:
        for parameter in chunk.parameters():
            own.update(parameter.detach().float().numpy().tobytes())
    for part in training.optimizer.parts:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                for tensor in (parameter.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"]):
                    own.update(tensor.float().numpy().tobytes())
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own.hexdigest())
    return " ".join(parts)
