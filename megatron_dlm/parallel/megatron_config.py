"""Our configuration tree in megatron-core's terms, with the validated pass-through mappings."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dlm.config.check import require_number
from megatron_dlm.config.tree import Config
from megatron_dlm.errors import ConfigError

T = TypeVar("T")

# What may be passed through, its type, and its smallest and largest value. A list of what is accepted, because
# megatron's configurations have hundreds of fields that need a feature which our model does not build: taken silently,
# they would leave a run that is not what its configuration says. Every entry is tested to have its effect.
_PASS_THROUGH: dict[type, dict[str, tuple[type, float, float]]] = {
    TransformerConfig: {
        "softmax_scale": (float, 1e-30, 1e30),
        "rotary_interleaved": (bool, 0, 1),
        "activation_func_clamp_value": (float, 1e-30, 1e30),
        "glu_linear_offset": (float, -1e30, 1e30),
    },
    DistributedDataParallelConfig: {"overlap_grad_reduce": (bool, 0, 1), "bucket_size": (int, 1, 2**40)},
    OptimizerConfig: {"adam_eps": (float, 1e-30, 1e3), "decoupled_lr": (float, 1e-30, 1e3)},
}


def _keep(weight: torch.Tensor) -> torch.Tensor:
    """An initialiser that does nothing: ``model.initialization`` fills the weights by name afterwards."""
    return weight


def check_pass_through(config: Config) -> None:
    """Build all three megatron configurations.

    Raises ``ConfigError`` for a field that our tree owns, that is not accepted, or whose value megatron refuses.
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
        embedding_init_method=_keep,
        init_method_std=model.init_std,
        # With interleaving, batched sends to the one peer of PP 2 are matched in the wrong order, silently.
        overlap_p2p_comm=bool(virtual),
        batch_p2p_comm=not virtual,
    )
    # The fused kernels need apex or Transformer Engine, which are not there on every machine.
    defaults = dict(
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
    )
    return _build(TransformerConfig, owned, defaults, model.transformer_config, "model.transformer_config")


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


def _build(kind: type[T], owned: dict[str, Any], defaults: dict[str, Any], extra: dict[str, Any], where: str) -> T:
    accepted = _PASS_THROUGH[kind]
    for name, value in extra.items():
        if name in owned:
            raise ConfigError(f"{where}.{name} is set by megatron_dlm's own keys; remove it from {where}")
        if name not in accepted:
            raise ConfigError(f"{where} takes no {name}; it takes: {', '.join(accepted)}")
        _check(value, f"{where}.{name}", *accepted[name])
    try:
        return kind(**{**defaults, **extra, **owned})
    except (AssertionError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"megatron-core refuses {where}: {reason}") from error


def _check(value: Any, name: str, expected: type, low: float, high: float) -> None:
    if expected is bool and not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; give true or false")
    if expected is not bool and (isinstance(value, bool) or not isinstance(value, (int, expected))):
        raise ConfigError(f"{name} is {value!r}; give {'a number' if expected is float else 'an integer'}")
    require_number(name, value, low, high)
