"""Contradictions of the configuration, found before any process is started (no megatron-core, no torch)."""

from __future__ import annotations

import math
import os
from dataclasses import fields, is_dataclass
from typing import Any

from megatron_dlm.config.tree import Config, DiffusionConfig
from megatron_dlm.errors import ConfigError

# One sequence's positions share a counter space of 2**22 in the random number generator.
MAX_SEQUENCE_LENGTH = 2**22 - 1
# Mask thresholds are 32-bit integers; eps keeps its share of them exact up to here.
MAX_EPS = 0.25
# The ELBO is an integral over all mask probabilities; a schedule may leave out so much of it at its ends.
MAX_LEFT_OUT = 0.01

_MAX_COUNT = 2**31 - 1
# A sample id and a position share the random number generator's counter.
_MAX_SAMPLES = 2**41
_MAX_PATH, _MAX_NAME = 4095, 255  # bytes, of Linux
_MAX_PROMPT = 100_000  # characters
# Smallest and largest value of every number, None excepted.
_RANGES: dict[str, tuple[float, float]] = {
    key: bounds
    for keys, bounds in {
        "run.seed": (0, 2**64 - 1),
        "run.timeout_minutes run.step_timeout_minutes": (0, 1e6),
        "model.num_layers": (1, 10_000),
        "model.hidden_size model.num_attention_heads model.num_query_groups model.head_dim model.ffn_hidden_size "
        "model.vocab_size_multiple parallel.tensor_model_parallel_size parallel.pipeline_model_parallel_size "
        "parallel.virtual_pipeline_model_parallel_size parallel.data_parallel_size": (1, 2**20),
        "data.sequence_length": (1, MAX_SEQUENCE_LENGTH),
        "data.unique_tokens": (1, 2**62),
        "kernels.chunk_rows train.steps train.micro_batch_size train.global_batch_size train.log_interval "
        "evaluate.interval evaluate.sequences evaluate.sample_tokens checkpoint.interval "
        "checkpoint.keep": (1, _MAX_COUNT),
        "train.max_skipped_steps optimizer.warmup_steps optimizer.decay_steps": (0, _MAX_COUNT),
        "train.epochs": (1e-9, 1e9),
        "model.norm_eps model.init_std optimizer.lr diffusion.eps": (1e-30, 1000.0),
        "model.rope_theta": (1e-3, 1e15),
        "diffusion.polynomial_exponent diffusion.sigma_min diffusion.sigma_max": (1e-30, 1e30),
        "optimizer.min_lr optimizer.weight_decay": (0, 1000.0),
        "optimizer.clip_grad": (0, 1e30),
        "diffusion.random_length_probability autoregressive.input_mask_ratio": (0, 1),
    }.items()
    for key in keys.split()
}
_BELOW_ONE = ("model.attention_dropout model.hidden_dropout diffusion.eps optimizer.beta1 optimizer.beta2").split()


def validate(config: Config, *, world_size: int | None = None, vocab_size: int | None = None) -> None:
    """Raise ``ConfigError`` (one line: cause and fix) for the first contradiction found.

    ``world_size`` is the number of processes, ``vocab_size`` the tokenizer's (with [MASK] and end-of-document);
    what depends on one that is None is not checked.
    """
    check_values(config)
    _check_layout(config, vocab_size)
    _check_batch(config, data_parallel_size(config, world_size))
    _check_data(config)
    check_diffusion(config.diffusion)
    _check_tasks(config)
    if config.rows_per_sequence == 2 and config.train.global_batch_size % 2:
        raise ConfigError(
            f"train.global_batch_size ({config.train.global_batch_size}) must be even with diffusion.complementary: "
            "true, which makes two rows of every sequence; change either"
        )
    if (config.train.steps is None) == (config.train.epochs is None):
        given = "neither is" if config.train.steps is None else "both are"
        raise ConfigError(f"give exactly one of train.steps and train.epochs ({given} set)")
    if config.optimizer.min_lr > config.optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr ({config.optimizer.min_lr:g}) is above optimizer.lr ({config.optimizer.lr:g}); lower it"
        )
    if config.train.steps is not None:
        check_schedule(config, config.train.steps)


