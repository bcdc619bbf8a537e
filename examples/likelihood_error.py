"""Bias and standard deviation of the ways to estimate a masked diffusion model's likelihood of a short answer.

    python examples/likelihood_error.py
    python examples/likelihood_error.py --checkpoint runs/demo --text "Functions are objects like all others"

Every mask of the answer goes through the model once (2**tokens - 1 of them). The bound is then known exactly, and each
estimator is drawn thousands of times from that table: ours (exact counts on shifted grids), the same counts by the
rounding of LLaDA's evaluation code (half to even, which makes even counts more likely), and 1/t (SMDM, Dream).

Without --checkpoint the model is a table of random numbers: one token costs 1 + 6 (k/L)**1.5 nats in the mean where k
of L are masked, with a standard deviation of 2.5. With it, the answer is the last tokens of --text.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch

from megatron_dlm.evaluation.likelihood_masks import LikelihoodOptions, plan
from megatron_dlm.generation.text_model import TextModel, open_text_model

BASELINE = "exact count (ours)"


def every_mask(length: int) -> np.ndarray:
    """[2**length, length] bool; row i has the bits of i, so row 0 masks nothing."""
    return (np.arange(2**length)[:, None] >> np.arange(length) & 1).astype(bool)


def random_table(length: int, seed: int) -> np.ndarray:
    """Sum of the cross-entropies of the masked tokens for every mask, [2**length] (nats)."""
    masks = every_mask(length)
    cost = 1 + 6 * (masks.mean(1, keepdims=True)) ** 1.5
    noise = 2.5 * np.random.default_rng(seed).standard_normal(masks.shape)
    return (masks * (cost + noise).clip(min=0.0)).sum(1)


def model_table(model: TextModel, tokens: list[int], length: int) -> np.ndarray:
    """As ``random_table``, of a trained model and the last ``length`` of the tokens."""
    masks = torch.from_numpy(every_mask(length)[1:])  # of what is not masked at all there is nothing to ask
    clean = torch.tensor(tokens).expand(len(masks), -1)
    hidden = torch.nn.functional.pad(masks, (len(tokens) - length, 0))  # [masks, tokens]: the context is visible
    noised = torch.where(hidden, model.vocabulary.mask_token_id, clean).to(model.device)
    with torch.no_grad():
        logits = model.own_tokens()(noised, None, hidden.flatten().nonzero()[:, 0].to(model.device))
    losses = torch.zeros(hidden.shape, dtype=torch.float64)
    losses[hidden] = torch.nn.functional.cross_entropy(logits.double().cpu(), clean[hidden], reduction="none")
    return np.concatenate([[0.0], losses.sum(1).numpy()])


def bound(table: np.ndarray, length: int) -> float:
    """The mean over k of L/k times the mean over the masks of k tokens, negated (nats)."""
    counts = every_mask(length).sum(1)[1:].tolist()
    return -sum(value / (k * math.comb(length, k)) for k, value in zip(counts, table[1:].tolist(), strict=True))


def planned(table: np.ndarray, length: int, estimator: str, masks: int, repeat: int) -> float:
    """One estimate by the masks that ``megatron-dlm evaluate`` draws."""
    options = LikelihoodOptions(estimator=estimator, masks=masks, enumerate_short=False)  # type: ignore[arg-type]
    drawn = plan(options, repeat, length)
    return -float((drawn.coefficients @ table[drawn.masks @ 2 ** np.arange(length)]).mean())


def rounded_counts(length: int, masks: int, start: int) -> np.ndarray:
    """[masks] counts as LLaDA's evaluation code has them: evenly spaced from ``start``, rounded, wrapped to 1..L."""
    spaced = np.linspace(start, start + (masks - 1) * length / masks, masks)
    return (np.rint(spaced).astype(int) - 1) % length + 1


def rounded(table: np.ndarray, length: int, masks: int, generator: np.random.Generator) -> float:
    """One estimate by those counts."""
    counts = rounded_counts(length, masks, int(generator.integers(1, length + 1)))
    order = generator.random((masks, length)).argsort(axis=1)
    hidden = order < counts[:, None]
    return -float((length / counts * table[hidden @ 2 ** np.arange(length)]).mean())


def rounding_bias(table: np.ndarray, length: int, masks: int) -> float:
    """The bias of an estimate by those counts over all starts, exactly (nats); its sign depends on the model."""
    size = every_mask(length).sum(1)
    means = np.array([0.0, *(length / k * table[size == k].mean() for k in range(1, length + 1))])
    counts = np.concatenate([rounded_counts(length, masks, start) for start in range(1, length + 1)])
    return -float(means[counts].mean()) - bound(table, length)


def study(table: np.ndarray, length: int, masks: int, repeats: int) -> None:
    """Print a line for each estimator."""
    truth, generator = bound(table, length), np.random.default_rng(0)
    drawn = {
        BASELINE: [planned(table, length, "exact_count", masks, i) for i in range(repeats)],
        "exact count, LLaDA's rounding": [rounded(table, length, masks, generator) for _ in range(repeats)],
        "1/t (SMDM, Dream)": [planned(table, length, "one_over_t", masks, i) for i in range(repeats)],
    }
    exact = rounding_bias(table, length, masks)
    print(f"{length} tokens, {masks} masks, bound {truth:.4f} nats; the rounding's bias is {exact:+.4f}")
    for name, values in drawn.items():
        std, error = np.std(values, ddof=1), np.std(values, ddof=1) / math.sqrt(repeats)
        ratio = std / np.std(drawn[BASELINE], ddof=1)
        print(f"  {name:<31} bias {np.mean(values) - truth:+.4f} +- {error:.4f} | std {std:.4f} ({ratio:.2f}x)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a run, a checkpoint or an export, of a masked diffusion model")
    parser.add_argument("--text", help="goes with --checkpoint; its last tokens are the answer")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 8], help="of the answer (%(default)s)")
    parser.add_argument("--masks", type=int, default=128, help="of one estimate (%(default)s)")
    parser.add_argument("--repeats", type=int, default=4000, help="of every estimator (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="random tables (%(default)s)")
    args = parser.parse_args()
    if (args.checkpoint is None) != (args.text is None):
        parser.error("--checkpoint and --text go together")
    model = open_text_model(args.checkpoint) if args.checkpoint else None
    for length in args.tokens:
        if model is not None:
            tables = [model_table(model, model.tokenizer.encode(args.text), length)]
        else:
            tables = [random_table(length, seed) for seed in range(args.seeds)]
        for table in tables:
            study(table, length, args.masks, args.repeats)


if __name__ == "__main__":
    main()
