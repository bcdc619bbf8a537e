"""Which samples a rank sees in which micro-batch, at any layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from dlm_kernels.philox import Purpose
from megatron_dlm.config.tree import Config
from megatron_dlm.data.dataset import Dataset
from megatron_dlm.diffusion.objective import Autoregressive, MaskedDiffusion
from megatron_dlm.model.pipeline import MicroBatch
from megatron_dlm.parallel.topology import Topology
from megatron_dlm.training.progress import Progress


class BatchStream:
    """Turns (step, rank) into micro-batches; pure functions, nothing to save.

    Samples of the global batch are dealt out by ``first_position``. Neighbours, whose noise levels are antithetic,
    share a rank, so that all ranks score the same number of tokens, half of theirs. With complementary masks sample 2j
    and 2j + 1 are sequence j of the data.
    """

    def __init__(
        self, config: Config, dataset: Dataset, objective: MaskedDiffusion | Autoregressive, topology: Topology
    ) -> None:
        self.dataset = dataset
        self.objective = objective
        self.topology = topology
        self.rows_per_sequence = config.rows_per_sequence
        self.micro_batch_size = config.train.micro_batch_size
        self.global_batch_size = config.train.global_batch_size
        self.num_microbatches = self.global_batch_size // (self.micro_batch_size * topology.data_size)

    def training(self, progress: Progress, *, reads_tokens: bool) -> Iterator[MicroBatch]:
        """This rank's micro-batches of the step behind ``progress``."""
        for index in range(self.num_microbatches):
            sample_ids = progress.consumed_samples + self._positions(index, self.num_microbatches)
            yield self._micro_batch(sample_ids, reads_tokens, progress.step, self.global_batch_size, Purpose.TRAIN)

    def validation_microbatches(self, num_sequences: int) -> int:
        """Micro-batches per rank that cover ``num_sequences``; a multiple of PP, as interleaving needs."""
        needed = -(-num_sequences // (self.micro_batch_size * self.topology.data_size))
        return -(-needed // self.topology.pipeline_size) * self.topology.pipeline_size

    def validation(self, num_sequences: int, *, reads_tokens: bool) -> Iterator[MicroBatch]:
        """This rank's share of the first ``num_sequences`` sequences, with their fixed noise.

        Places beyond the last sequence repeat it with weight zero and sample id -1.
        """
        count = self.validation_microbatches(num_sequences)
        for index in range(count):
            sample_ids = self._positions(index, count)
            inside = sample_ids < num_sequences
            micro_batch = self._micro_batch(
                np.minimum(sample_ids, num_sequences - 1), reads_tokens, 0, num_sequences, Purpose.VALIDATION
            )
            batch = micro_batch.batch
            if batch is not None and not inside.all():
                counted = torch.from_numpy(inside).to(batch.weights.device)[batch.sample_index]
                batch = replace(batch, weights=batch.weights * counted)
            yield micro_batch._replace(sample_ids=np.where(inside, sample_ids, -1), batch=batch)

    def _positions(self, index: int, count: int) -> np.ndarray:
        size, topology = self.micro_batch_size, self.topology
        start = first_position(index, count, topology.data_rank, topology.data_size, size)
        return np.arange(start, start + size, dtype=np.int64)

    def _micro_batch(
        self, sample_ids: np.ndarray, reads_tokens: bool, step: int, group_size: int, purpose: Purpose
    ) -> MicroBatch:
        if not reads_tokens:
            return MicroBatch(sample_ids, None, self.objective.lengths(sample_ids, purpose))
        sequences = sample_ids // self.rows_per_sequence if purpose is Purpose.TRAIN else sample_ids
        tokens = torch.from_numpy(self.dataset.sequences(sequences)).to(self.topology.device, non_blocking=True)
        batch = self.objective.batch(tokens, sample_ids, step=step, global_batch_size=group_size, purpose=purpose)
        return MicroBatch(sample_ids, batch.inputs, batch.lengths, batch)


def first_position(index: int, count: int, rank: int, ranks: int, size: int) -> int:
    """Where micro-batch ``index`` of ``count`` of a data-parallel rank begins in the global batch.

    Ranks take turns. With an odd ``size`` of a micro-batch a turn is two of them, so that samples 2j and 2j + 1 stay
    on one rank; where ``count`` is odd, the last one is a turn of its own.
    """
    turn = 2 if size % 2 and index < count - count % 2 else 1
    return (index // turn * turn * ranks + rank * turn + index % turn) * size
