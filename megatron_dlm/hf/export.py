"""A training checkpoint as a Hugging Face directory; one process, one tensor of the checkpoint in memory at a time.

Neither transformers nor megatron is imported: both need more memory than the work itself.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_dlm.checkpoint.stored import CONFIG, StoredCheckpoint, open_checkpoint
from megatron_dlm.checkpoint.whole_tensors import WeightsReader
from megatron_dlm.config.tree import Config, ModelConfig
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.errors import ConfigError
from megatron_dlm.files import json_text
from megatron_dlm.hf.model_card import model_card
from megatron_dlm.hf.tensor_map import Whole, weight_map
from megatron_dlm.output_folder import check_output, complete_folder
from megatron_dlm.packages import optional_module

DTypeName = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULT_SHARD_SIZE = 5_000_000_000
"""Bytes; what the Hugging Face hub recommends."""

_SHIPPED = ("configuration_dlm.py", "modeling_dlm.py", "sampler.py", "sampler_plan.py")
_WRITTEN = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|(generation_)?config\.json|README\.md|token.*"
    r"|special_tokens_map\.json|__pycache__|" + "|".join(map(re.escape, _SHIPPED))
)
# Passed-through fields of megatron's at their defaults; all others change what the model computes.
_NEUTRAL = {"rotary_interleaved": False, "glu_linear_offset": 0.0}
_ROOM = 100_000_000
"""Bytes that are asked for beside the weights', for the tokenizer and the small files."""


class Exported(NamedTuple):
    """What was written."""

    directory: Path
    architecture: str
    """Class name."""
    parameters: int
    """Without padding of the vocabulary; tied matrices count once."""
    files: list[str]
    """Names, sorted."""
    bytes: int
    """Of all files."""


class _Plan(NamedTuple):
    """What will be written; made without writing anything."""

    stored: StoredCheckpoint
    tokenizer: Tokenizer
    reader: WeightsReader
    wholes: list[Whole]
    dtype: DTypeName
    architecture: str
    shards: dict[str, str]
    """File of every tensor, by its name; in the order in which they are written."""

    @property
    def parameters(self) -> int:
        return sum(part.numel for whole in self.wholes for part in whole.parts)

    @property
    def weight_bytes(self) -> int:
        return self.parameters * DTYPES[self.dtype].itemsize


def export(
    checkpoint: Path,
    output: Path,
    *,
    dtype: DTypeName | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    progress: bool = False,
) -> Exported:
    """Write a directory that ``from_pretrained`` loads, from a checkpoint of any layout.

    A diffusion model brings its own code (``trust_remote_code=True``); an autoregressive one is a plain Qwen3 or Llama.
    In memory are at most one file of weights and the largest tensor as it is stored.

    Args:
        checkpoint: a checkpoint, or a run directory, whose ``latest`` is taken.
        output: folder that appears when it is complete; its parents are made if need be.
        dtype: of the weights; None: the run's precision. A bf16 run computes with bf16 values, and those are exported.
        max_shard_size: bytes of tensors in one file at most, except that a tensor is never divided.
        overwrite: replace an earlier export at ``output``.
        progress: show a bar on a terminal.

    Raises:
        ConfigError: it cannot be read, represented or written, one line. Nothing is left behind, and what was at
            ``output`` is untouched.
        DataError: the checkpoint's tokenizer cannot be read, or a package is missing; as above.
    """
    safetensors = optional_module("safetensors", "export")
    plan = _plan(checkpoint, dtype, max_shard_size)
    size = plan.weight_bytes + _ROOM
    check_output(output, overwrite=overwrite, replaceable=_replaceable(output), size=size)
    try:
        with complete_folder(output, overwrite=overwrite) as folder:
            # First, so that the files of weights can take the permissions of config.json.
            _write_small_files(plan, folder)
            _write_weights(plan, folder, progress)
            found = {path.name: path.stat().st_size for path in folder.iterdir()}
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot write {output}: {reason}; make room or choose another --output") from None
    return Exported(output, plan.architecture, plan.parameters, sorted(found), sum(found.values()))


