"""Chooses the modules of a transformer layer; the only place that knows about Transformer Engine."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dlm.config.tree import Config
from megatron_dlm.model.attention import CoreAttention, RMSNorm
from megatron_dlm.model.last_layer import LastLayer


def uses_transformer_engine() -> bool:
    """Transformer Engine's modules are taken where it is installed AND there is a GPU: it runs on nothing else."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def last_layer_takes_rows(config: Config) -> bool:
    """Whether the last layer leaves out what the head does not read; Transformer Engine's layers cannot."""
    return config.last_layer_rows and not uses_transformer_engine()


def block_submodules(
    config: TransformerConfig, *, causal: bool, vp_stage: int | None = None, last_layer_rows: bool = False
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage (of its chunk ``vp_stage``) and the final norm.

    With ``last_layer_rows`` the last of them is a ``LastLayer``, which takes a list of positions.

    Core attention is ours in both cases: it attends within a row's own length without a mask tensor.
    Norms have the same names in checkpoints in both cases, so that a GPU checkpoint loads on a CPU.
    """
    mask_type = AttnMaskType.causal if causal else AttnMaskType.no_mask
    if uses_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        final_norm = _transformer_engine_norm()
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
        _use_own_norms(spec.submodules, config.qk_layernorm)
        final_norm = RMSNorm
    # The mask's type goes to the constructor of core attention, which knows causal or not.
    attention = spec.submodules.self_attention
    attention.params = {**attention.params, "attn_mask_type": mask_type}
    attention.submodules.core_attention = CoreAttention
    # megatron builds each from the one description; which layers these are, it asks the pipeline rank.
    layers = [spec] * get_num_layers_to_build(config, vp_stage=vp_stage)
    if last_layer_rows:
        layers[-1] = copy.copy(spec)
        layers[-1].module = LastLayer
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm)


def _use_own_norms(layer: Any, qk_norm: bool) -> None:
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = RMSNorm if qk_norm else IdentityOp


def _transformer_engine_norm() -> Any:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
