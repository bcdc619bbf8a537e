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
from megatron_dlm.model.layer_spec import block_submodules
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
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        """Build the chunk; its weights are not initialised (see ``model.initialization``).

        Args:
            vocab_size: ids that exist, [MASK] included; columns beyond it never receive probability.
            padded_vocab_size: rows of the embedding and the head, a multiple of the tensor-parallel size.
            kernels: how the loss is computed.
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
        self.decoder = TransformerBlock(
            config,
            block_submodules(config, causal=causal, vp_stage=vp_stage),
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
            rows: [n] int64, flat indices into [batch * seq] of the positions whose logits are wanted where there is no
                ``batch``; None: of all.

        Returns:
            Hidden states [seq/SP, batch, hidden] on all but the last stage. There ``TokenLosses`` of
            ``batch``, or the logits of this rank's columns: [n, padded_vocab/TP], or of all positions
            [seq, batch, padded_vocab/TP].
        """
        # Without an embedding the block takes what `set_input_tensor` was given.
        hidden = self.embedding(tokens, None) if self.pre_process else None
        # [seq/SP, batch, hidden], where rotary angles are wanted for the whole sequence.
        length = (self.decoder.input_tensor if hidden is None else hidden).shape[0]
        if self.config.sequence_parallel:
            length *= self.config.tensor_model_parallel_size
        # Not a mask: our core attention takes the lengths in its place.
        hidden = self.decoder(hidden, attention_mask=lengths, rotary_pos_emb=self.rotary_pos_emb(length))
        if not self.post_process:
            return hidden
        if batch is not None:
            return self._loss(hidden, batch)
        if rows is not None:
            return self._logits(hidden, rows, columns=length)
        return self.output_layer(hidden, weight=self.head_weight())[0]

    def head_weight(self) -> Tensor:
        """The LM head, [padded_vocab/TP, hidden]; the embedding itself where they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _logits(self, hidden: Tensor, rows: Tensor, columns: int) -> Tensor:
        """The head on some positions of [batch, columns] only."""
        if self.config.sequence_parallel:
            # The rows that are wanted may be on any rank; [seq, batch, hidden] is gathered first.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        rows = _sequence_first_rows(rows, hidden.shape[1], columns)
        return F.linear(hidden.flatten(0, 1)[rows], self.head_weight())

    def _loss(self, hidden: Tensor, batch: Batch) -> TokenLosses:
        """The head and the loss on the batch's rows only; full logits never exist."""
        size, seq = batch.inputs.shape
        rows, targets, weights = batch.rows, batch.targets, batch.weights
        if rows is None:  # every position: targets go to the order of the hidden states, [seq, batch]
            targets, weights = _to_sequence_first(targets, size), _to_sequence_first(weights, size)
        else:
            # Padding rows point behind the last position in either order.
            rows = torch.where(rows == size * seq, rows, _sequence_first_rows(rows, size, seq))
        head = self.head_weight()
        loss, cross_entropy, correct = linear_cross_entropy(
            hidden.flatten(0, 1),
            head,
            rows,
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
        return TokenLosses(loss, cross_entropy, correct)


def _sequence_first_rows(rows: Tensor, size: int, seq: int) -> Tensor:
    """Flat indices into [size * seq] -> those of the same positions in [seq * size]."""
    return rows % seq * size + rows // seq


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
                pre_process=topology.is_first_stage and stage == 0,
                post_process=topology.is_last_stage and stage == topology.virtual_size - 1,
                vp_stage=stage if topology.virtual_size > 1 else None,
            )
        )
    if initialize:
        initialize_weights(chunks, seed=config.run.seed, num_layers=model.num_layers, std=model.init_std)
    return chunks
