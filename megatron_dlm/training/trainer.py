"""The training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dlm_kernels.implementation import resolve
from megatron_dlm.checkpoint.collective import require_shared
from megatron_dlm.config.check import check_schedule, validate
from megatron_dlm.config.load import from_dict
from megatron_dlm.config.tree import Config, RunConfig
from megatron_dlm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dlm.errors import ConfigError
from megatron_dlm.launch import restart
from megatron_dlm.launch.stop_signal import StopSignal
from megatron_dlm.parallel import topology as parallel
from megatron_dlm.parallel.megatron_config import check_pass_through
from megatron_dlm.parallel.pulse import PULSE
from megatron_dlm.run_folder import STOPPED
from megatron_dlm.training import saving
from megatron_dlm.training.dry_batch import dry_batch
from megatron_dlm.training.evaluator import Ask, Evaluator
from megatron_dlm.training.initial_weights import check_initial_weights
from megatron_dlm.training.run_log import RunLog
from megatron_dlm.training.setup import build, open_data, total_steps
from megatron_dlm.training.state import Training
from megatron_dlm.training.step import train_step
from megatron_dlm.training.watchdog import Watchdog

_FOR_EVER = 60.0 * 24 * 365


def preflight(config: Config, *, world_size: int | None = None) -> Tokenizer:
    """Find every configuration and data error before workers start. Returns the run's tokenizer.

    Raises ``ConfigError`` or ``DataError`` with a one-line cause and fix.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    validate(config, world_size=world_size, vocab_size=tokenizer.vocab_size)
    check_pass_through(config)
    _check_kernels(config)
    train_data, _ = open_data(config, tokenizer)
    steps = total_steps(config, train_data)
    check_schedule(config, steps)
    if saving.resumable(config, tokenizer, train_data, steps=steps) is None:
        check_initial_weights(config, tokenizer)
    return tokenizer


def _check_kernels(config: Config) -> None:
    try:
        resolve(config.kernels.implementation, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except ValueError as error:
        raise ConfigError(f"kernels.implementation: {error}") from None


def run_worker(config_dict: dict[str, Any], ask: Ask | None = None) -> None:
    """Train on this rank; ``ask`` makes what the model is asked at evaluations.

    Raises ``SystemExit(75)`` when a signal stopped the run after it was saved.
    """
    config = from_dict(config_dict)
    topology = parallel.initialize(config.parallel, timeout_minutes=_collective_minutes(config.run))
    with Watchdog(config.run, topology.rank, topology.world_size):
        finished = train(build(config, topology), ask)
        with StopSignal():  # one that comes now is too late, and is of no consequence
            parallel.shutdown()
    if not finished:
        raise SystemExit(STOPPED)


def _collective_minutes(run: RunConfig) -> float:
    """How long a collective may wait: so long that the watchdog, which says more, is first."""
    limits = (run.timeout_minutes, run.step_timeout_minutes)
    return 1.1 * max(limits) + 1 if all(limits) else _FOR_EVER


def train(training: Training, ask: Ask | None = None) -> bool:
    """Train to the last step, or until a stop signal; collective. Returns whether the run is finished."""
    config = training.config
    require_shared(Path(config.run.directory))
    PULSE.begin("reading the checkpoint", 0)
    saved, progress = saving.resume(training)
    PULSE.begin("the dry batch", progress.step)
    log = RunLog(training, progress, resumed=saved)
    evaluate = Evaluator(training, ask and ask(training))
    if saved and (warning := restart.warn_of_slow_save(saving.seconds_taken(saved))):
        log.note(warning)
    stopped = False
    if progress.step < training.steps:
        log.note(dry_batch(training, progress))
    if saved and evaluate.is_due(progress.step):  # a stop may have come between the save and the evaluation
        PULSE.begin("evaluating", progress.step)
        log.evaluation(progress.step, *evaluate(progress.step))
    phase = "the first step"
    with StopSignal(announce=training.topology.rank == 0) as stop:
        while progress.step < training.steps and not stopped:
            PULSE.begin(phase, progress.step + 1)
            phase = "training"
            log.restart_clock()
            report = train_step(training, progress, stop_requested=stop.requested)
            progress = progress.after(config.train.global_batch_size, applied=report.applied)
            stopped, step, last = report.stop_requested, progress.step, progress.step == training.steps
            log.step(progress, report)
            if stopped or last or step % config.checkpoint.interval == 0:
                PULSE.begin("saving", step)
                saved = saving.save(training, progress)
            if (last or not stopped) and evaluate.is_due(step):
                PULSE.begin("evaluating", step)
                log.evaluation(step, *evaluate(step))
        PULSE.begin("the end", progress.step)
        log.close(progress, saved)
    return progress.step == training.steps
