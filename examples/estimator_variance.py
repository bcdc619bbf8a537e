"""How much the masks alone make the loss and its gradient vary, for every way to draw them.

    python examples/estimator_variance.py
    python examples/estimator_variance.py --checkpoint runs/demo --output docs/estimator-variance.png

First a synthetic problem: 32 sequences of 256 tokens in which a masked token costs 1 + 6 (k / 256)**1.5 nats when k are
masked (3.4117 nats per token in truth), plus noise of its own; once next to none, once as much as text has, where
sequences differ in difficulty too. Its loss is drawn thousands of times.

Then, with --checkpoint, a trained model on one process: the same global batch of training data is masked afresh again
and again, and the standard deviation of the loss and of the gradient over the masks is measured. The gradient's is the
root of the trace of its covariance, in units of the norm of the gradient itself. Every row costs the same: a global
batch of rows. With complementary masks it holds half as many sequences, the first ones, so the data differ there.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch

from dlm_kernels.noise_levels import draw, draw_pairs
from megatron_dlm.config.load import read_stored
from megatron_dlm.config.tree import Config, DiffusionConfig, ParallelConfig
from megatron_dlm.diffusion.objective import build_objective
from megatron_dlm.diffusion.schedule import levels_and_weights, pair_levels_and_weights
from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.training.progress import Progress
from megatron_dlm.training.sums import Sums

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)

BASELINE = "exact count, iid"
ROWS = {
    "bernoulli, iid (LLaDA)": {"masking": "bernoulli", "noise_levels": "iid"},
    BASELINE: {"noise_levels": "iid"},
    "antithetic": {"noise_levels": "antithetic"},
    "stratified": {"noise_levels": "stratified"},
    "stratified antithetic": {"noise_levels": "stratified_antithetic"},
    "complementary": {"complementary": True},
}
BATCH, SEQ = 32, 256
# Standard deviations of a token and of a sequence, nats.
NOISE = {"loss, little noise": (0.5, 0.0), "loss, token and sequence noise": (2.5, 0.4)}
_COMMON = {"masking": "exact_count", "weighting": "elbo", "complementary": False, "random_length_probability": 0.0}


class Spread(NamedTuple):
    """A standard deviation and its standard error."""

    std: float
    error: float


def spread(squared_deviations: np.ndarray) -> Spread:
    """Root of the mean of squared deviations from the mean, [n], with the error of that."""
    n = len(squared_deviations)
    std = float(np.sqrt(squared_deviations.sum() / (n - 1)))
    return Spread(std, float(squared_deviations.std(ddof=1) / np.sqrt(n) / (2 * std)))


def synthetic_losses(options: dict, draws: int, token_noise: float, sequence_noise: float) -> np.ndarray:
    """Losses [draws] of fresh masks on the synthetic problem (nats per token)."""
    config = DiffusionConfig(**(_COMMON | options))
    generator = np.random.default_rng(0)
    eligible, rows, losses = np.full(BATCH, SEQ), np.arange(BATCH), np.empty(draws)
    difficulty = sequence_noise * generator.standard_normal(BATCH)
    sequence = rows >> 1 if config.complementary else rows
    for step in range(draws):
        arguments = {"seed": 1, "step": step, "global_batch_size": BATCH}
        if config.complementary:
            levels = draw_pairs(step * BATCH + rows, config.noise_levels, **arguments)
            counts, weights = pair_levels_and_weights(config, levels, eligible, rows % 2 == 1)
            counts = np.where(rows % 2 == 1, SEQ - counts, counts)
        else:
            levels = draw(step * BATCH + rows, config.noise_levels, **arguments)
            counts, weights = levels_and_weights(config, levels, eligible)
            if config.masking == "bernoulli":
                counts = generator.binomial(SEQ, counts / 2**32)
        sums = counts * (1 + 6 * (counts / SEQ) ** 1.5 + difficulty[sequence])
        sums = sums + token_noise * np.sqrt(counts) * generator.standard_normal(BATCH)
        losses[step] = (weights * sums).sum() / (BATCH * SEQ)
    return losses


def synthetic(draws: int) -> dict[str, dict[str, Spread]]:
    """Standard deviations by column and row."""
    table: dict[str, dict[str, Spread]] = {}
    for column, noise in NOISE.items():
        losses = {name: synthetic_losses(options, draws, *noise) for name, options in ROWS.items()}
        table[column] = {name: spread((values - values.mean()) ** 2) for name, values in losses.items()}
    return table


def load(directory: Path) -> Any:
    """The `Training` of a checkpoint, or of the newest one of a run's directory, on one process."""
    from megatron_dlm.parallel.topology import initialize
    from megatron_dlm.training import saving as checkpoint
    from megatron_dlm.training.setup import build

    pointer = directory / "checkpoints" / "latest"
    if pointer.is_file():
        directory = pointer.parent / pointer.read_text().strip()
    if not (directory / "checkpoint.json").is_file():
        raise ConfigError(f"{directory} is no checkpoint and has none; give a run's directory or a checkpoint")
    config: Config = read_stored(directory / "config.yaml")
    if config.model.objective != "masked_diffusion":
        raise ConfigError(f"{directory} is an autoregressive model; give one of masked diffusion")
    config = replace(config, parallel=ParallelConfig())
    training = build(config, initialize(config.parallel))
    checkpoint.load(training, directory)
    return training


