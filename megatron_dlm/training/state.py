"""A run on this rank: its parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel

from megatron_dlm.config.tree import Config
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.parallel.topology import Topology
from megatron_dlm.training.batches import BatchStream
from megatron_dlm.training.optimizer import Optimizer
from megatron_dlm.training.progress import Progress


@dataclass
class Training:
    """The parts of a run on this rank."""

    config: Config
    topology: Topology
    tokenizer: Tokenizer
    chunks: list[DistributedDataParallel]
    optimizer: Optimizer
    train_stream: BatchStream
    valid_stream: BatchStream | None
    steps: int
    weights_from: Path | None = None
    """The checkpoint whose weights the run began with, where it begins now and not with random ones."""

    @property
    def valid_sequences(self) -> int:
        """Sequences per evaluation: as configured, at most what the validation data has."""
        if self.valid_stream is None:
            return 0
        return min(self.config.evaluate.sequences, self.valid_stream.dataset.samples_per_epoch)

    def progress_at(self, step: int) -> Progress:
        """How far the run is after ``step`` steps of which none was skipped."""
        return Progress(step=step, consumed_samples=step * self.train_stream.global_batch_size)
