"""What a config.json of Qwen3's or Llama's layout says, in our terms; what we cannot represent is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dlm.config.tree import ModelConfig
from megatron_dlm.errors import ConfigError
from megatron_dlm.files import read_json_object

OURS = "megatron_dlm"
"""``model_type`` of the diffusion models that megatron_dlm exports."""
_ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM", OURS: "DLMForMaskedDiffusion"}

# Fields that may have these values only, because our model has no parts for others.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
}
# Fields that the functions below read.
_READ = {
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "layer_types", "tie_word_embeddings", "initializer_range", "attention_dropout",
    "max_position_embeddings",
}  # fmt: skip
# Fields that change nothing in the logits of a complete sequence: names and versions, storage, which outputs are
# returned, defaults of text generation and of classifiers. Token ids are the tokenizer's matter. The window is that of
# use_sliding_window.
_HARMLESS = {
    "transformers_version", "transformers.js_config", "_name_or_path", "name_or_path", "tokenizer_class", "dtype",
    "torch_dtype", "use_cache", "return_dict", "output_hidden_states", "output_attentions", "torchscript", "is_decoder",
    "is_llama_config", "unsloth_version", "unsloth_fixed", "_attn_implementation", "_attn_implementation_autoset",
    "attn_implementation", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id",
    "unk_token_id", "mask_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id",
    "id2label", "label2id", "problem_type", "task_specific_params", "finetuning_task", "max_length", "min_length",
    "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k",
    "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "suppress_tokens",
    "begin_suppress_tokens", "exponential_decay_length_penalty", "remove_invalid_values",
}  # fmt: skip
_OF_QWEN = {"sliding_window", "max_window_layers"}
_OF_OURS = {"auto_map", "qk_norm"}


class SourceModel(NamedTuple):
    """A model of the Hugging Face layout."""

    model_type: str
    model: ModelConfig
    """With the default objective, which config.json does not tell; tied as far as config.json tells."""
    rows: int
    """Of its embedding."""
    may_be_tied: bool
    """config.json does not say whether the head is the embedding; it is where the weights have no head."""
    max_positions: int
    """Longest sequence it was made for (tokens)."""
    mask_token_id: int | None
    """Of our own exports."""


def read_source_config(directory: Path) -> SourceModel:
    """Read ``directory``/config.json, of any version of transformers.

    A field that is not known to be harmless, and is not switched off, is refused: it may change what the model
    computes, which nothing would show later.

    Raises:
        ConfigError: there is none, or it says what we cannot represent; one line with the field and its value.
    """
    path = directory / "config.json"
    config = read_json_object(path, "give the folder of a complete model")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        raise ConfigError(f"{path}: model_type is {model_type!r}; can be imported: {', '.join(_ARCHITECTURES)}")
    _check(config, model_type, path)
    qwen = model_type != "llama"

    def integer(name: str, *, absent: int | None = None, null: int | None = None) -> int:
        value = config.get(name, absent)
        value = null if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{path}: {name} is {value!r}; it must be a whole number above 0")
        return value

    def number(name: str, absent: float) -> float:
        value = config.get(name, absent)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{path}: {name} is {value!r}; it must be a number")
        return float(value)

    tied = config.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        raise ConfigError(f"{path}: tie_word_embeddings is {tied!r}; it must be true or false")
    # For absent fields, what transformers takes.
    hidden, heads = integer("hidden_size"), integer("num_attention_heads")
    model = ModelConfig(
        num_layers=integer("num_hidden_layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=integer("num_key_value_heads", absent=32 if qwen else heads, null=heads),
        head_dim=integer("head_dim", absent=128 if qwen else hidden // heads, null=hidden // heads),
        ffn_hidden_size=integer("intermediate_size"),
        qk_norm=_qk_norm(config, path) if model_type == OURS else qwen,
        norm_eps=number("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(config, path),
        init_std=number("initializer_range", 0.02),
        tie_embeddings=bool(tied),
        attention_dropout=number("attention_dropout", 0.0),
    )
    return SourceModel(
        model_type=model_type,
        model=model,
        rows=integer("vocab_size"),
        may_be_tied=tied is None,
        max_positions=integer("max_position_embeddings", absent=32768 if qwen else 2048),
        mask_token_id=_mask_token_id(config, path) if model_type == OURS else None,
    )


def _check(config: Mapping[str, Any], model_type: str, path: Path) -> None:
    """Refuse what our model does not have."""
    architectures = config.get("architectures") or [_ARCHITECTURES[model_type]]
    if architectures != [_ARCHITECTURES[model_type]]:
        raise ConfigError(
            f"{path}: architectures is {architectures}; only {_ARCHITECTURES[model_type]} can be imported"
        )
    for name, accepted in _ONLY.items():
        if name in config and config[name] not in accepted:
            raise _refused(path, name, config[name], f"can be {json.dumps(accepted[0])} only")
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}:
        raise _refused(path, "layer_types", layer_types, "can be 'full_attention' only")
    known = _READ | _HARMLESS | set(_ONLY)
    known |= (_OF_QWEN if model_type != "llama" else set()) | (_OF_OURS if model_type == OURS else set())
    for name, value in config.items():
        if name not in known and value not in (None, False, "", [], {}):
            raise _refused(path, name, value, "is not known; remove it if the model computes the same without it")


def _refused(path: Path, name: str, value: Any, why: str) -> ConfigError:
    shown = json.dumps(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return ConfigError(f"{path}: {name} is {shown}, which cannot be represented: {name} {why}")


def _qk_norm(config: Mapping[str, Any], path: Path) -> bool:
    if not isinstance(value := config.get("qk_norm"), bool):
        raise ConfigError(f"{path}: qk_norm is {value!r}; it must be true or false")
    return value


def _mask_token_id(config: Mapping[str, Any], path: Path) -> int:
    value = config.get("mask_token_id")
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{path}: mask_token_id is {value!r}; it must be the id of [MASK]")
    return value


def _rope_theta(config: Mapping[str, Any], path: Path) -> float:
    """The base of the rotary positions: a field of its own, or (from transformers 5 on) in ``rope_parameters``."""
    found = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name) or {}
        plain = (
            isinstance(rope, dict)
            and (rope.get("rope_type", "default"), rope.get("type", "default")) == ("default", "default")
            and rope.get("partial_rotary_factor", 1) == 1
            and not set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        )
        if not plain:
            raise _refused(path, name, rope, "can be of the default type only, which scales nothing")
        if "rope_theta" in rope:
            found[f"{name}.rope_theta"] = rope["rope_theta"]
    for name, value in found.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{path}: {name} is {value!r}; it must be a number")
    if len(set(found.values())) > 1:
        shown = " but ".join(f"{name} is {value}" for name, value in found.items())
        raise ConfigError(f"{path}: {shown}; readers of it disagree, so make them equal")
    return float(next(iter(found.values()), 10000.0))
