"""The denoiser: noised tokens in, weighted loss or logits out."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dlm_kernels import linear_cross_entropy
from megatron_dlm.config.tree import Config, KernelsConfig
from megatron_dlm.diffusion.objective import Batch
from megatron_dlm.model.initialization import initialize_weights
from megatron_dlm.model.layer_spec import block_submodules, last_layer_takes_rows
from megatron_dlm.parallel.megatron_config import transformer_config
from megatron_dlm.parallel.topology import Topology


class TokenLosses(NamedTuple):
    """What the last stage returns for a batch; rows are in the order of ``Batch.targets``."""

    loss_sum: Tensor
    """Weighted sum of the cross-entropies, [] fp32, differentiable (nats)."""
    cross_entropy: Tensor
    """Cross-entropy of every row, [rows], detached (nats)."""
    correct: Tensor
    """Whether the target has the largest logit, [rows] bool."""


class DiffusionTransformer(LanguageModule):
    """One pipeline chunk of a pre-norm transformer with RMSNorm, RoPE, SwiGLU and grouped-query attention.

    Bidirectional for masked diffusion, causal for the autoregressive arm; nothing else differs. The
    noise level is not an input: a masked denoiser can count its masks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vocab_size: int,
        padded_vocab_size: int,
        rope_theta: float,
        causal: bool,
        tie_embeddings: bool,
        kernels: KernelsConfig,
        last_layer_rows: bool = False,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        """Build the chunk; its weights are not initialised (see ``model.initialization``).

        Args:
            vocab_size: ids that exist, [MASK] included; columns beyond it never receive probability.
            padded_vocab_size: rows of the embedding and the head, a multiple of the tensor-parallel size.
            kernels: how the loss is computed.
            last_layer_rows: whether the last layer may leave out the positions that the head does not read.
            pre_process: whether this chunk embeds the tokens (first stage).
            post_process: whether this chunk holds the final norm and the head (last stage).
            vp_stage: the chunk's number under an interleaved schedule.
        """
        # The attributes' names are megatron's: it looks them up to tie embeddings, build layers, send activations.
        super().__init__(config=config)
        self.vocab_size = vocab_size
        self.kernels = kernels
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.share_embeddings_and_output_weights = tie_embeddings
        self.model_type = ModelType.encoder_or_decoder
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config, padded_vocab_size, max_sequence_length=0, position_embedding_type="rope"
            )
        # Every stage computes the angles of all positions; nothing is sent for it.
        self.rotary_pos_emb = RotaryEmbedding(
            config.kv_channels,
            rotary_percent=1.0,
            rotary_interleaved=config.rotary_interleaved,
            rotary_base=rope_theta,
            cp_group=self.pg_collection.cp,
        )
        self.last_layer_rows = post_process and last_layer_rows
        self.decoder = TransformerBlock(
            config,
            block_submodules(config, causal=causal, vp_stage=vp_stage, last_layer_rows=self.last_layer_rows),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                padded_vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                # Tied on one stage: the embedding is the head. Over several stages the last has a copy of its own.
                skip_weight_param_allocation=pre_process and tie_embeddings,
            )
        # Copies at both ends start equal and have their gradients summed.
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor) -> None:
        """Called by the pipeline schedule with the previous stage's output, [seq/SP, batch, hidden]."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        tokens: Tensor | None,
        lengths: Tensor | None = None,
        batch: Batch | None = None,
        rows: Tensor | None = None,
    ) -> Tensor | TokenLosses:
        """Run this chunk.

        Args:
            tokens: [batch, seq] int64, the noised tokens xt; needed on the first stage only.
            lengths: [batch] int64 on the CPU, or None where every row is full; needed on every stage.
            batch: targets and weights, for a loss; needed on the last stage only.
            rows: [n] int64, distinct flat indices into [batch * seq] of the positions whose logits are wanted where
                there is no ``batch``, ascending; None: of all.

        Returns:
            Hidden states [seq/SP, batch, hidden] on all but the last stage. There ``TokenLosses`` of
            ``batch``, or the logits of this rank's columns: [n, padded_vocab/TP], or of all positions
            [seq, batch, padded_vocab/TP].
        """
        # Without an embedding the block takes what `set_input_tensor` was given.
        hidden = self.embedding(tokens, None) if self.pre_process else None
        # [seq/SP, batch, hidden], where rotary angles are wanted for the whole sequence.
        length, size = (self.decoder.input_tensor if hidden is None else hidden).shape[:2]
        if self.config.sequence_parallel:
            length *= self.config.tensor_model_parallel_size
        read = rows if batch is None else batch.rows
        if read is not None:
            read = _sequence_first_rows(read, size, length)
        hidden = self.decoder(
            hidden,
            attention_mask=lengths,  # not a mask: our core attention takes the lengths in its place
            context_mask=self._last_layer_positions(read, size * length),
            rotary_pos_emb=self.rotary_pos_emb(length),
        )
        if not self.post_process:
            return hidden
        if batch is not None:
            return self._loss(hidden, batch, read)
        if read is not None:
            return self._logits(hidden, read)
        return self.output_layer(hidden, weight=self.head_weight())[0]

    def head_weight(self) -> Tensor:
        """The LM head, [padded_vocab/TP, hidden]; the embedding itself where they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _last_layer_positions(self, read: Tensor | None, total: int) -> Tensor | None:
        """What a ``LastLayer`` takes: ``read`` with padding, which has the value ``total``; None: all positions."""
        if read is None or not self.last_layer_rows:
            return None
        # One at least, so that a micro-batch without masks has a gradient too, of zero.
        multiple = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return F.pad(read, (0, -len(read) % multiple if len(read) else multiple), value=total)

    def _logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """The head on ``rows`` of the hidden states only, or on those that the last layer has left."""
        if self.config.sequence_parallel:
            # The rows that are wanted may be on any rank; [seq, batch, hidden] is gathered first.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        hidden = hidden.flatten(0, 1)
        return F.linear(hidden[: len(rows)] if self.last_layer_rows else hidden[rows], self.head_weight())

    def _loss(self, hidden: Tensor, batch: Batch, rows: Tensor | None) -> TokenLosses:
        """The head and the loss on ``rows`` of the hidden states only; full logits never exist."""
        size, seq = batch.inputs.shape
        targets, weights, count = batch.targets, batch.weights, len(batch.targets)
        if rows is None:  # every position: targets go to the order of the hidden states, [seq, batch]
            targets, weights = _to_sequence_first(targets, size), _to_sequence_first(weights, size)
        elif self.last_layer_rows:  # the hidden states are those of the rows, with padding at the end
            ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
            padding = (0, hidden.shape[0] * ranks - count)
            targets, weights = F.pad(targets, padding), F.pad(weights, padding)
        head = self.head_weight()
        loss, cross_entropy, correct = linear_cross_entropy(
            hidden.flatten(0, 1),
            head,
            None if self.last_layer_rows else rows,
            targets,
            weights,
            vocab_size=self.vocab_size,
            group=self.tp_group if self.config.tensor_model_parallel_size > 1 else None,
            sequence_parallel=self.config.sequence_parallel,
            chunk_size=self.kernels.chunk_rows,
            fp32_logits=self.kernels.fp32_logits,
            # The data-parallel wrapper's fp32 buffer: saves a copy of the head's gradient, and its rounding to bf16.
            accumulate_into_main_grad=hasattr(head, "main_grad"),
            impl=self.kernels.implementation,
        )
        # And back: what is returned lies as the batch's targets do.
        if rows is None:
            cross_entropy, correct = _to_sequence_first(cross_entropy, seq), _to_sequence_first(correct, seq)
        return TokenLosses(loss, cross_entropy[:count], correct[:count])


