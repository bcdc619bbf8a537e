"""Our configuration tree in megatron-core's terms, with the validated pass-through mappings."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dlm.config import Config, ConfigError

T = TypeVar("T")

# Features of megatron's TransformerConfig that our transformer does not build. Accepted silently, they
# would leave a run that is not what its configuration says.
_NOT_BUILT = (
    "context_parallel expert_ cp_comm hybrid_context moe_ num_moe mtp_ multi_latent experimental_attention dsa_ "
    "linear_ mamba_ is_hybrid heterogeneous_ hetereogenous_ cuda_graph enable_cuda_graph external_cuda_graph "
    "inference_ use_inference fp16 position_embedding mrope window_ no_rope quant_recipe use_kitchen kitchen_ "
    "softmax_type log_max_attention qk_clip attention_output_gate fine_grained"
).split()


def _keep(weight: torch.Tensor) -> torch.Tensor:
    """An initialiser that does nothing: ``model.initialization`` fills the weights by name afterwards."""
    return weight


def check_pass_through(config: Config) -> None:
    """Build all three megatron configurations.

    Raises ``ConfigError`` for a field that megatron does not have, that our tree owns, that our model
    does not build, or whose value megatron refuses.
    """
    transformer_config(config)
    ddp_config(config)
    optimizer_config(config)


def transformer_config(config: Config) -> TransformerConfig:
    """megatron's model configuration. Raises ``ConfigError`` for a bad ``model.transformer_config``."""
    model, parallel, train = config.model, config.parallel, config.train
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    virtual = parallel.virtual_pipeline_model_parallel_size
    recompute = train.recompute == "full"
    owned: dict[str, Any] = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.resolved_query_groups,
        kv_channels=model.resolved_head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.qk_norm,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=train.precision == "bf16",
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        # One global normalisation: sums are divided by the global number of eligible tokens.
        calculate_per_token_loss=True,
        # True although the methods do nothing: it also marks the tensor-parallel parameters, without
        # which the gradient norm is wrong at TP > 1.
        perform_initialization=True,
        init_method=_keep,
        output_layer_init_method=_keep,
        init_method_std=model.init_std,
        # With interleaving, batched sends to the one peer of PP 2 are matched in the wrong order, silently.
        overlap_p2p_comm=bool(virtual),
        batch_p2p_comm=not virtual,
    )
    embedding_init = {"embedding_init_method": _keep} if _has_field(TransformerConfig, "embedding_init_method") else {}
    # Fused kernels need apex or Transformer Engine; a GPU run may switch them on by pass-through.
    defaults = dict(
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
    )
    return _build(
        TransformerConfig, {**owned, **embedding_init}, defaults, model.transformer_config, "model.transformer_config"
    )


def ddp_config(config: Config) -> DistributedDataParallelConfig:
    """megatron's data-parallel configuration. Raises ``ConfigError`` for a bad ``parallel.ddp_config``."""
    owned = dict(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_param_gather=False,
        # The training loop skips a non-finite step itself, on all ranks.
        check_for_nan_in_grad=False,
    )
    return _build(DistributedDataParallelConfig, owned, {}, config.parallel.ddp_config, "parallel.ddp_config")


def optimizer_config(config: Config) -> OptimizerConfig:
    """megatron's AdamW configuration. Raises ``ConfigError`` for a bad ``optimizer.optimizer_config``."""
    optimizer, bf16 = config.optimizer, config.train.precision == "bf16"
    owned = dict(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        clip_grad=optimizer.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=False,
    )
    return _build(OptimizerConfig, owned, {}, optimizer.optimizer_config, "optimizer.optimizer_config")


def _has_field(kind: type, name: str) -> bool:
    return any(f.name == name for f in fields(kind))  # type: ignore[arg-type]


def _build(kind: type[T], owned: dict[str, Any], defaults: dict[str, Any], extra: dict[str, Any], where: str) -> T:
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for name, value in extra.items():
        if name in owned:
            raise ConfigError(f"{where}.{name} is set by megatron_dlm's own keys; remove it from {where}")
        if name not in known:
            raise ConfigError(f"{where}.{name} is not a field of megatron-core's {kind.__name__}; remove or correct it")
        if kind is TransformerConfig and name.startswith(tuple(_NOT_BUILT)):
            raise ConfigError(f"{where}.{name} asks for a feature that this model does not build; remove it")
        _check_type(known[name], value, f"{where}.{name}")
    try:
        return kind(**{**defaults, **extra, **owned})
    except (AssertionError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"megatron-core refuses {where}: {reason}") from error


def _check_type(field: Any, value: Any, name: str) -> None:
    """Compare with the field's default, where it has one of a plain type."""
    default = None if field.default is MISSING else field.default
    if isinstance(default, bool):
        good, expected = isinstance(value, bool), "true or false"
    elif isinstance(default, (int, float)):
        good, expected = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    elif isinstance(default, str):
        good, expected = isinstance(value, str), "a string"
    else:
        return
    if not good:
        raise ConfigError(f"{name} is {value!r}; give {expected}")