def check_schedule(config: Config, steps: int) -> None:
    """Raise ``ConfigError`` if the learning-rate schedule does not fit in ``steps`` optimizer steps."""
    require_number("train.steps" if config.train.steps else "the number of steps", steps, 1, _MAX_COUNT)
    if steps * config.train.global_batch_size >= _MAX_SAMPLES:
        raise ConfigError(
            f"{steps} steps of train.global_batch_size {config.train.global_batch_size} are {_MAX_SAMPLES:,} sequences "
            "or more; lower either"
        )
    optimizer = config.optimizer
    decay = optimizer.decay_steps if optimizer.schedule == "wsd" else 0
    if optimizer.warmup_steps + decay > steps:
        parts = f"optimizer.warmup_steps ({optimizer.warmup_steps})"
        if decay:
            parts += f" + optimizer.decay_steps ({decay})"
        raise ConfigError(f"{parts} is more than the {steps} training steps; shorten the schedule or train longer")


def check_diffusion(diffusion: DiffusionConfig) -> None:
    """Raise ``ConfigError`` for a contradiction within the ``diffusion`` section."""
    if not 0 <= diffusion.eps < MAX_EPS:
        raise ConfigError(f"diffusion.eps is {diffusion.eps}; it must be at least 0 and below {MAX_EPS}")
    if diffusion.complementary and diffusion.masking != "exact_count":
        raise ConfigError(
            f"diffusion.complementary: true needs diffusion.masking exact_count, not {diffusion.masking}; change either"
        )
    if diffusion.schedule == "polynomial" and not 0.1 <= diffusion.polynomial_exponent <= 10:
        raise ConfigError(
            f"diffusion.polynomial_exponent is {diffusion.polynomial_exponent:g}; with less than 0.1 or more than 10 "
            "nearly all noise levels are at one end"
        )
    if diffusion.schedule == "geometric" and not 1e-8 <= diffusion.sigma_min < diffusion.sigma_max <= 1e3:
        raise ConfigError(
            f"diffusion.sigma_min ({diffusion.sigma_min:g}) and diffusion.sigma_max ({diffusion.sigma_max:g}) must be "
            "in ascending order between 1e-8 and 1000"
        )
    if (left_out := _left_out(diffusion)) > MAX_LEFT_OUT:
        keys = "sigma_min and sigma_max" if diffusion.schedule == "geometric" else "eps"
        raise ConfigError(
            f"diffusion.{keys} with the {diffusion.schedule} schedule and {diffusion.masking} masking leave out "
            f"{left_out:.0%} of the mask probabilities, of which the loss needs all; lower "
            f"{'sigma_min or raise sigma_max' if diffusion.schedule == 'geometric' else 'eps'}"
        )


def _left_out(diffusion: DiffusionConfig) -> float:
    """Share of the mask probabilities in (0, 1) that never occur."""
    at_ends = 0.0
    if diffusion.schedule == "geometric":
        at_ends = -math.expm1(-diffusion.sigma_min) + math.exp(-diffusion.sigma_max)
    elif diffusion.schedule == "cosine_mdlm":
        at_ends = diffusion.eps
    # Of linear masks eps leaves out as much, of the other schedules' about as much or less.
    return at_ends + (diffusion.eps if diffusion.masking == "bernoulli" else 0.0)


