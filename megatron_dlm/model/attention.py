"""Normalisation and core attention that work with every layout and without a GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square normalisation with megatron's constructor.

    megatron's own torch norm refuses sequence parallelism. Here the weight says that it is used on a
    sequence shard, and megatron then sums its gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        # megatron's own way to say where; the CPU backend gives it the meaning "here".
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """``hidden`` [..., hidden_size] -> the same shape and dtype."""
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class CoreAttention(MegatronModule):
    """Scaled dot-product attention, bidirectional or causal, without a mask tensor.

    megatron's local attention materialises [seq, seq] scores for every head; this one calls torch's fused
    kernels. Rows that are shorter than the sequence (random length, padded batches) attend within their
    own length: ``attention_mask`` carries the lengths, as [batch] int64 on the CPU, so the
    other rows keep the fused kernel and no [seq, seq] mask exists.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.causal = attn_mask_type == AttnMaskType.causal
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale if softmax_scale is not None else config.softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> Tensor:
        """Attend.

        Args:
            query: [seq, batch, heads/TP, head_dim]; of some positions only, another number than seq or in another
                order, where attention is bidirectional.
            key: [seq, batch, groups/TP, head_dim].
            value: as ``key``.
            attention_mask: lengths [batch] int64 on the CPU; None where every row is full.

        Returns:
            As ``query``, [seq, batch, heads/TP * head_dim]; zero beyond a row's length.
        """
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [batch, heads, seq, head_dim]
        if attention_mask is None:
            output = self._attend(query, key, value)
        else:
            output = self._attend_within(query, key, value, attention_mask.tolist())
        return output.permute(2, 0, 1, 3).flatten(2)

    def _attend_within(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        """[batch, heads, seq, head_dim] with row i attending to its first ``lengths[i]`` positions only.

        No more than so many of its queries are computed: the others would be of padding.
        """
        seq = key.shape[2]
        # Full rows go through one fused call; the few that are shorter take one each, on a slice.
        full = [i for i, length in enumerate(lengths) if length == seq]
        output = torch.zeros_like(query)
        if full:
            output[full] = self._attend(query[full], key[full], value[full])
        for i, length in enumerate(lengths):
            if length < seq:
                row = (t[i : i + 1, :, :length] for t in (query, key, value))
                output[i : i + 1, :, :length] = self._attend(*row)
        return output

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Asked for only where it is needed: with enable_gqa torch may leave its fastest kernel.
        grouped = key.shape[1] != query.shape[1]
        dropout = self.dropout if self.training else 0.0
        if not dropout:
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=self.causal, scale=self.scale, enable_gqa=grouped
            )
        # Heads are split over the tensor-parallel ranks, so they draw from the stream that differs between
        # them. Under sequence parallelism the transformer block has already entered that stream.
        if self.config.sequence_parallel:
            return self._attend_with_dropout(query, key, value, dropout, grouped)
        with get_cuda_rng_tracker().fork():
            return self._attend_with_dropout(query, key, value, dropout, grouped)

    def _attend_with_dropout(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, grouped: bool) -> Tensor:
        if query.is_cuda:
            return F.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, is_causal=self.causal, scale=self.scale, enable_gqa=grouped
            )
        # torch's CPU kernel would draw from the host stream, which megatron does not track.
        # [batch, heads, seq, seq] exists here, which only dropout on a CPU needs.
        repeat = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(repeat, dim=1) for t in (key, value))
        scale = self.scale if self.scale is not None else query.shape[-1] ** -0.5
        # The softmax in fp32, as in the fused kernels.
        scores = (query @ key.transpose(-1, -2)).float() * scale
        if self.causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return F.dropout(scores.softmax(-1).to(value.dtype), dropout) @ value
