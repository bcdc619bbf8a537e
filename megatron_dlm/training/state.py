"""A run on this rank: its parts, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron.core.distributed import DistributedDataParallel

from megatron_dlm.config.tree import Config
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.parallel.topology import Topology
from megatron_dlm.training.batches import BatchStream
from megatron_dlm.training.optimizer import Optimizer


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


class Progress(NamedTuple):
    """How far a run has come."""

    step: int
    """Completed steps."""
    skipped: int
    """Those of them that were skipped, because their gradient was not finite."""
    skipped_in_a_row: int = 0
    """The last ones of them."""

    def after(self, *, applied: bool) -> Progress:
        """One step further."""
        return Progress(self.step + 1, self.skipped + (not applied), 0 if applied else self.skipped_in_a_row + 1)
