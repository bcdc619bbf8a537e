"""Tokens per second of our training step beside a plain transformers loop of the same model, in one process.

    python tools/benchmark_training.py --config examples/configs/demo.yaml [--section.key VALUE ...] [--rounds 5]
        [--beside kernels.last_layer_rows=all]

The plain loop is what one writes without a training system: transformers' Qwen3 made bidirectional, Bernoulli masks
with t ~ U(0, 1), the LM head on every position, cross-entropy / t, torch's AdamW. Same sizes, batch, precision and
number of threads. ``--beside`` adds our step with one key changed. All take turns, so that the machine's mood hits
them alike; the figures are ratios of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import megatron_dlm.parallel  # noqa: F401  (prepares the machine before anything imports megatron)
from megatron_dlm.config.load import load_config
from megatron_dlm.config.tree import Config
from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.parallel import topology as parallel
from megatron_dlm.training.setup import build
from megatron_dlm.training.state import Training
from megatron_dlm.training.step import train_step


def our_step(training: Training) -> Callable[[int], float]:
    """A function that takes training step ``n`` and returns its loss."""

    def step(number: int) -> float:
        return train_step(training, training.progress_at(number)).loss

    return step


def plain_step(training: Training) -> Callable[[int], float]:
    """The same step as a plain transformers loop."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config, model, device = training.config, training.config.model, training.topology.device
    settings = Qwen3Config(
        vocab_size=model.padded_vocab_size(training.tokenizer.vocab_size),
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.resolved_query_groups,
        head_dim=model.resolved_head_dim,
        tie_word_embeddings=model.tie_embeddings,
        attn_implementation="sdpa",
        use_cache=False,
    )
    network = Qwen3ForCausalLM(settings).to(device)
    bf16 = config.train.precision == "bf16"
    for layer in network.model.layers:
        layer.self_attn.is_causal = False
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay
    )
    stream = training.train_stream

    def step(number: int) -> float:
        optimizer.zero_grad()
        first, size = number * stream.global_batch_size, stream.micro_batch_size
        total = 0.0
        for start in range(first, first + stream.global_batch_size, size):
            tokens = torch.from_numpy(stream.dataset.sequences(torch.arange(start, start + size).numpy())).to(device)
            t = torch.rand(size, 1, device=device) * 0.999 + 0.001
            masked = torch.rand(tokens.shape, device=device) < t
            noised = tokens.masked_fill(masked, training.tokenizer.mask_token_id)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                # The mapping with None means no mask at all; with is_causal off, attention is bidirectional.
                logits = network(noised, attention_mask={"full_attention": None}).logits
            cross_entropy = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none")
            loss = (cross_entropy.view_as(tokens) * masked / t).sum() / (stream.global_batch_size * tokens.shape[1])
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        return total

    return step


def timed(step: Callable[[int], float], first: int, count: int, device: torch.device) -> float:
    """Seconds per step of ``count`` steps from ``first``."""
    started = time.perf_counter()
    for number in range(first, first + count):
        step(number)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


def compare(config: Config, beside: dict[str, Config], *, rounds: int, steps: int) -> dict[str, Any]:
    """Alternate the loops for ``rounds`` rounds of ``steps`` steps; tokens/s by median, and ours over each of them."""
    topology = parallel.initialize(config.parallel)
    training = build(config, topology)
    contenders = {"megatron_dlm": our_step(training), "transformers": plain_step(training)}
    contenders |= {name: our_step(build(other, topology)) for name, other in beside.items()}
    tokens = config.train.global_batch_size * config.data.sequence_length
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(rounds + 1):
        for name, step in contenders.items():
            took = timed(step, round_number * steps, steps, training.topology.device)
            if round_number:  # the first round warms up
                seconds[name].append(took)
    rates = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    return {
        "tokens_per_second": rates,
        "ratios": {name: rates["megatron_dlm"] / rate for name, rate in rates.items() if name != "megatron_dlm"},
        "range": {name: [tokens / max(v), tokens / min(v)] for name, v in seconds.items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": str(training.topology.device),
    }


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each loop (default 5)")
    parser.add_argument("--steps", type=int, default=4, help="steps in a round (default 4)")
    parser.add_argument("--beside", metavar="KEY=VALUE", help="also run our step with this key changed")
    parser.add_argument("--json", help="write the figures to this file too")
    options, rest = parser.parse_known_args()
    try:
        rest += ["--parallel.data_parallel_size", "1"]
        beside = {}
        if options.beside:
            key, _, value = options.beside.partition("=")
            beside[options.beside] = load_config([*rest, f"--{key}", value])
        result = compare(load_config(rest), beside, rounds=options.rounds, steps=options.steps)
    except (ConfigError, DataError) as error:
        print(f"benchmark_training: {error}", file=sys.stderr)
        return 2
    for name, rate in result["tokens_per_second"].items():
        low, high = result["range"][name]
        print(f"{name:14} {rate:10.0f} tokens/s   (range {low:.0f} to {high:.0f})")
    for name, ratio in result["ratios"].items():
        print(f"over {name:9} {ratio:10.2f}x")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
