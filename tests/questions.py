"""Small invented questions in the layouts of public tasks, and models that are rigged to know the answers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dlm.config.kinds import AUTOREGRESSIVE, MASKED_DIFFUSION
from megatron_dlm.data.tokenizer import ByteTokenizer
from megatron_dlm.generation.text_model import TextModel

WORDS = ["a", "list", "of", "names", "is", "the", "class", "import", "value", "None", "for", "it"]


def words(source: random.Random, count: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(count))


def hellaswag(count: int, seed: int = 0) -> list[dict[str, Any]]:
    source = random.Random(seed)
    return [
        {
            "activity_label": words(source, 1),
            "ctx_a": words(source, 2),
            "ctx_b": words(source, 1),
            "endings": [words(source, source.randint(1, 2)) for _ in range(4)],
            "label": str(source.randrange(4)),
        }
        for _ in range(count)
    ]


def mmlu(count: int, seed: int = 0) -> list[dict[str, Any]]:
    source = random.Random(seed)
    return [
        {
            "question": words(source, 2) + "?",
            "choices": [words(source, 1) for _ in range(4)],
            "answer": source.randrange(4),
            "subject": ("high_school_names", "lists")[i % 2],
        }
        for i in range(count)
    ]


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rigged(logits: Mapping[str, float], *, autoregressive: bool = False, max_length: int = 64) -> TextModel:
    """A model of bytes that thinks the same of every position: characters have these logits, all others 0."""
    row = torch.zeros(258)
    for character, value in logits.items():
        row[ord(character)] = value

    def denoise(tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        assert tokens.shape[1] <= max_length
        return row.expand(len(rows), -1)

    kind = AUTOREGRESSIVE if autoregressive else MASKED_DIFFUSION
    return TextModel(denoise, ByteTokenizer(), kind, max_length, torch.device("cpu"), "rigged")
