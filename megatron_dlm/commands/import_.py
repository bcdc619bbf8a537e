"""`megatron-dlm import`: a Hugging Face model in, a checkpoint to sample from or to begin training with out."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_dlm.hf.import_model import Imported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_ID",
        help="folder of a Qwen3 or Llama model or of one that megatron-dlm has exported (config.json, *.safetensors, "
        "tokenizer.json), or the name of one on the Hub",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="folder to write, a checkpoint without an optimizer"
    )
    parser.add_argument(
        "--objective",
        choices=("masked_diffusion", "autoregressive"),
        default="masked_diffusion",
        help="what the weights are for: a bidirectional masked diffusion model, or the causal model that the source "
        "is (%(default)s)",
    )
    parser.add_argument(
        "--mask-token",
        metavar="NAME",
        help="what [MASK] is: a special token that the tokenizer has, or a new one (default: the tokenizer's mask "
        "token, or else a new <|mask|>)",
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help="data.sequence_length of the configuration that is written (tokens; default: the model's longest, at "
        "most 4096)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an imported checkpoint in the output folder")


def run(args: argparse.Namespace) -> int:
    """Import and print a summary. Raises ConfigError or DataError, one line; then nothing is left behind."""
    from megatron_dlm.hf.import_model import import_model

    imported = import_model(
        args.model,
        args.output,
        objective=args.objective,
        mask_token=args.mask_token,
        sequence_length=args.sequence_length,
        overwrite=args.overwrite,
        progress=True,
    )
    print(summary(imported))
    return 0


def summary(imported: Imported) -> str:
    """What was written, what became of the vocabulary, and the next commands."""
    config, directory = imported.config, imported.directory
    model = config.model
    lines = [
        f"imported   {directory} from {imported.source} ({imported.model_type})",
        f"model      {imported.parameters:,} parameters, {model.num_layers} layers x {model.hidden_size} | "
        f"{model.objective} | sequences of {config.data.sequence_length} tokens | {config.train.precision}",
        f"tokenizer  {imported.vocab_size:,} ids | [MASK] is {imported.mask_token} ({imported.mask_token_id}) | "
        f"documents end with {imported.end_token} ({imported.end_of_document_id})",
    ]
    if imported.new_ids or imported.dropped_rows:
        new, dropped = (
            f"{imported.new_ids:,} new (the mean of the others)",
            f"{imported.dropped_rows:,} that no token has left out (an export has {imported.vocab_size:,} rows)",
        )
        lines.append(f"rows       {new} | {dropped}")
    data = Path("DATA")
    prepare = ["megatron-dlm", "prepare", "--input", "TEXT", "--tokenizer", str(directory / "tokenizer")]
    prepare += ["--output", str(data)]
    train = ["megatron-dlm", "train", "--config", str(directory / "config.yaml")]
    train += ["--checkpoint.initialize_from", str(directory), "--run.directory", "RUN", "--train.steps", "STEPS"]
    train += ["--data.train", f"[{{path: {data / 'train'}}}]", "--data.valid", f"[{{path: {data / 'valid'}}}]"]
    lines += [f"next       {shlex.join(prepare)}", f"           {shlex.join(train)}"]
    return "\n".join(lines)
