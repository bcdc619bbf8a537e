"""Small Hugging Face models with random weights, as transformers saves them, for tests of the import."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch

SHAPE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
}


def save_source(
    folder: Path, kind: str, *, dtype: torch.dtype = torch.float32, shard: str = "1GB", **fields: Any
) -> torch.nn.Module:
    """A ``qwen3`` or ``llama`` model with random norms and a tokenizer in ``folder``; returned in fp32, as read."""
    import transformers

    config, model = {
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }[kind]
    torch.manual_seed(1)
    source = model(config(**{**SHAPE, **fields}))
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    source.to(dtype).save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder)
    return model.from_pretrained(folder, dtype=torch.float32).eval()


def save_tokenizer(folder: Path, special: Sequence[str] = ("<|endoftext|>",), **settings: Any) -> int:
    """A byte-level tokenizer.json and what ``settings`` say beside it; returns the number of its ids."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["the theory of the thing is that there is nothing"] * 9, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return model.get_vocab_size()


def edit_config(folder: Path, **fields: Any) -> None:
    """Change fields of config.json; None removes one, ``...`` writes null."""
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for name, value in fields.items():
        content.pop(name, None)
        if value is not None:
            content[name] = None if value is ... else value
    path.write_text(json.dumps(content), encoding="utf-8")
