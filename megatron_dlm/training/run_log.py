"""The story of a run for its reader: banner, one record per step, evaluations, summary."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dlm_kernels.implementation import resolve
from megatron_dlm.checkpoint.stored import CONFIG
from megatron_dlm.config.load import dump_yaml
from megatron_dlm.errors import TrainingError
from megatron_dlm.files import write_text
from megatron_dlm.flops import parameter_count, training_flops
from megatron_dlm.formatting import format_count, format_duration
from megatron_dlm.model.layer_spec import last_layer_takes_rows, uses_transformer_engine
from megatron_dlm.packages import versions
from megatron_dlm.run_folder import RunFolder
from megatron_dlm.training.progress import Progress
from megatron_dlm.training.reporter import Reporter
from megatron_dlm.training.saving import changed_since
from megatron_dlm.training.state import Training
from megatron_dlm.training.step import StepReport
from megatron_dlm.training.throughput import Throughput


class RunLog:
    """Collects what happens on all ranks and reports it on rank 0."""

    def __init__(self, training: Training, progress: Progress, *, resumed: Path | None) -> None:
        config, active = training.config, training.topology.rank == 0
        self._training = training
        self._first_step = first_step = progress.step
        self._started = time.perf_counter()
        self._evaluation: dict[str, Any] | None = None
        self._reporter = Reporter(config, active=active, steps=training.steps, first_step=first_step)
        for line in banner(training, resumed):
            self._reporter.say(line)
        if active:
            self._configuration(RunFolder(Path(config.run.directory)), resumed)
        self._throughput = Throughput(
            config,
            vocab_size=training.tokenizer.vocab_size,
            devices=training.topology.world_size,
            steps=training.steps,
            first_step=first_step,
            flops_before=self._reporter.flops_before,
        )

    def _configuration(self, folder: RunFolder, resumed: Path | None) -> None:
        """Write the configuration; keep and record what it replaces, where it is not that of the checkpoint."""
        config, step = self._training.config, self._first_step
        if resumed and (changes := changed_since(resumed, config)):
            write_text(folder.earlier_config(step), (resumed / CONFIG).read_text(encoding="utf-8"))
            self._reporter.configuration(step, changes)
        write_text(folder.config, dump_yaml(config))

    def note(self, line: str) -> None:
        """Print a line of the banner on rank 0."""
        self._reporter.say(line)

    def restart_clock(self) -> None:
        """Do not count what was done since the last step as training time."""
        self._throughput.restart()

    def step(self, progress: Progress, report: StepReport) -> None:
        """Record the step that led to ``progress``.

        Raises ``TrainingError`` after more skipped steps in a row than ``train.max_skipped_steps``.
        """
        config, dataset = self._training.config, self._training.train_stream.dataset
        done = progress.step
        samples = progress.consumed_samples
        tokens = samples * config.data.sequence_length
        sequences = samples // config.rows_per_sequence
        record = {
            "step": done,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            "consumed_samples": samples,
            "consumed_tokens": tokens,
            "epoch": dataset.epoch(sequences),
            "unique_tokens": min(sequences * config.data.sequence_length, dataset.unique_tokens),
            "accuracy": report.accuracy,
            "mask_ratio": report.scored_tokens / max(report.eligible_tokens, 1),
            **report.by_mask_ratio,
            "skipped": progress.skipped,
            **self._throughput.after_step(report.scored_tokens),
        }
        self._reporter.step(record, show=done % config.train.log_interval == 0 or done == self._training.steps)
        if progress.skipped_in_a_row > config.train.max_skipped_steps:
            raise TrainingError(
                f"{progress.skipped_in_a_row} steps in a row had a non-finite gradient (now at step {done}); lower "
                "optimizer.lr, or raise train.max_skipped_steps"
            )

    def evaluation(self, step: int, record: dict[str, Any] | None, samples: Sequence[tuple[str, str]]) -> None:
        """Record an evaluation after ``step`` steps: held-out figures, if any, and samples (prompt, what follows)."""
        if record is not None:
            self._evaluation = record
            self._reporter.evaluation(record)
        if samples:
            self._reporter.samples(step, samples)

    def close(self, progress: Progress, checkpoint: Path | None) -> None:
        """Close the files and print how the run ended and what to do next."""
        training, say, done = self._training, self._reporter.say, progress.step
        self._reporter.close()
        took = format_duration(time.perf_counter() - self._started)
        finished = done == training.steps
        if finished and done == self._first_step:
            say(f"finished   before, at step {done}; raise train.steps, or choose another run.directory")
        else:
            how = "finished  " if finished else "stopped   "
            say(f"{how} at step {done}/{training.steps} after {took} | skipped {progress.skipped}")
        if self._evaluation:
            nelbo, unigram = self._evaluation["valid_nelbo"], self._evaluation["valid_unigram"]
            name = training.config.model.kind.likelihood
            side = "below" if nelbo < unigram else "above"
            at = "" if self._evaluation["step"] == done else f" (at step {self._evaluation['step']})"
            say(
                f"held-out   {name} {nelbo:.4f} +- {self._evaluation['valid_nelbo_ci95']:.4f} nats/tok, "
                f"{abs(unigram - nelbo):.4f} {side} the unigram cross-entropy {unigram:.4f}{at}"
            )
        if checkpoint:
            say(f"checkpoint {checkpoint}")
        plot = f"megatron-dlm plot {training.config.run.directory}"
        say(f"next       {plot if finished else 'the same command continues the run'}")


def banner(training: Training, resumed: Path | None) -> list[str]:
    """What runs, where, and where its outputs go."""
    config, topology, stream = training.config, training.topology, training.train_stream
    dataset, seq, batch = stream.dataset, config.data.sequence_length, config.train.global_batch_size
    vocab = training.tokenizer.vocab_size
    padded = config.model.padded_vocab_size(vocab)
    rows = last_layer_takes_rows(config)
    flops = training_flops(
        config.model,
        tokens=1,
        head_rows=config.model.kind.scored_share,
        sequence_length=seq,
        vocab_size=vocab,
        last_layer_rows=rows,
    )
    gpu = topology.device.type == "cuda"
    device = torch.cuda.get_device_name() if gpu else "CPU"
    backend = "NCCL" if gpu else "gloo, megatron-core on the CPU backend"
    layers = "Transformer Engine" if uses_transformer_engine() else "megatron_dlm's own"
    layers += ", the last on scored tokens" if rows else ""
    lines = [
        "versions   "
        + " | ".join(" ".join(item) for item in versions(("megatron_dlm", "megatron-core", "torch")).items()),
        f"objective  {config.model.objective} | seed {config.run.seed} | {config.train.precision}",
        f"layout     {topology} on {topology.world_size} x {device} | {backend} | layers: {layers} | "
        f"kernels: {resolve(config.kernels.implementation, topology.device)}",
        f"model      {format_count(parameter_count(config.model, padded))} parameters | vocabulary {vocab} "
        f"(padded to {padded}) | {flops / 1e6:.4g} MFLOP/token",
        f"data       {format_count(dataset.num_tokens)} tokens, {format_count(dataset.unique_tokens)} unique in use | "
        f"{dataset.bytes_per_token:.2f} bytes/token",
        f"batch      {batch} x {seq} = {format_count(batch * seq)} tokens/step | "
        f"{stream.num_microbatches} x {stream.micro_batch_size} per rank",
        f"length     {training.steps} steps | {format_count(training.steps * batch * seq)} tokens | "
        f"{dataset.epoch(training.steps * batch // config.rows_per_sequence):.2f} epochs",
        f"outputs    {config.run.directory}/{{metrics.jsonl,tensorboard,checkpoints}}",
    ]
    if resumed:
        lines.append(f"resume     {resumed}")
    elif training.weights_from:
        lines.append(f"weights    from {training.weights_from}")
    return lines
