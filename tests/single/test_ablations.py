"""The knobs of the study act in training and never in evaluation, and both arms read the same data in every epoch."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from megatron_dlm.config.load import from_dict
from megatron_dlm.config.tree import Config
from megatron_dlm.data.dataset import Dataset
from megatron_dlm.diffusion.objective import build_objective
from megatron_dlm.parallel.topology import initialize
from megatron_dlm.shipped.sampler_plan import Vocabulary
from megatron_dlm.training.batches import BatchStream
from megatron_dlm.training.held_out import held_out_nelbo
from megatron_dlm.training.progress import Progress
from megatron_dlm.training.setup import build
from megatron_dlm.training.step import train_step
from tests.runs import tiny_config
from tests.single.test_dataset import numbered

ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "attention dropout": {"model": {"attention_dropout": 0.2}},
    "hidden dropout": {"model": {"hidden_dropout": 0.2}},
    "input masking": {"autoregressive": {"input_mask_ratio": 0.3}},
}
OBJECTIVES = ["masked_diffusion", "autoregressive"]


def figures(data: Path, objective: str, **sections: dict[str, Any]) -> tuple[float, float, float]:
    """(loss of step 0, held-out NELBO before it, held-out NELBO after it)."""
    model = {"num_layers": 2, "objective": objective, **sections.pop("model", {})}
    config = tiny_config(data, model=model, **sections)
    training = build(config, initialize(config.parallel))

    def held_out() -> float:
        stream, topology = training.valid_stream, training.topology
        return held_out_nelbo(training.chunks, stream, topology, num_sequences=training.valid_sequences).nelbo

    before = held_out()
    return train_step(training, training.progress_at(0)).loss, before, held_out()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ablations_act_in_training_and_not_in_evaluation(objective: str, tiny_data: Path) -> None:
    loss, before, after = figures(tiny_data, objective)
    for name, sections in ABLATIONS.items():
        here = figures(tiny_data, objective, **sections)
        acts = name != "input masking" or objective == "autoregressive"
        assert here[1] == before, f"{name}: the same weights have the same held-out value"
        assert (here[0] != loss) == acts, name
        assert (here[2] != after) == acts, f"{name}: other gradients, other weights"


SEQ, BATCH, UNIQUE, CORPUS, EPOCHS = 8, 16, 600, 1000, 3
PER_EPOCH = UNIQUE // SEQ
END, MASK = CORPUS, CORPUS + 1


class Reading(NamedTuple):
    """What a run reads, by sample id."""

    clean: np.ndarray
    """[samples, seq] int64; in this corpus every token is another one."""
    masked: np.ndarray
    """[samples, seq] bool: which inputs were [MASK]."""
    counts: Counter[int]
    """How often each sample was read."""


def read(config: Config, dataset: Dataset, steps: int, replicas: int) -> Reading:
    """Everything that the replicas' streams give in ``steps`` steps."""
    objective = build_objective(config, Vocabulary(MASK, END))
    clean, masked = (np.full((steps * BATCH, SEQ), -1) for _ in range(2))
    counts: Counter[int] = Counter()
    one = initialize(config.parallel)
    for rank in range(replicas):
        stream = BatchStream(config, dataset, objective, replace(one, data_size=replicas, data_rank=rank))
        for step in range(steps):
            for micro_batch in stream.training(
                Progress(step, step * config.train.global_batch_size), reads_tokens=True
            ):
                ids, batch = micro_batch.sample_ids, micro_batch.batch
                inputs = batch.inputs.numpy()
                rows = np.arange(inputs.size) if batch.rows is None else batch.rows.numpy()
                original = inputs.copy().reshape(-1)
                original[rows] = batch.targets.numpy()
                clean[ids], masked[ids] = original.reshape(inputs.shape), inputs == MASK
                counts.update(ids.tolist())
    return Reading(clean, masked.astype(bool), counts)


@pytest.mark.parametrize("replicas", [1, 2])
def test_both_arms_read_the_same_unique_tokens_in_every_epoch(replicas: int, tmp_path: Path) -> None:
    source = numbered(tmp_path / "numbers", CORPUS)
    dataset = Dataset([source], sequence_length=SEQ, seed=5, unique_tokens=UNIQUE)
    steps = math.ceil(EPOCHS * PER_EPOCH / BATCH)
    arms = {}
    for objective in OBJECTIVES:
        config = from_dict(
            {
                "run": {"seed": 5},
                "model": {"objective": objective},
                "diffusion": {"random_length_probability": 0.0},
                "autoregressive": {"input_mask_ratio": 0.3},
                "data": {"sequence_length": SEQ},
                "train": {"steps": steps, "micro_batch_size": 2, "global_batch_size": BATCH},
            }
        )
        arms[objective] = arm = read(config, dataset, steps, replicas)
        assert arm.counts == Counter(range(steps * BATCH)), "every sample once, over all micro-batches and replicas"
        assert set(arm.clean.ravel().tolist()) == set(range(UNIQUE)), "these tokens are read, and no others ever"
        epochs = [slice(e * PER_EPOCH, (e + 1) * PER_EPOCH) for e in range(EPOCHS)]
        for epoch in epochs:
            assert np.array_equal(np.sort(arm.clean[epoch].ravel()), np.arange(UNIQUE)), "each of them once an epoch"
        # By token: whether it was masked in this epoch.
        by_token = [arm.masked[epoch].ravel()[np.argsort(arm.clean[epoch].ravel())] for epoch in epochs]
        if objective == "autoregressive":  # the inputs are the sequences shifted by one
            assert arm.masked.mean() == pytest.approx(0.3, abs=0.05)
        for one, other in ((0, 1), (1, 2), (0, 2)):
            assert np.mean(arm.clean[epochs[one], 0] == arm.clean[epochs[other], 0]) < 0.1, "in another order"
            assert 0.3 < np.mean(by_token[one] == by_token[other]) < 0.75, "with new masks"
    first, second = arms.values()
    assert np.array_equal(first.clean, second.clean), "the arms differ in nothing that they read, nor in its order"


def test_an_epoch_ends_within_a_global_batch(tmp_path: Path) -> None:
    """75 sequences in batches of 16: the fifth has the last 11 of one epoch and the first 5 of the next."""
    dataset = Dataset([numbered(tmp_path / "n", CORPUS)], sequence_length=SEQ, seed=5, unique_tokens=UNIQUE)
    ids = np.arange(4 * BATCH, 5 * BATCH)
    assert Counter(dataset.locate(i).epoch for i in ids) == {0: 11, 1: 5}
    assert dataset.epoch(4 * BATCH) < 1 < dataset.epoch(5 * BATCH)
    rows, rest = dataset.sequences(ids), dataset.sequences(np.arange(4 * BATCH))
    assert set(rows[:11].ravel().tolist()) == set(range(UNIQUE)) - set(rest.ravel().tolist())