def _plan(checkpoint: Path, dtype: DTypeName | None, max_shard_size: int) -> _Plan:
    """Raises ``ConfigError`` and ``DataError`` for all that is wrong with the checkpoint or the request."""
    if max_shard_size < 1:
        raise ConfigError(f"--max-shard-size is {max_shard_size}; give at least one byte")
    stored = open_checkpoint(checkpoint)
    _require_representable(stored)
    tokenizer = stored.open_tokenizer()
    reader = WeightsReader(stored.directory)
    wholes = weight_map(stored.config.model, tokenizer.vocab_size)
    _require_same_tensors(stored.directory, reader, wholes)
    dtype = dtype or stored.config.train.precision
    shards = _assign_shards(wholes, DTYPES[dtype].itemsize, max_shard_size)
    return _Plan(stored, tokenizer, reader, wholes, dtype, stored.config.model.architecture, shards)


def _require_representable(stored: StoredCheckpoint) -> None:
    for name, value in stored.config.model.transformer_config.items():
        if name not in _NEUTRAL or value != _NEUTRAL[name]:
            raise ConfigError(
                f"{stored.directory} was trained with model.transformer_config.{name} = {value}, which the Hugging "
                "Face layout cannot represent; export a model that was trained without it"
            )


def _require_same_tensors(directory: Path, reader: WeightsReader, wholes: Sequence[Whole]) -> None:
    """The checkpoint has the tensors of the map, of their shapes, and no others."""
    expected = {whole.key: whole.shape for whole in wholes}
    faults = [
        f"it {verb} {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
        for verb, keys in (
            ("lacks", [key for key in expected if key not in reader.tensors]),
            ("also has", [key for key in reader.tensors if key not in expected]),
        )
        if keys
    ]
    for key, info in reader.tensors.items():
        if not faults and info.shape != expected[key]:
            faults.append(f"{key} is {list(info.shape)} instead of {list(expected[key])}")
    if faults:
        raise ConfigError(
            f"{directory} does not hold the model of its {CONFIG}: {'; '.join(faults)}; give another checkpoint"
        )


def _replaceable(output: Path) -> Callable[[str], bool]:
    """Which files in ``output`` may be replaced: those of an export, if it is one."""
    complete = (output / "config.json").is_file()
    return lambda name: complete and _WRITTEN.fullmatch(name) is not None


def _assign_shards(wholes: Sequence[Whole], itemsize: int, limit: int) -> dict[str, str]:
    """The file of every tensor: in order, a new one wherever the next tensor would pass the limit."""
    numbers: dict[str, int] = {}
    number = filled = 0
    for part in (part for whole in wholes for part in whole.parts):
        size = part.numel * itemsize
        # A file is never empty: a tensor larger than the limit has one to itself.
        if filled and filled + size > limit:
            number, filled = number + 1, 0
        numbers[part.name] = number
        filled += size
    if number == 0:
        return dict.fromkeys(numbers, "model.safetensors")
    return {name: f"model-{n + 1:05d}-of-{number + 1:05d}.safetensors" for name, n in numbers.items()}


