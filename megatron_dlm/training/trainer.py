"""The training loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from dlm_kernels.implementation import resolve
from megatron_dlm.config import Config, ConfigError
from megatron_dlm.config_loading import from_dict
from megatron_dlm.config_validation import check_schedule, validate
from megatron_dlm.data.tokenizer import load_tokenizer
from megatron_dlm.evaluation.held_out import held_out_nelbo, unigram_cross_entropy
from megatron_dlm.evaluation.samples import Sample, check_samples, write_samples
from megatron_dlm.evaluation.training_tasks import TrainingTasks, check_tasks
from megatron_dlm.parallel import topology as parallel
from megatron_dlm.parallel.megatron_config import check_pass_through
from megatron_dlm.training import checkpoint
from megatron_dlm.training.checkpoint import Progress
from megatron_dlm.training.dry_batch import dry_batch
from megatron_dlm.training.resilience import EXIT_REQUEUE, StopSignal
from megatron_dlm.training.run_log import RunLog
from megatron_dlm.training.setup import Training, build, open_data, total_steps
from megatron_dlm.training.step import train_step
from megatron_dlm.training.weights import check_initial_weights


def preflight(config: Config, *, world_size: int | None = None) -> None:
    """Find every configuration and data error before workers start.

    Raises ``ConfigError`` or ``DataError`` with a one-line cause and fix.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    validate(config, world_size=world_size, vocab_size=tokenizer.vocab_size)
    check_pass_through(config)
    _check_kernels(config)
    train_data, _ = open_data(config, tokenizer)
    steps = total_steps(config, train_data)
    check_schedule(config, steps)
    check_samples(config, tokenizer)
    check_tasks(config, tokenizer)
    if checkpoint.resumable(config, tokenizer, train_data, steps=steps) is None:
        check_initial_weights(config, tokenizer)


def _check_kernels(config: Config) -> None:
    try:
        resolve(config.kernels.implementation, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except ValueError as error:
        raise ConfigError(f"kernels.implementation: {error}") from None


def run_worker(config_dict: dict[str, Any]) -> None:
    """Train on this rank. Raises ``SystemExit(75)`` when a signal stopped the run after it was saved."""
    config = from_dict(config_dict)
    topology = parallel.initialize(config.parallel)
    finished = train(build(config, topology))
    parallel.shutdown()
    if not finished:
        raise SystemExit(EXIT_REQUEUE)


def train(training: Training) -> bool:
    """Train to the last step, or until a stop signal; collective. Returns whether the run is finished."""
    config = training.config
    saved = checkpoint.find(training)
    progress = checkpoint.load(training, saved) if saved else Progress(step=0, skipped=0)
    log = RunLog(training, progress, resumed=saved)
    evaluate = Evaluator(training)
    stopped = False
    if progress.step < training.steps:
        log.note(dry_batch(training, step=progress.step))
    if saved and evaluate.is_due(progress.step):  # a stop may have come between the save and the evaluation
        log.evaluation(progress.step, *evaluate(progress.step))
    with StopSignal(announce=training.topology.rank == 0) as stop:
        while progress.step < training.steps and not stopped:
            log.restart_clock()
            report = train_step(training, step=progress.step, stop_requested=stop.requested)
            progress, stopped = progress.after(applied=report.applied), report.stop_requested
            step, last = progress.step, progress.step == training.steps
            log.step(progress, report)
            if stopped or last or step % config.checkpoint.interval == 0:
                saved = checkpoint.save(training, progress)
            if (last or not stopped) and evaluate.is_due(step):
                log.evaluation(step, *evaluate(step))
    log.close(progress, saved)
    return progress.step == training.steps


class Evaluator:
    """Samples, tasks, and the held-out NELBO beside the unigram cross-entropy, which token frequencies alone reach."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._tasks = TrainingTasks(training)
        self._unigram: float | None = None

    def is_due(self, step: int) -> bool:
        """Every ``evaluate.interval`` steps and after the last one, where there is something to do."""
        training = self._training
        due = step % training.config.evaluate.interval == 0 or step == training.steps
        return due and (training.valid_stream is not None or bool(training.config.evaluate.samples))

    def __call__(self, step: int) -> tuple[dict[str, Any] | None, list[Sample]]:
        """The evaluation record after ``step`` steps, None without held-out data, and the samples; collective."""
        return self._held_out(step), write_samples(self._training)

    def _held_out(self, step: int) -> dict[str, Any] | None:
        training, count = self._training, self._training.valid_sequences
        if training.valid_stream is None:
            return None
        result = held_out_nelbo(training.chunks, training.valid_stream, training.topology, num_sequences=count)
        if self._unigram is None:
            counts = training.train_stream.dataset.unigram_counts(training.tokenizer.vocab_size)
            self._unigram = unigram_cross_entropy(counts, training.valid_stream.dataset.sequences(np.arange(count)))
        bits_per_byte = 1 / math.log(2) / training.valid_stream.dataset.bytes_per_token
        return {
            "step": step,
            "valid_nelbo": result.nelbo,
            "valid_nelbo_ci95": result.ci95,
            "valid_bits_per_byte": result.nelbo * bits_per_byte,
            "valid_bits_per_byte_ci95": result.ci95 * bits_per_byte,
            "valid_perplexity_bound": math.exp(min(result.nelbo, 700.0)),  # beyond that the number overflows
            "valid_unigram": self._unigram,
            "valid_sequences": result.sequences,
            **self._tasks(),
        }