def _sequence_first_rows(rows: Tensor, size: int, seq: int) -> Tensor:
    """Flat indices into [size * seq] -> those of the same positions in [seq * size]; size * seq, padding, stays."""
    return torch.where(rows == size * seq, rows, rows % seq * size + rows // seq)


def _to_sequence_first(values: Tensor, outer: int) -> Tensor:
    """[outer * inner] -> the same values in transposed order, [inner * outer]."""
    return values.view(outer, -1).t().flatten()


def build_model(
    config: Config, topology: Topology, *, vocab_size: int, initialize: bool = True
) -> list[DiffusionTransformer]:
    """This rank's chunks (one, or one per virtual stage) on the topology's device.

    The weights are initialised, unless ``initialize`` is false because they will be loaded. Raises
    ``ConfigError`` for a pass-through mapping that megatron refuses.
    """
    megatron_config = transformer_config(config)
    model, chunks = config.model, []
    topology.seed_dropout(config.run.seed, 0)  # megatron's constructors enter the random streams, which must exist
    for stage in range(topology.virtual_size):
        chunks.append(
            DiffusionTransformer(
                megatron_config,
                vocab_size=vocab_size,
                padded_vocab_size=model.padded_vocab_size(vocab_size),
                rope_theta=model.rope_theta,
                causal=model.kind.causal,
                tie_embeddings=model.tie_embeddings,
                kernels=config.kernels,
                last_layer_rows=last_layer_takes_rows(config),
                pre_process=topology.is_first_stage and stage == 0,
                post_process=topology.is_last_stage and stage == topology.virtual_size - 1,
                vp_stage=stage if topology.virtual_size > 1 else None,
            )
        )
    if initialize:
        initialize_weights(chunks, seed=config.run.seed, num_layers=model.num_layers, std=model.init_std)
    return chunks
