"""Contradictions of the configuration, found before any process is started (no megatron-core, no torch)."""

from __future__ import annotations

import math
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

_POSITIVE = (
    "model.num_layers model.hidden_size model.num_attention_heads model.num_query_groups model.head_dim "
    "model.ffn_hidden_size model.norm_eps model.rope_theta model.init_std model.vocab_size_multiple "
    "diffusion.eps diffusion.polynomial_exponent diffusion.sigma_min diffusion.sigma_max "
    "parallel.tensor_model_parallel_size parallel.pipeline_model_parallel_size "
    "parallel.virtual_pipeline_model_parallel_size parallel.data_parallel_size kernels.chunk_rows "
    "data.sequence_length data.unique_tokens train.steps train.epochs train.micro_batch_size train.global_batch_size "
    "train.log_interval optimizer.lr evaluate.interval evaluate.sequences evaluate.sample_tokens checkpoint.interval "
    "checkpoint.keep"
).split()
_NOT_NEGATIVE = (
    "run.seed run.timeout_minutes run.step_timeout_minutes train.max_skipped_steps optimizer.min_lr "
    "optimizer.warmup_steps optimizer.decay_steps optimizer.weight_decay optimizer.clip_grad"
).split()
_AT_MOST_ONE = "diffusion.random_length_probability autoregressive.input_mask_ratio".split()
_BELOW_ONE = ("model.attention_dropout model.hidden_dropout diffusion.eps optimizer.beta1 optimizer.beta2").split()


def validate(config: Config, *, world_size: int | None = None, vocab_size: int | None = None) -> None:
    """Raise ``ConfigError`` (one line: cause and fix) for the first contradiction found.

    ``world_size`` is the number of processes, ``vocab_size`` the tokenizer's (with [MASK] and end-of-document);
    what depends on one that is None is not checked.
    """
    _check_ranges(config)
    _check_model(config)
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
            if value is not None and not 1 <= value < 2**31:
                raise ConfigError(f"evaluate.tasks[{index}].{key} is {value}; it must be at least 1 and below 2**31")
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


def _check_ranges(config: Config) -> None:
    values = {key: value for key, value in _leaves(config).items() if value is not None}
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key} is {value}; it must be a finite number")
        if key in _POSITIVE and value <= 0:
            raise ConfigError(f"{key} is {value}; it must be greater than 0")
        if key in _NOT_NEGATIVE and value < 0:
            raise ConfigError(f"{key} is {value}; it must not be negative")
        if key in _AT_MOST_ONE and not 0 <= value <= 1:
            raise ConfigError(f"{key} is {value}; it must be between 0 and 1")
        if key in _BELOW_ONE and not 0 <= value < 1:
            raise ConfigError(f"{key} is {value}; it must be at least 0 and below 1")
    if config.checkpoint.initialize_from is not None and not config.checkpoint.initialize_from.strip():
        raise ConfigError(
            "checkpoint.initialize_from is empty; name a checkpoint or a run directory, or set it to null"
        )
    if config.run.seed >= 2**64:
        raise ConfigError(f"run.seed is {config.run.seed}; it must be below 2**64")
    if not config.run.directory.strip():
        raise ConfigError("run.directory is empty; name the directory that the run writes")


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
            if not (math.isfinite(source.weight) and source.weight > 0):
                raise ConfigError(f"{name}[{index}].weight is {source.weight}; it must be a finite number above 0")
    if not data.tokenizer.strip():
        raise ConfigError("data.tokenizer is empty; give the tokenizer that the data was prepared with (or: byte)")
    if data.sequence_length > MAX_SEQUENCE_LENGTH:
        raise ConfigError(f"data.sequence_length is {data.sequence_length}; it must be at most {MAX_SEQUENCE_LENGTH}")
    if data.unique_tokens is not None and data.unique_tokens < data.sequence_length:
        raise ConfigError(
            f"data.unique_tokens ({data.unique_tokens}) is less than one sequence of data.sequence_length "
            f"({data.sequence_length}) tokens; raise it or set it to null"
        )