def _write_weights(plan: _Plan, folder: Path, progress: bool) -> None:
    """The safetensors files, and their index where there are several."""
    save_file = optional_module("safetensors.torch", "export").save_file
    # The tensors of one file are held until it is full; what they were cut from is given up before the next is read.
    pending: dict[str, Tensor] = {}
    current = next(iter(plan.shards.values()))
    with tqdm(
        desc="export",
        total=plan.weight_bytes,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=None if progress else True,
    ) as bar:

        def flush() -> None:
            save_file(pending, folder / current, metadata={"format": "pt"})
            shutil.copymode(folder / "config.json", folder / current)  # the library's are for their owner only
            bar.update(sum(tensor.nbytes for tensor in pending.values()))
            pending.clear()

        for whole in plan.wholes:
            if plan.shards[whole.parts[0].name] != current:  # before the next tensor is in memory too
                flush()
            tensor = plan.reader.read(whole.key, DTYPES[plan.dtype])
            for part in whole.parts:
                if plan.shards[part.name] != current:
                    if pending:
                        flush()
                    current = plan.shards[part.name]
                # One tensor of ours may end in two files: queries, keys and values are one here and three there.
                pending[part.name] = part.take(tensor)
            del tensor
        flush()
    if len(set(plan.shards.values())) > 1:
        index = {
            "metadata": {"total_parameters": plan.parameters, "total_size": plan.weight_bytes},
            "weight_map": dict(sorted(plan.shards.items())),
        }
        (folder / "model.safetensors.index.json").write_text(json_text(index), encoding="utf-8")


def _write_small_files(plan: _Plan, folder: Path) -> None:
    """All but the weights."""
    from megatron_dlm.hf.tokenizer import save_pretrained_tokenizer

    config = plan.stored.config
    diffusion = not config.model.kind.causal
    length = config.data.sequence_length
    save_pretrained_tokenizer(plan.tokenizer, folder, add_bos=not diffusion, max_length=length)
    if diffusion:
        for name in _SHIPPED:
            (folder / name).write_bytes(resources.files("megatron_dlm.shipped").joinpath(name).read_bytes())
    texts = {
        "config.json": json_text(model_config(config, plan.tokenizer, plan.dtype)),
        "generation_config.json": json_text(generation_config(config.model, plan.tokenizer)),
        "README.md": model_card(
            plan.stored, architecture=plan.architecture, parameters=plan.parameters, dtype=plan.dtype
        ),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def model_config(config: Config, tokenizer: Tokenizer, dtype: DTypeName) -> dict[str, Any]:
    """The content of config.json, with the names of old and of new readers."""
    model, end = config.model, tokenizer.end_of_document_id
    architecture = model.architecture
    dtype_name = str(DTYPES[dtype]).removeprefix("torch.")
    result: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": {"Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}.get(architecture, "megatron_dlm"),
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.resolved_query_groups,
        "head_dim": model.resolved_head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        # New readers take this, old ones the line above.
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tie_embeddings,
        "max_position_embeddings": config.data.sequence_length,
        "attention_bias": False,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_std,
        "eos_token_id": end,
        # Not for padding: transformers' embeddings learn nothing for that token. Generation and tokenizer do name it.
        "pad_token_id": None,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
        # The oldest that reads all of it; without one, transformers suspects the tokenizer of an old fault.
        "transformers_version": "5.0.0",
    }
    if not model.kind.causal:
        automatic = dict.fromkeys(
            ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM"), f"modeling_dlm.{architecture}"
        )
        result |= {
            "auto_map": {"AutoConfig": "configuration_dlm.DLMConfig", **automatic},
            "bos_token_id": None,
            "mask_token_id": tokenizer.mask_token_id,
            "qk_norm": model.qk_norm,
            "use_cache": False,
        }
    else:
        # Training sequences are shifted right behind an end-of-document, so that is what begins one.
        result |= {"bos_token_id": end, "use_cache": True}
        if architecture == "LlamaForCausalLM":
            result["mlp_bias"] = False
    return result


def generation_config(model: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of generation_config.json. The sampler's own defaults are left out, except for the best known."""
    end = tokenizer.end_of_document_id
    ends = {"eos_token_id": end, "pad_token_id": end}
    if not model.kind.causal:
        mask = {"mask_token_id": tokenizer.mask_token_id}
        return {**ends, **mask, "max_new_tokens": 128, "remasking": "low_confidence"}
    return {"bos_token_id": end, **ends, "do_sample": False, "suppress_tokens": [tokenizer.mask_token_id]}
