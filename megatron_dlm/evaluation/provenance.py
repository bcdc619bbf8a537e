"""What a result was computed with: everything that is needed to compute it again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from megatron_dlm import __version__
from megatron_dlm.checkpoint import manifest
from megatron_dlm.checkpoint.stored import is_checkpoint, open_checkpoint
from megatron_dlm.evaluation.likelihood_masks import LikelihoodOptions
from megatron_dlm.evaluation.tasks import PROMPTS, Task
from megatron_dlm.generation.text_model import TextModel

PACKAGES = (
    "megatron-dlm",
    "megatron-core",
    "torch",
    "numpy",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "lm-eval",
)
"""Distributions whose versions results depend on."""


def identify(path: str, model: TextModel) -> dict[str, Any]:
    """What the model at ``path`` is.

    Returns:
        path; kind; digest: the SHA-256 of a checkpoint's manifest (which has that of every file), or of the names and
        contents of a Hugging Face directory's configuration and weights; objective; max_length; step of a checkpoint;
        layout; device; tokenizer: its fingerprint and the size of its vocabulary.
    """
    if is_checkpoint(path):
        stored = open_checkpoint(path)
        where: dict[str, Any] = {
            "path": str(stored.directory),
            "kind": "checkpoint",
            "digest": manifest.record(stored.directory / manifest.NAME).sha256,
            "step": stored.info.get("step"),
        }
    else:
        where = {"path": str(path), "kind": "hugging_face", "digest": _content_digest(Path(path))}
    gpu = model.device.type == "cuda"
    return {
        **where,
        "objective": model.kind.name,
        "max_length": model.max_length,
        "layout": "one process" if model.topology is None else str(model.topology),
        "device": torch.cuda.get_device_name(model.device) if gpu else "CPU",
        "tokenizer": {"fingerprint": model.tokenizer.fingerprint, "vocab_size": model.tokenizer.vocab_size},
    }


def fingerprint(model: dict[str, Any], task: Task, options: LikelihoodOptions) -> str:
    """Of all that decides the answer to question i of a task: equal ones may be mixed.

    Not the layout and the batches, which only round differently, and not how many questions are asked.
    """
    decisive = {
        "model": {key: model[key] for key in ("digest", "objective", "max_length", "tokenizer")},
        "task": [task.name, PROMPTS, task.num_fewshot, [file["sha256"] for file in task.files]],
        "options": [] if model["objective"] == "autoregressive" else options_of(options),
        "version": __version__,
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def options_of(options: LikelihoodOptions) -> dict[str, Any]:
    """Those that decide a likelihood, for JSON."""
    names = ("estimator", "masks", "guidance", "seed", "enumerate_short")
    return {name: getattr(options, name) for name in names}


def _content_digest(directory: Path) -> str:
    files = sorted([directory / "config.json", *directory.glob("*.safetensors")])
    lines = "".join(f"{manifest.record(file).sha256} {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()
