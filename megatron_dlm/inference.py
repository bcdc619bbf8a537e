"""One ``denoise(tokens) -> logits`` at any parallel layout, for sampling and evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm.model.transformer import DiffusionTransformer
from megatron_dlm.parallel.topology import Topology
from megatron_dlm.training.batches import MicroBatch
from megatron_dlm.training.step import run_pipeline


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
    def __call__(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits of every position; collective over the model-parallel ranks.

        Args:
            tokens: [batch, seq] int64; under sequence parallelism seq is a multiple of TP.
            lengths: [batch] int64 real tokens of each row (right padding is not attended); None for full rows.

        Returns:
            [batch, seq, vocab_size] fp32; beyond a row's length the values mean nothing.

        Raises:
            ValueError: a length is not from 1 to seq.
        """
        size, seq = tokens.shape
        if lengths is not None and not bool(((lengths >= 1) & (lengths <= seq)).all()):
            raise ValueError(f"lengths must be from 1 to {seq}, the length of tokens; got {lengths.tolist()}")
        for chunk in self.chunks:
            chunk.eval()
        # An interleaved schedule wants as many micro-batches as stages; the copies cost time, not correctness.
        copies = self.topology.pipeline_size if len(self.chunks) > 1 else 1
        lengths = None if lengths is None or bool((lengths == seq).all()) else lengths.cpu()
        micro_batch = MicroBatch(np.arange(size), tokens.to(self.topology.device), lengths, batch=None)
        outputs = run_pipeline(
            self.chunks,
            lambda reads_tokens: iter([micro_batch] * copies),
            lambda micro_batch, logits: logits,
            num_microbatches=copies,
            seq_length=seq,
            micro_batch_size=size,
            forward_only=True,
        )
        if self.topology.is_last_stage:
            logits = self._gather_columns(outputs[0])
        else:
            logits = torch.empty(size, seq, self.vocab_size, dtype=torch.float32, device=self.topology.device)
        if self.topology.pipeline_size > 1:
            group = self.topology.pipeline_group
            dist.broadcast(logits, dist.get_global_rank(group, self.topology.pipeline_size - 1), group=group)
        return logits

    def _gather_columns(self, local: Tensor) -> Tensor:
        """[seq, batch, columns/TP] -> [batch, seq, vocab_size] fp32."""
        local = local.float().transpose(0, 1).contiguous()
        if self.topology.tensor_size > 1:
            shards = [torch.empty_like(local) for _ in range(self.topology.tensor_size)]
            dist.all_gather(shards, local, group=self.topology.tensor_group)
            local = torch.cat(shards, dim=-1)
        return local[..., : self.vocab_size].contiguous()
