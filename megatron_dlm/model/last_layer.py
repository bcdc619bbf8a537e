"""The last layer on the positions that the head reads, and on no others."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class LastLayer(TransformerLayer):
    """A layer that can leave out what nobody reads: queries, output projection, norm and MLP of the other positions.

    Keys and values are computed for all of them. The modules are megatron's own, and so are their names and weights;
    only the fused matrix of queries, keys and values is used in two parts, outside of its module's forward.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As ``TransformerLayer.forward``, unless ``context_mask`` lists positions.

        It has no other use in a layer without cross-attention, and megatron's recomputation keeps it for each
        micro-batch. The list is [n] int64, n a multiple of the tensor-parallel size under sequence parallelism:
        distinct flat indices into [seq * batch], those of a sequence in any order, seq * batch in padding. The
        result is then [n, 1, hidden], under sequence parallelism this rank's [n / TP, 1, hidden]; padding holds
        something finite.
        """
        rows = kwargs.get("context_mask")
        if rows is None:
            return super().forward(*args, **kwargs)
        hidden = kwargs["hidden_states"]
        attended = self._attend(hidden, rows, kwargs["attention_mask"], kwargs["rotary_pos_emb"])
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            hidden = add(attended, self._residual(hidden, rows), self.hidden_dropout)
        return self._forward_mlp(hidden), None

    def _residual(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """``rows`` of the residual stream, laid out as the result."""
        local = hidden.flatten(0, 1)
        if not self.config.sequence_parallel:
            return local.index_select(0, rows.clamp(max=len(local) - 1)).unsqueeze(1)
        # Every rank puts in the rows of its own part of the sequence: the sum has one summand that is not zero.
        place = rows - len(local) * self.tp_group.rank()
        outside = (place < 0) | (place >= len(local))
        own = local.index_select(0, place.clamp(0, len(local) - 1)).masked_fill(outside[:, None], 0.0)
        return tensor_parallel.reduce_scatter_to_sequence_parallel_region(own.unsqueeze(1), group=self.tp_group)

    def _attend(
        self, hidden: Tensor, rows: Tensor, lengths: Tensor | None, rotary: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention of ``rows`` over all positions: (output, bias), laid out as the result."""
        attention, group = self.self_attention, self.tp_group
        normed = self.input_layernorm(hidden)
        if self.config.sequence_parallel:
            normed = tensor_parallel.gather_from_sequence_parallel_region(normed, group=group)
        else:
            normed = tensor_parallel.copy_to_tensor_model_parallel_region(normed, group=group)
        seq, batch, width = normed.shape
        groups, dim = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        # Rows of the matrix, for each group: its heads of queries, one of keys, one of values.
        weight = attention.linear_qkv.weight.view(groups, -1, width)
        query_weight, rest = weight.split([weight.shape[1] - 2 * dim, 2 * dim], dim=1)
        key, value = F.linear(normed, rest.flatten(0, 1)).view(seq, batch, groups, 2 * dim).split(dim, dim=-1)
        source = rows.clamp(max=seq * batch - 1)
        query = F.linear(normed.flatten(0, 1).index_select(0, source), query_weight.flatten(0, 1))
        query = query.view(len(rows), 1, -1, dim)
        if self.config.qk_layernorm:
            query, key = attention.q_layernorm(query), attention.k_layernorm(key)
        context_group = attention.pg_collection.cp
        query = apply_rotary_pos_emb(query, rotary[source // batch], self.config, cp_group=context_group)
        key = apply_rotary_pos_emb(key, rotary, self.config, cp_group=context_group)
        output = self._attend_by_sequence(query.flatten(1), rows, key, value, lengths)
        return attention.linear_proj(output.unsqueeze(1))

    def _attend_by_sequence(
        self, query: Tensor, rows: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None
    ) -> Tensor:
        """Core attention, [n, heads * head_dim] -> the same; sequences are padded to the most queries of any."""
        (seq, batch, _, dim), count = key.shape, len(rows)
        core = self.self_attention.core_attention
        if batch == 1:
            return core(query.view(count, 1, -1, dim), key, value, lengths).squeeze(1)
        chosen = rows % batch == torch.arange(batch, device=rows.device)[:, None]
        chosen &= rows < seq * batch
        number = chosen.cumsum(1)
        most = _most_queries(number[:, -1], limit=min(count, seq))
        place = (number - 1) * batch + torch.arange(batch, device=rows.device)[:, None]
        # Padding goes to one place more than there are.
        place = torch.where(chosen, place, 0).sum(0) + torch.where(chosen.any(0), 0, most * batch)
        padded = query.new_zeros(most * batch + 1, query.shape[1]).index_copy(0, place, query)[:-1]
        output = core(padded.view(most, batch, -1, dim), key, value, lengths)
        return output.flatten(0, 1).index_select(0, place.clamp(max=most * batch - 1))


def _most_queries(numbers: Tensor, limit: int) -> int:
    """The largest of ``numbers`` [batch], 1 at least; on a GPU, where the host would have to wait for it, the limit."""
    return limit if numbers.is_cuda else max(1, int(numbers.max()))
