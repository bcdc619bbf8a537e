"""The evaluations of a run: when, and what their record has."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from megatron_dlm.checkpoint.collective import on_rank_zero
from megatron_dlm.config.tree import SourceConfig
from megatron_dlm.data.dataset import Dataset
from megatron_dlm.training.held_out import held_out_nelbo, unigram_cross_entropy
from megatron_dlm.training.saving import describe_sources
from megatron_dlm.training.state import Training


class Sample(NamedTuple):
    """One text that the model has written."""

    prompt: str
    text: str
    """What follows the prompt."""


class Questions(Protocol):
    """What a model is asked at an evaluation beside its held-out loss; the methods are collective."""

    def figures(self) -> dict[str, float | None]:
        """Keys of the evaluation's record; None where there is no finite number."""

    def texts(self) -> list[Sample]:
        """What the model writes."""


Ask = Callable[[Training], Questions]
"""Makes the questions of a run. They need more than a run does, so they come from whoever starts it."""


class Evaluator:
    """Held-out NELBO beside the unigram cross-entropy, which token frequencies alone reach; and the questions."""

    def __init__(self, training: Training, questions: Questions | None = None) -> None:
        self._training = training
        self._questions = questions
        self._unigram: float | None = None
        self._data: str | None = None

    def is_due(self, step: int) -> bool:
        """Every ``evaluate.interval`` steps and after the last one, where there is something to do."""
        training = self._training
        due = step % training.config.evaluate.interval == 0 or step == training.steps
        return due and (training.valid_stream is not None or bool(training.config.evaluate.prompts))

    def __call__(self, step: int) -> tuple[dict[str, Any] | None, list[Sample]]:
        """The evaluation record after ``step`` steps, None without held-out data, and the samples; collective."""
        return self._held_out(step), self._questions.texts() if self._questions else []

    def _held_out(self, step: int) -> dict[str, Any] | None:
        training, count = self._training, self._training.valid_sequences
        if training.valid_stream is None:
            return None
        result = held_out_nelbo(training.chunks, training.valid_stream, training.topology, num_sequences=count)
        if self._unigram is None:
            self._unigram = on_rank_zero(partial(self._unigram_cross_entropy, training.valid_stream.dataset))
            self._data = data_name(training.config.data.valid, training.valid_stream.dataset)
        bits_per_byte = 1 / math.log(2) / training.valid_stream.dataset.bytes_per_token
        return {
            "step": step,
            "valid_data": self._data,
            "valid_nelbo": result.nelbo,
            "valid_nelbo_ci95": result.ci95,
            "valid_bits_per_byte": result.nelbo * bits_per_byte,
            "valid_bits_per_byte_ci95": result.ci95 * bits_per_byte,
            "valid_perplexity_bound": math.exp(min(result.nelbo, 700.0)),  # beyond that the number overflows
            "valid_unigram": self._unigram,
            "valid_sequences": result.sequences,
            **(self._questions.figures() if self._questions else {}),
        }

    def _unigram_cross_entropy(self, held_out: Dataset) -> float:
        """Counted by one rank: the figure is the same on all, and so are the files."""
        counts = self._training.train_stream.dataset.unigram_counts(self._training.tokenizer.vocab_size)
        return unigram_cross_entropy(counts, held_out.sequences(np.arange(self._training.valid_sequences)))


def data_name(sources: list[SourceConfig], data: Dataset) -> str:
    """``valid-1a2b3c4d``: the names of the sources, and a digest of what is in them and of their shares."""
    digest = hashlib.sha256(repr(describe_sources(sources, data)).encode()).hexdigest()
    return "-".join([*(Path(source.path).name for source in sources), digest[:8]])
