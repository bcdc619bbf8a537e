"""README.md of an export: what the model is, how to use it, what it was trained on and how good it is."""

from __future__ import annotations

import re
from typing import Any

import torch

from megatron_dlm import __version__
from megatron_dlm.checkpoint.stored import StoredCheckpoint
from megatron_dlm.config.load import dump_yaml
from megatron_dlm.errors import one_line

_DLM_USE = """```python
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

path = "."  # the directory of this file
tokenizer = PreTrainedTokenizerFast.from_pretrained(path)  # it is no code; AutoTokenizer looks at the model's
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)

# Go on from a prompt: masks behind it are filled in, the most certain first.
prompt = tokenizer("The ", return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=32, steps=16)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))

# Fill in the middle: a mask wherever a token is missing.
left, right = (tokenizer(text, add_special_tokens=False).input_ids for text in ("The sun ", " in the west."))
masks = [model.config.mask_token_id] * 8
tokens = model.generate(torch.tensor([left + masks + right]), max_new_tokens=0)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```

`generate` takes `steps`, `block_length`, `remasking`, `threshold`, `temperature`, `top_p`, `guidance` and `seed`.
Called with `labels=`, the model returns the masked diffusion loss."""

_AR_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # the directory of this file
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)

prompt = tokenizer("The ", return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=32)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```

Every training sequence was seen behind an end-of-document token, so the tokenizer puts one before the text."""


def model_card(stored: StoredCheckpoint, *, architecture: str, parameters: int, dtype: str) -> str:
    """The text, with the front matter that model hubs read.

    Args:
        stored: the checkpoint; the figures come from it and from its run's metrics.jsonl, where that is found.
        architecture: class name.
        parameters: of the export, without padding of the vocabulary.
        dtype: of its weights, "fp32" or "bf16".
    """
    config, info = stored.config, stored.info
    diffusion, kind = not config.model.kind.causal, config.model.kind.words
    tags = ["megatron-dlm", kind.replace(" ", "-"), *(["custom_code"] if diffusion else [])]
    what = (
        "It sees a text with masks and predicts all masked tokens at once, from both sides; text is written by filling "
        "in masks in any order."
        if diffusion
        else "It predicts the next token. Whatever loads transformers' models loads it, without custom code."
    )
    rows = {
        "architecture": architecture,
        "parameters": f"{parameters:,}",
        "weights": f"{dtype}; trained in {config.train.precision}",
        "vocabulary": f"{info['vocab_size']:,} ids",
        "sequence length": f"{config.data.sequence_length:,} tokens",
        **({"imported from": info["imported_from"]} if "imported_from" in info else {}),
        **_training(stored),
        "trained at layout": info.get("layout", "not recorded"),
        "versions": ", ".join(f"{name} {number}" for name, number in _versions(info).items()),
    }
    configuration = dump_yaml(config).rstrip()
    # Longer than any in a run's name or a prompt, which would end the block.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", configuration)), default=0))
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
        f"# A language model ({kind})",
        "",
        f"{what} Trained with megatron_dlm.",
        "",
        "## Use",
        "",
        _DLM_USE if diffusion else _AR_USE,
        "",
        "## Facts",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_escaped(value)} |" for name, value in rows.items()),
        "",
        "## Configuration of the training run",
        "",
        f"{fence}yaml",
        configuration,
        fence,
        "",
    ]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Text that stays what it is in a cell of a table: nothing in it is Markdown or HTML."""
    return re.sub(r"[^\w ./,:;+()%=@-]", lambda found: f"&#{ord(found[0])};", one_line(text))


def _training(stored: StoredCheckpoint) -> dict[str, str]:
    """Steps, tokens and the held-out likelihood."""
    config, info = stored.config, stored.info
    step, samples = info.get("step"), info.get("consumed_samples")
    if step is None or samples is None:
        return {"training": "not recorded"}
    at_step, evaluation = _records(stored, step)
    tokens = f"{samples * config.data.sequence_length:,}"
    if all(isinstance(at_step.get(key), int | float) for key in ("unique_tokens", "epoch")):
        tokens += f", {at_step['unique_tokens']:,} of them unique ({at_step['epoch']:.2f} epochs)"
    name = config.model.kind.likelihood
    return {"training steps": f"{step:,}", "training tokens": tokens, f"held-out {name}": _likelihood(evaluation)}


def _likelihood(record: dict[str, Any]) -> str:
    if not isinstance(record.get("valid_nelbo"), float):
        return "not recorded"
    figures = [
        f"{record[key]:.4f} +- {record[f'{key}_ci95']:.4f} {unit}"
        for key, unit in (("valid_nelbo", "nats/token"), ("valid_bits_per_byte", "bits/byte"))
        if isinstance(record.get(key), float) and isinstance(record.get(f"{key}_ci95"), float)
    ]
    return f"{', '.join(figures)} (95 % intervals; step {record['step']:,})" if figures else "not recorded"


def _records(stored: StoredCheckpoint, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the run: the record of this step, and the newest evaluation up to it; empty where there is none."""
    folder = stored.run_folder
    if folder is None or not folder.metrics.is_file():
        return {}, {}
    records = folder.records(skip_damaged=True)
    at_step = next((record for record in records.steps if record["step"] == step), {})
    # Of two at one step the first: a run that went on from it with other held-out data has made the second.
    past = [record for record in records.evaluations if record["step"] <= step]
    return at_step, max(past, key=lambda record: record["step"], default={})


def _versions(info: dict[str, Any]) -> dict[str, str]:
    """Those that trained, and those that exported."""
    return {**info.get("versions", {}), "exported by megatron_dlm": __version__, "with torch": torch.__version__}
