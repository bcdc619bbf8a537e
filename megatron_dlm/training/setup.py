"""Builds everything a run needs from its configuration."""

from __future__ import annotations

import math

from dlm_kernels.philox import Purpose
from megatron_dlm.config.tree import Config, SourceConfig
from megatron_dlm.data.dataset import Dataset
from megatron_dlm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dlm.diffusion.objective import build_objective
from megatron_dlm.errors import ConfigError
from megatron_dlm.model.transformer import build_model
from megatron_dlm.parallel.pulse import PULSE, VERIFYING
from megatron_dlm.parallel.topology import Topology
from megatron_dlm.training.batches import BatchStream
from megatron_dlm.training.dry_batch import refusing_out_of_memory
from megatron_dlm.training.initial_weights import load_initial_weights
from megatron_dlm.training.optimizer import Optimizer, wrap
from megatron_dlm.training.state import Training
from megatron_dlm.training.verification import verify_data


def build(config: Config, topology: Topology) -> Training:
    """Open the data, build and initialise the model, wrap it, and create its optimizer; collective.

    Raises ``ConfigError``, ``DataError`` or ``TrainingError`` with a one-line cause, such as too little memory.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    train_data, valid_data = open_data(config, tokenizer)
    PULSE.begin(VERIFYING, 0)
    verify_data(config, train_data, valid_data)
    PULSE.begin("building the model", 0)
    objective = build_objective(config, tokenizer.vocabulary)
    steps = total_steps(config, train_data)
    with refusing_out_of_memory(lambda: _less_model(config, topology)):
        bare = build_model(config, topology, vocab_size=tokenizer.vocab_size)
        initial = load_initial_weights(config, bare)
        chunks = wrap(bare, config)
        optimizer = Optimizer(config, chunks, steps=steps)
        if initial:
            optimizer.set_main_weights(initial.main)
    return Training(
        config=config,
        topology=topology,
        tokenizer=tokenizer,
        chunks=chunks,
        optimizer=optimizer,
        train_stream=BatchStream(config, train_data, objective, topology),
        valid_stream=BatchStream(config, valid_data, objective, topology) if valid_data else None,
        steps=steps,
        weights_from=initial.directory if initial else None,
    )


def _less_model(config: Config, topology: Topology) -> str:
    """One line: out of memory, and what would need less."""
    parallel = config.parallel
    return (
        f"out of memory while the model and its optimizer were built, at layout {topology}: raise "
        f"parallel.tensor_model_parallel_size (now {parallel.tensor_model_parallel_size}) or "
        f"parallel.pipeline_model_parallel_size (now {parallel.pipeline_model_parallel_size}), or take a smaller model"
    )


def open_data(config: Config, tokenizer: Tokenizer) -> tuple[Dataset, Dataset | None]:
    """The training and the validation data (None where the configuration names none).

    Raises ``ConfigError`` or ``DataError`` with a one-line cause.
    """
    if not config.data.train:
        raise ConfigError("data.train is empty; name at least one prefix written by `megatron-dlm prepare`")

    def open_sources(sources: list[SourceConfig], purpose: Purpose, unique_tokens: int | None) -> Dataset:
        return Dataset(
            sources,
            sequence_length=config.data.sequence_length,
            seed=config.run.seed,
            unique_tokens=unique_tokens,
            purpose=purpose,
            vocab_size=tokenizer.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint,
        )

    train = open_sources(config.data.train, Purpose.TRAIN, config.data.unique_tokens)
    valid = open_sources(config.data.valid, Purpose.VALIDATION, None) if config.data.valid else None
    return train, valid


def total_steps(config: Config, dataset: Dataset) -> int:
    """``train.steps``, or the steps that cover ``train.epochs`` passes over the unique tokens, at least one.

    A pass counts sequences: with complementary masks a global batch holds half as many as it has rows.
    """
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    rows = config.train.epochs * dataset.samples_per_epoch * config.rows_per_sequence
    return max(1, math.ceil(rows / config.train.global_batch_size))
