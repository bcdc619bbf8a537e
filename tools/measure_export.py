"""Peak memory of `megatron-dlm export` for a model of a billion parameters.

    python tools/measure_export.py FOLDER [--dtype fp32] [--max-shard-size 500MB]

Writes a checkpoint of random weights into FOLDER (4.4 GB), exports it there in a process of its own, removes both, and
compares the most memory that the process has had with the bound: the largest tensor as it is stored, one file of
weights, what a process that has imported the same packages has (torch's CUDA build needs twice as much as its CPU
build), and a little for its allocator. Exit code 1 if it was more.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_dlm.checkpoint import manifest
from megatron_dlm.checkpoint.stored import CONFIG, INFO, TOKENIZER
from megatron_dlm.checkpoint.whole_tensors import TensorInfo, write_weights
from megatron_dlm.commands.export import size_in_bytes
from megatron_dlm.config.load import dump_yaml, from_dict
from megatron_dlm.config.tree import Config
from megatron_dlm.data.tokenizer import load_tokenizer
from megatron_dlm.hf.tensor_map import weight_map

BILLION = {
    "num_layers": 26,
    "hidden_size": 1792,
    "num_attention_heads": 14,
    "head_dim": 128,
    "ffn_hidden_size": 4736,
    "tie_embeddings": True,
}
VOCABULARY = 50_257
SLACK = 64_000_000
"""Bytes for the tokenizer, buffers of files and what the allocator keeps; they do not grow with the model."""

# The process's own record: what getrusage says includes the memory of the process that has started it.
_PEAK = """
with open("/proc/self/status") as file:
    kib = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
print("PEAK", kib * 1024)
"""
_EXPORT = f"""
import sys
from megatron_dlm.cli import main
code = main(sys.argv[1:])
{_PEAK}
sys.exit(code)
"""
_IMPORTS = f"""
import safetensors.torch, tokenizers
import megatron_dlm.cli, megatron_dlm.hf.export, megatron_dlm.hf.tokenizer
{_PEAK}
"""


class Measurement(NamedTuple):
    """Of one export; sizes in bytes."""

    parameters: int
    largest: int
    """Largest tensor of the checkpoint."""
    shard: int
    """Largest file of weights."""
    peak: int
    """Most resident memory of the process."""
    imports: int
    """The same of a process that has only imported what an export imports."""
    seconds: float

    @property
    def bound(self) -> int:
        """What the peak may be."""
        return self.largest + self.shard + self.imports + SLACK


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """A tokenizer.json of byte pairs with ``vocab_size`` ids, of which the last two are left for the control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters][: vocab_size - 2 - len(letters)]
    vocabulary = {piece: i for i, piece in enumerate([*letters, *(a + b for a, b in pairs)])}
    assert len(vocabulary) == vocab_size - 2, "there are no more than 256 letters and their pairs"
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


def write_checkpoint(directory: Path, config: Config, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
    """A complete checkpoint of random weights and nothing else, made and written one tensor at a time.

    Args:
        directory: is made.
        config: of the run that it claims to be of; ``data.tokenizer`` is read.
        dtype: of the weights as they are stored.
    """
    directory.mkdir(parents=True)
    tokenizer = load_tokenizer(config.data.tokenizer)
    shapes = {whole.key: whole.shape for whole in weight_map(config.model, tokenizer.vocab_size)}
    generator = torch.Generator().manual_seed(seed)

    def make(key: str) -> torch.Tensor:
        noise = torch.empty(shapes[key]).normal_(std=config.model.init_std, generator=generator)
        return (1 + noise if len(shapes[key]) == 1 else noise).to(dtype)

    known = write_weights(directory, {key: TensorInfo(shape, dtype) for key, shape in shapes.items()}, make)
    (directory / CONFIG).write_text(dump_yaml(config))
    tokenizer.save(directory / TOKENIZER)
    info = {
        "step": 0,
        "consumed_samples": 0,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
    }
    (directory / INFO).write_text(json.dumps(info) + "\n")
    manifest.write(directory, known)


def export_and_measure(checkpoint: Path, output: Path, *arguments: str) -> Measurement:
    """Run `megatron-dlm export` with further ``arguments`` in a process of its own."""
    start = time.perf_counter()
    command = ["export", "--checkpoint", str(checkpoint), "--output", str(output), *arguments]
    peak = _peak_of(_EXPORT, *command)
    seconds = time.perf_counter() - start
    from megatron_dlm.checkpoint.whole_tensors import WeightsReader

    stored = WeightsReader(checkpoint).tensors.values()
    return Measurement(
        sum(math.prod(info.shape) for info in stored),
        max(math.prod(info.shape) * info.dtype.itemsize for info in stored),
        max(path.stat().st_size for path in output.glob("*.safetensors")),
        peak,
        _peak_of(_IMPORTS),
        seconds,
    )


def _peak_of(program: str, *arguments: str) -> int:
    """Most memory that a program of Python has had, in bytes."""
    run = subprocess.run([sys.executable, "-c", program, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return int(run.stdout.rpartition("PEAK ")[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where there is room for the checkpoint and the export")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="of the export (bf16)")
    parser.add_argument("--max-shard-size", type=size_in_bytes, default="500MB", help="(500MB)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write_tokenizer(folder / "tokenizer.json", VOCABULARY)
        data = {"tokenizer": str(folder / "tokenizer.json"), "sequence_length": 2048}
        write_checkpoint(folder / "checkpoint", from_dict({"model": BILLION, "data": data}))
        options = ("--dtype", args.dtype, "--max-shard-size", str(args.max_shard_size))
        found = export_and_measure(folder / "checkpoint", folder / "export", *options)
    peak, bound, largest, shard, imports, slack = (
        f"{size / 1e6:.0f} MB" for size in (found.peak, found.bound, found.largest, found.shard, found.imports, SLACK)
    )
    print(f"{found.parameters:,} parameters to {args.dtype} in {found.seconds:.0f} s: peak {peak}")
    print(f"bound {bound} = largest tensor {largest} + one file {shard} + imports {imports} + {slack}")
    return int(found.peak > found.bound)


if __name__ == "__main__":
    sys.exit(main())
