"""Texts that a model writes while it is trained."""

from __future__ import annotations

from typing import NamedTuple

from megatron_dlm.config import Config, ConfigError
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.diffusion.sampler import SamplerOptions
from megatron_dlm.evaluation.generation import model_in_training
from megatron_dlm.training.setup import Training

_BLOCK_LENGTH = 32


class Sample(NamedTuple):
    """One text."""

    prompt: str
    text: str
    """What follows the prompt."""


def check_samples(config: Config, tokenizer: Tokenizer) -> None:
    """Raise ``ConfigError`` where ``evaluate.samples`` cannot be continued within a training sequence."""
    for prompt in config.evaluate.samples:
        needed = len(tokenizer.encode(prompt)) + config.evaluate.sample_tokens
        if needed > config.data.sequence_length:
            raise ConfigError(
                f"evaluate.samples: {prompt[:20]!r} and evaluate.sample_tokens ({config.evaluate.sample_tokens}) are "
                f"{needed} tokens, more than data.sequence_length ({config.data.sequence_length}); shorten either"
            )


def write_samples(training: Training) -> list[Sample]:
    """Continue every prompt of ``evaluate.samples`` by the model as it is; collective, equal on all ranks.

    The most probable tokens, in blocks of 32: the texts of different steps differ by what was learned in between.
    """
    config, tokenizer = training.config, training.tokenizer
    prompts, new = config.evaluate.samples, config.evaluate.sample_tokens
    if not prompts:
        return []
    model = model_in_training(training)
    options = SamplerOptions() if model.autoregressive else SamplerOptions(block_length=min(_BLOCK_LENGTH, new))
    samples = model.generate([tokenizer.encode(prompt) for prompt in prompts], options, max_new_tokens=new)
    texts = [tokenizer.decode(row) for row in samples.continuations]
    return [Sample(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