def noise_of_checkpoint(training: Any, options: dict, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses [draws] and gradients [draws, parameters] fp32 of the first global batch of the data, masked afresh."""
    from megatron_dlm.training.batches import BatchStream
    from megatron_dlm.training.step import accumulate_gradients

    diffusion = replace(training.config.diffusion, **(_COMMON | options))
    config = replace(training.config, diffusion=diffusion)
    parameters = [p for chunk in training.chunks for p in chunk.parameters() if p.requires_grad]
    losses = np.empty(draws)
    gradients = np.empty((draws, sum(p.numel() for p in parameters)), dtype=np.float32)
    for i in range(draws):
        # The data set has a seed of its own, so that another one here changes the masks and nothing else.
        noisy = replace(config, run=replace(config.run, seed=i))
        objective = build_objective(noisy, training.tokenizer.vocabulary)
        stream = BatchStream(config, training.train_stream.dataset, objective, training.topology)
        micro_batches = accumulate_gradients(
            training,
            lambda reads_tokens, stream=stream: stream.training(Progress(), reads_tokens=reads_tokens),
            step=0,
            num_microbatches=stream.num_microbatches,
        )
        sums = Sums.total(micro_batches, "cpu")
        losses[i] = float(sums.loss / sums.divisor)
        gradients[i] = torch.cat([p.main_grad.flatten().float() for p in parameters]).cpu().numpy()
    return losses, gradients


def measure(training: Any, draws: int) -> dict[str, dict[str, Spread]]:
    """Standard deviations of the loss and the gradient by row; prints the norm that the gradient's are relative to."""
    loss, gradient, norm = {}, {}, 0.0
    for name, options in ROWS.items():
        losses, gradients = noise_of_checkpoint(training, options, draws)
        loss[name] = spread((losses - losses.mean()) ** 2)
        mean = gradients.mean(axis=0, dtype=np.float64)
        gradient[name] = spread(np.array([np.square(g - mean).sum() for g in gradients]))
        if name == "stratified antithetic":  # what the mean of so many draws adds to its own norm is taken off
            norm = float(np.sqrt(max(np.square(mean).sum() - gradient[name].std ** 2 / draws, 1e-30)))
        print(f"  {name}: mean loss {losses.mean():.4f}", flush=True)
    print(f"  norm of the gradient {norm:.3f}")
    relative = {name: Spread(s.std / norm, s.error / norm) for name, s in gradient.items()}
    return {"loss": loss, "gradient / its norm": relative}


def show(title: str, table: dict[str, dict[str, Spread]]) -> None:
    """Print the columns of a table, each with its ratio to the baseline row."""
    print(f"\n{title}")
    print(f"{'standard deviation of':24}" + "".join(f"{column:>24}{'x iid':>9}" for column in table))
    for name in ROWS:
        cells = ""
        for rows in table.values():
            std, error = rows[name]
            cells += f"{f'{std:.4f} +- {error:.4f}':>24}{std / rows[BASELINE].std:>9.3f}"
        print(f"{name:24}{cells}")


def plot(panels: dict[str, dict[str, Spread]], output: Path) -> None:
    """One panel of bars for each column."""
    figure, axes = plt.subplots(1, len(panels), figsize=(1.5 + 3.4 * len(panels), 3.2), sharey=True)
    for axis, (title, rows) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        values = [rows[name].std for name in ROWS]
        errors = [2 * rows[name].error for name in ROWS]
        axis.barh(list(ROWS), values, xerr=errors, color=["C7", "C7", "C0", "C0", "C2", "C1"], capsize=2)
        for row, (value, error) in enumerate(zip(values, errors, strict=True)):
            axis.text(value + error, row, f" {value / rows[BASELINE].std:.2f}", va="center", fontsize=8)
        longest = max(value + error for value, error in zip(values, errors, strict=True))
        axis.set(title=title, xlabel="std over masks (number: x iid)", xlim=(0, 1.2 * longest))
        axis.title.set_fontsize(9)
        axis.grid(axis="x", alpha=0.3)
    np.atleast_1d(axes)[0].invert_yaxis()  # shared
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="directory of a run, or of one of its checkpoints")
    at = "where the run was started: its data paths are relative to that (default: here)"
    parser.add_argument("--started-in", type=Path, default=Path(), metavar="DIR", help=at)
    few = "global batches a row on the checkpoint (default 64: five minutes on one core for the demo, errors of 9 %%)"
    parser.add_argument("--draws", type=int, default=64, help=few)
    many = "global batches a row on the synthetic problem (default 2000: some seconds)"
    parser.add_argument("--synthetic-draws", type=int, default=2000, help=many)
    parser.add_argument("--output", type=Path, help="figure to write")
    options = parser.parse_args(arguments)
    checkpoint, output = (p and p.absolute() for p in (options.checkpoint, options.output))
    table = synthetic(options.synthetic_draws)
    show(f"Synthetic problem: {BATCH} sequences of {SEQ} tokens, {options.synthetic_draws} draws", table)
    panels = {f"synthetic: {column}": rows for column, rows in table.items()}
    if checkpoint:
        try:
            os.chdir(options.started_in)
            training = load(checkpoint)
        except (ConfigError, DataError, OSError) as error:
            print(f"estimator_variance: {error}", file=sys.stderr)
            return 2
        print(f"\n{checkpoint}: {options.draws} draws")
        table = measure(training, options.draws)
        show(f"{checkpoint.name}: global batches of {training.config.train.global_batch_size} rows", table)
        panels |= {f"{checkpoint.name}: {column}": rows for column, rows in table.items()}
    if output:
        plot(panels, output)
        print(f"\n{output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
