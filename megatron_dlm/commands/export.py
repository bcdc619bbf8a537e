"""`megatron-dlm export`: a training checkpoint in, a directory for Hugging Face's transformers out."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_dlm.hf.export import Exported

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="DIR",
        help="a run directory, whose latest checkpoint is taken, or one checkpoint of it; of any layout",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder to write: safetensors, configuration, tokenizer, model card, and the code of a diffusion model",
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="of the weights (the precision of the run)")
    parser.add_argument(
        "--max-shard-size",
        type=size_in_bytes,
        default="5GB",
        metavar="SIZE",
        help="size of one file of weights at most, such as 500MB, 5GB or 2GiB; memory is about that (%(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in the output folder")


def run(args: argparse.Namespace) -> int:
    """Export and print a summary. Raises ConfigError or DataError, one line; then nothing is left behind."""
    from megatron_dlm.hf.export import export

    exported = export(
        args.checkpoint,
        args.output,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
        progress=True,
    )
    print(summary(exported))
    return 0


def summary(exported: Exported) -> str:
    """What was written and the next command."""
    command = ["megatron-dlm", "sample", "--checkpoint", str(exported.directory), "--prompt", "The "]
    weights = [name for name in exported.files if name.endswith(".safetensors")]
    return "\n".join(
        [
            f"exported {exported.directory}",
            f"  model   {exported.architecture}, {exported.parameters:,} parameters",
            f"  size    {exported.bytes:,} bytes, weights in {len(weights)} file{'s' if len(weights) > 1 else ''}",
            f"  files   {', '.join(name for name in exported.files if name not in weights)}",
            f"next: {shlex.join(command)}",
        ]
    )


def size_in_bytes(text: str) -> int:
    """Bytes of a size such as "500MB" or "5GB" (decimal) or "2GiB" (binary), in capitals or not."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    unit = _UNITS.get(match[2]) if match else None
    if match is None or unit is None or (size := round(float(match[1]) * unit)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give one such as 500MB, 5GB or 2GiB")
    return size
