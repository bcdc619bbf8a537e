"""Sampling speed of an export beside the trainer's own model: the same weights, prompts and options, in one process.

    python tools/benchmark_sampling.py --checkpoint runs/demo

Rounds alternate between the two; the figure is the ratio of the medians. The texts must be equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from megatron_dlm.generation.text_model import TextModel, open_text_model
from megatron_dlm.hf.export import export
from megatron_dlm.parallel.topology import shutdown
from megatron_dlm.shipped.sampler_plan import SamplerOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run or a checkpoint")
    parser.add_argument("--prompt", default="def ", help="repeated for the batch (%(default)r)")
    parser.add_argument("--batch", type=int, default=8, help="texts (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each (%(default)s)")
    parser.add_argument("--block-length", type=int, default=32, help="of masked diffusion (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        exported = export(Path(args.checkpoint), Path(folder, "export")).directory
        models = {"trainer": open_text_model(args.checkpoint), "export": open_text_model(str(exported))}
        results = compare(models, args)
    shutdown()
    if args.json:
        print(json.dumps(results))
        return
    for name in models:
        print(f"{name:<8} {results[name]:10.1f} tokens/s  (median of {args.rounds})")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {args.threads} threads"
    print(f"export / trainer: {results['ratio']:.2f}x | {args.batch} texts of {args.tokens} tokens | {device}")


def compare(models: dict[str, TextModel], args: argparse.Namespace) -> dict[str, float]:
    """Tokens/s of each, and the ratio of the export to the trainer."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    texts = {}
    for number in range(args.rounds + 1):
        for name, model in models.items():
            options = SamplerOptions() if model.autoregressive else SamplerOptions(block_length=args.block_length)
            prompts = [model.tokenizer.encode(args.prompt)] * args.batch
            started = time.perf_counter()
            samples = model.generate(prompts, options, max_new_tokens=args.tokens)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
            texts[name] = samples.tokens
    if texts["trainer"] != texts["export"]:
        sys.exit("the two write different texts; compare them in fp32, or report a bug")
    tokens = args.batch * args.tokens
    rates = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    return {**rates, "ratio": rates["export"] / rates["trainer"]}


if __name__ == "__main__":
    main()
