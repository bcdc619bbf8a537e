"""One ``denoise(tokens) -> logits`` at any parallel layout, for sampling and evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_dlm.checkpoint.model_weights import load_weights
from megatron_dlm.checkpoint.stored import StoredCheckpoint
from megatron_dlm.config.tree import ParallelConfig
from megatron_dlm.model.pipeline import MicroBatch, run_pipeline
from megatron_dlm.model.transformer import DiffusionTransformer, build_model
from megatron_dlm.parallel import topology as parallel
from megatron_dlm.parallel.topology import Topology


class Denoiser:
    """Calls a sharded model as if it were one function; every rank gets the whole result.

    Every rank of the layout must call it with the same tokens (data-parallel replicas may differ).
    """

    def __init__(self, chunks: list[Any], topology: Topology) -> None:
        self.chunks = chunks
        self.topology = topology
        last = chunks[-1]
        bare: DiffusionTransformer = getattr(last, "module", last)
        self.vocab_size = bare.vocab_size

    @torch.no_grad()
    def __call__(self, tokens: Tensor, lengths: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Logits of some positions, or of every one; collective over the model-parallel ranks.

        Args:
            tokens: [batch, seq] int64.
            lengths: [batch] int64 real tokens of each row (right padding is not attended); None for full rows.
            rows: [n] int64, flat indices into [batch * seq] of the positions that are wanted; the head is computed
                for no others. None: all.

        Returns:
            [n, vocab_size] fp32, or for all positions [batch, seq, vocab_size]; beyond a row's length the values
            mean nothing.

        Raises:
            ValueError: a length is not from 1 to seq.
        """
        size, seq = tokens.shape
        if lengths is not None and not bool(((lengths >= 1) & (lengths <= seq)).all()):
            raise ValueError(f"lengths must be from 1 to {seq}, the length of tokens; got {lengths.tolist()}")
        # A sample in the middle of training must not be drawn under dropout.
        for chunk in self.chunks:
            chunk.eval()
        lengths = None if lengths is None or bool((lengths == seq).all()) else lengths.cpu()
        tokens, rows = tokens.to(self.topology.device), None if rows is None else rows.to(self.topology.device)
        # Sequence parallelism divides the sequence; the columns that are added are padding.
        columns = -(-seq // self.topology.tensor_size) * self.topology.tensor_size
        if self.topology.sequence_parallel and columns > seq:
            lengths = torch.full((size,), seq) if lengths is None else lengths
            tokens = F.pad(tokens, (0, columns - seq))
            rows = None if rows is None else rows // seq * columns + rows % seq
        logits = self._run(MicroBatch(np.arange(size), tokens, lengths, rows=rows))
        return logits if rows is not None else logits[:, :seq]

    def _run(self, micro_batch: MicroBatch) -> Tensor:
        """The logits on every rank, [n, vocab_size], or [batch, seq, vocab_size] where no positions are given."""
        assert micro_batch.inputs is not None
        size, seq = micro_batch.inputs.shape
        # An interleaved schedule wants as many micro-batches as stages; the copies cost time, not correctness.
        copies = self.topology.pipeline_size if len(self.chunks) > 1 else 1
        outputs = run_pipeline(
            self.chunks,
            lambda reads_tokens: iter([micro_batch] * copies),
            lambda micro_batch, logits: logits,
            num_microbatches=copies,
            seq_length=seq,
            micro_batch_size=size,
            forward_only=True,
        )
        rows = micro_batch.rows
        if self.topology.is_last_stage:
            # [seq, batch, columns/TP] from the stages, where all positions were asked for; batch first for the caller.
            logits = self._gather_columns(outputs[0] if rows is not None else outputs[0].transpose(0, 1))
        else:
            shape = (size, seq) if rows is None else (len(rows),)
            # The other stages have no logits: they make room for what the last one sends.
            logits = torch.empty(*shape, self.vocab_size, dtype=torch.float32, device=self.topology.device)
        if self.topology.pipeline_size > 1:
            group = self.topology.pipeline_group
            dist.broadcast(logits, dist.get_global_rank(group, self.topology.pipeline_size - 1), group=group)
        return logits

    def _gather_columns(self, local: Tensor) -> Tensor:
        """[..., columns/TP] -> [..., vocab_size] fp32."""
        local = local.float().contiguous()
        if self.topology.tensor_size > 1:
            shards = [torch.empty_like(local) for _ in range(self.topology.tensor_size)]
            dist.all_gather(shards, local, group=self.topology.tensor_group)
            local = torch.cat(shards, dim=-1)
        return local[..., : self.vocab_size].contiguous()


def load_denoiser(stored: StoredCheckpoint, layout: ParallelConfig | None = None) -> Denoiser:
    """A checkpoint's model at ``layout`` (one process, if None), which may differ from the run's; collective.

    Raises ``ConfigError`` where the layout does not fit, ``TrainingError`` where the tensors cannot be read.
    """
    config = replace(stored.config, parallel=layout or ParallelConfig())
    topology = parallel.initialize(config.parallel)
    chunks = build_model(config, topology, vocab_size=stored.info["vocab_size"], initialize=False)
    load_weights(chunks, stored.directory)
    return Denoiser(chunks, topology)