def data_parallel_size(config: Config, world_size: int | None) -> int | None:
    """Replicas of the model with ``world_size`` processes; None while that is unknown.

    Raises ``ConfigError`` where the processes cannot be divided as the configuration says.
    """
    parallel = config.parallel
    if world_size is None:
        return parallel.data_parallel_size
    shard = parallel.model_parallel_size
    layout = (
        f"tensor_model_parallel_size {parallel.tensor_model_parallel_size} x "
        f"pipeline_model_parallel_size {parallel.pipeline_model_parallel_size}"
    )
    if world_size % shard:
        raise ConfigError(f"{world_size} processes are no whole number of {layout}; use a multiple of {shard}")
    if parallel.data_parallel_size not in (None, world_size // shard):
        raise ConfigError(
            f"parallel.data_parallel_size {parallel.data_parallel_size} x {layout} needs "
            f"{parallel.data_parallel_size * shard} processes, not {world_size}; set it to null or start as many"
        )
    return world_size // shard


def _check_tasks(config: Config) -> None:
    tasks = config.evaluate.tasks
    if tasks and not config.data.valid:
        raise ConfigError(
            "evaluate.tasks are part of the held-out evaluation, so data.valid must name a corpus; add one"
        )
    for index, task in enumerate(tasks):
        if not task.path.strip():
            raise ConfigError(f"evaluate.tasks[{index}].path is empty; give the file of {task.name}, or its folder")
        for key, value in (("limit", task.limit), ("masks", task.masks)):
            if value is not None:
                require_number(f"evaluate.tasks[{index}].{key}", value, 1, _MAX_COUNT)
        if task.name in (other.name for other in tasks[:index]):
            raise ConfigError(f"evaluate.tasks names {task.name} twice; leave one out")


def _leaves(section: Any, prefix: str = "") -> dict[str, Any]:
    """The values of the tree by dotted key (lists and mappings are values)."""
    found: dict[str, Any] = {}
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            found.update(_leaves(value, f"{prefix}{item.name}."))
        else:
            found[prefix + item.name] = value
    return found


def check_values(config: Config) -> None:
    """Raise ``ConfigError`` for a number or a text that no run can have, or a model that cannot be."""
    _check_ranges(config)
    _check_texts(config)
    _check_model(config)


def require_number(key: str, value: float, low: float, high: float) -> None:
    """Raise ``ConfigError`` for the value of ``key`` outside [low, high]; NaN is."""
    if not low <= value <= high:
        raise ConfigError(f"{key} is {_short(value)}; it must be from {_short(low)} to {_short(high)}")


def _short(value: float) -> str:
    return "a number of more than 20 digits" if isinstance(value, int) and abs(value) >= 10**20 else str(value)


def _check_ranges(config: Config) -> None:
    values = {key: value for key, value in _leaves(config).items() if value is not None}
    for key, value in values.items():
        if key in _RANGES:
            require_number(key, value, *_RANGES[key])
        if key in _BELOW_ONE and not 0 <= value < 1:
            raise ConfigError(f"{key} is {value}; it must be at least 0 and below 1")


def _check_texts(config: Config) -> None:
    paths = {"run.directory": config.run.directory, "data.tokenizer": config.data.tokenizer}
    if config.checkpoint.initialize_from is not None:
        paths["checkpoint.initialize_from"] = config.checkpoint.initialize_from
    paths |= {f"data.train[{index}].path": source.path for index, source in enumerate(config.data.train)}
    paths |= {f"data.valid[{index}].path": source.path for index, source in enumerate(config.data.valid)}
    paths |= {f"evaluate.tasks[{index}].path": task.path for index, task in enumerate(config.evaluate.tasks)}
    for key, path in paths.items():
        encoded = _bytes(key, path)
        if len(encoded) > _MAX_PATH or max(map(len, encoded.split(b"/"))) > _MAX_NAME:
            raise ConfigError(
                f"{key} has {len(encoded):,} bytes; a path has at most {_MAX_PATH:,}, and {_MAX_NAME} between slashes"
            )
        if any(not character.isprintable() for character in path):
            raise ConfigError(f"{key} is {path!r}; give a path without control characters")
    for index, prompt in enumerate(config.evaluate.prompts):
        _bytes(f"evaluate.prompts[{index}]", prompt)
        if len(prompt) > _MAX_PROMPT:
            raise ConfigError(
                f"evaluate.prompts[{index}] has {len(prompt):,} characters; it must have at most {_MAX_PROMPT:,}"
            )
    if config.checkpoint.initialize_from is not None and not config.checkpoint.initialize_from.strip():
        raise ConfigError(
            "checkpoint.initialize_from is empty; name a checkpoint or a run directory, or set it to null"
        )
    if not config.run.directory.strip():
        raise ConfigError("run.directory is empty; name the directory that the run writes")


def _bytes(key: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{key} has a character that UTF-8 has not; leave it out") from None


def _divides(divisor: int, divisor_name: str, value: int, value_name: str) -> None:
    if value % divisor:
        raise ConfigError(f"{value_name} ({value}) must be a multiple of {divisor_name} ({divisor}); change either")


def _check_model(config: Config) -> None:
    model = config.model
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        raise ConfigError(
            f"model.hidden_size ({model.hidden_size}) is not a multiple of model.num_attention_heads "
            f"({model.num_attention_heads}); change either or set model.head_dim"
        )
    if model.resolved_head_dim % 2:
        raise ConfigError(
            f"the head dimension is {model.resolved_head_dim} but rotary positions need an even one; set model.head_dim"
        )
    _divides(
        model.resolved_query_groups, "model.num_query_groups", model.num_attention_heads, "model.num_attention_heads"
    )


def _check_layout(config: Config, vocab_size: int | None) -> None:
    model, parallel = config.model, config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    tensor_name = "parallel.tensor_model_parallel_size"
    _divides(tensor, tensor_name, model.num_attention_heads, "model.num_attention_heads")
    _divides(tensor, tensor_name, model.resolved_query_groups, "model.num_query_groups")
    _divides(tensor, tensor_name, model.ffn_hidden_size, "model.ffn_hidden_size")
    if vocab_size is not None and model.padded_vocab_size(vocab_size) % tensor:
        raise ConfigError(
            f"the vocabulary of {vocab_size}, padded to {model.padded_vocab_size(vocab_size)}, is not a multiple of "
            f"{tensor_name} ({tensor}); set model.vocab_size_multiple to a multiple of it"
        )
    if virtual == 1:
        raise ConfigError("parallel.virtual_pipeline_model_parallel_size 1 interleaves nothing; set it to null")
    if virtual is not None and pipeline == 1:
        raise ConfigError(
            "parallel.virtual_pipeline_model_parallel_size needs parallel.pipeline_model_parallel_size > 1; "
            "set it to null or use more stages"
        )
    chunks = pipeline * (virtual or 1)
    if model.num_layers % chunks:
        stages = f"{pipeline} pipeline stages" + (f" x {virtual} model chunks" if virtual else "")
        raise ConfigError(
            f"model.num_layers ({model.num_layers}) cannot be divided over {stages}; use a multiple of {chunks}"
        )
    if parallel.sequence_parallel:
        if tensor == 1:
            raise ConfigError(
                f"parallel.sequence_parallel needs {tensor_name} > 1; set it to false or use more tensor parallelism"
            )
        _divides(tensor, tensor_name, config.data.sequence_length, "data.sequence_length")


def _check_batch(config: Config, data_parallel: int | None) -> None:
    train, parallel = config.train, config.parallel
    # With the number of replicas unknown, one replica is the weakest demand.
    per_round = train.micro_batch_size * (data_parallel or 1)
    if train.global_batch_size % per_round:
        replicas = f" x {data_parallel} replicas" if data_parallel else ""
        raise ConfigError(
            f"train.global_batch_size ({train.global_batch_size}) is not a multiple of train.micro_batch_size "
            f"({train.micro_batch_size}){replicas}; use a multiple of {per_round}"
        )
    pipeline = parallel.pipeline_model_parallel_size
    micro_batches = train.global_batch_size // per_round
    if parallel.virtual_pipeline_model_parallel_size and data_parallel and micro_batches % pipeline:
        raise ConfigError(
            f"the interleaved schedule needs the number of micro-batches ({micro_batches} here) to be a multiple of "
            f"parallel.pipeline_model_parallel_size ({pipeline}); change train.global_batch_size"
        )


def _check_data(config: Config) -> None:
    data = config.data
    if not data.train:
        raise ConfigError("data.train is empty; give at least one {path: ...} that `megatron-dlm prepare` wrote")
    for name, sources in (("data.train", data.train), ("data.valid", data.valid)):
        for index, source in enumerate(sources):
            if not source.path.strip():
                raise ConfigError(f"{name}[{index}].path is empty; give the prefix that `megatron-dlm prepare` wrote")
            require_number(f"{name}[{index}].weight", source.weight, 1e-12, 1e12)
            if os.path.abspath(source.path) in (os.path.abspath(other.path) for other in sources[:index]):
                raise ConfigError(f"{name} names {source.path} twice; give it once, with a larger weight")
    if not data.tokenizer.strip():
        raise ConfigError("data.tokenizer is empty; give the tokenizer that the data was prepared with (or: byte)")
    if data.unique_tokens is not None and data.unique_tokens < data.sequence_length:
        raise ConfigError(
            f"data.unique_tokens ({data.unique_tokens}) is less than one sequence of data.sequence_length "
            f"({data.sequence_length}) tokens; raise it or set it to null"
        )
