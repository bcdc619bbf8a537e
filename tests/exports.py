"""Small checkpoints of random weights, and what is left of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dlm.config.load import from_dict
from megatron_dlm.config.tree import Config
from tools.measure_export import write_checkpoint

MODEL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 12,
    "ffn_hidden_size": 48,
    "vocab_size_multiple": 64,
}


def config(*, sequence_length: int = 64, precision: str = "fp32", **model: Any) -> Config:
    """A run with the byte tokenizer, with keys of its model."""
    return from_dict(
        {
            "model": {**MODEL, **model},
            "data": {"tokenizer": "byte", "sequence_length": sequence_length},
            "train": {"precision": precision},
        }
    )


def make_checkpoint(directory: Path, **keys: Any) -> Path:
    """A complete checkpoint of ``config(**keys)``."""
    write_checkpoint(directory, config(**keys))
    return directory


def content(directory: Path) -> dict[str, bytes]:
    """Every file below ``directory``, hidden ones too, by name."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
