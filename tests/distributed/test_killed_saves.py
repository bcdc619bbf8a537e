"""kill -9 at random moments of saves: the run goes on from a complete checkpoint, exactly."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from megatron_dlm.checkpoint.stored import find_fault
from megatron_dlm.config.tree import Config
from megatron_dlm.parallel import topology as parallel
from megatron_dlm.training import saving as checkpoint
from megatron_dlm.training.setup import build
from megatron_dlm.training.step import train_step
from tests.ranks import run_ranks, start_ranks
from tests.resuming import continue_run, digest
from tests.runs import tiny_config

STEPS_PER_TRY = 3


def save_every_step(config: Config, log: Path, last: int | None) -> str:
    """Go on from what is there, saving after each step; ``log`` gets a line when a save begins, and of what step.

    Ends after the step ``last``; without it, goes on until it is killed.
    """
    training = build(config, parallel.initialize(config.parallel))
    _, progress = checkpoint.resume(training)
    while last is None or progress.step < last:
        report = train_step(training, progress)
        progress = progress.after(config.train.global_batch_size, applied=report.applied)
        if training.topology.rank == 0:
            with log.open("a") as file:
                file.write(json.dumps([progress.step, report.loss, report.grad_norm]) + "\n")
        checkpoint.save(training, progress)
    return digest(training)


@pytest.mark.parametrize(
    ("tensor", "world", "tries"),
    [(1, 2, 20), (2, 4, 2), pytest.param(2, 4, 20, marks=pytest.mark.slow)],
    ids=["DP2", "TP2-DP2", "TP2-DP2-often"],
)
def test_kills_at_random_moments_of_a_save(
    tensor: int, world: int, tries: int, tiny_data: Path, tmp_path: Path
) -> None:
    run = {"directory": str(tmp_path / "run"), "seed": 7}
    small = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48}
    config = tiny_config(
        tiny_data,
        run=run,
        model=small,
        parallel={"tensor_model_parallel_size": tensor, "data_parallel_size": 2},
        checkpoint={"keep": 2},
        train={"steps": 10_000},
    )
    log, moments, root = tmp_path / "steps.jsonl", random.Random(0), checkpoint.checkpoint_root(config)
    log.touch()
    interrupted = 0
    for _ in range(tries):
        lines = len(log.read_text().splitlines())
        ranks = start_ranks(save_every_step, world, tmp_path, config, log, None)
        wanted = lines + moments.randint(1, STEPS_PER_TRY)
        while len(log.read_text().splitlines()) < wanted and all(rank.is_alive() for rank in ranks):
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.12))  # a save takes about as long
        for rank in ranks:
            assert rank.exitcode is None, (tmp_path / "error-0.txt").read_text()
            rank.kill()
        for rank in ranks:
            rank.join()
        interrupted += bool(list(root.glob(".step-*.partial*")))
    reached = max(json.loads(line)[0] for line in log.read_text().splitlines())
    end = run_ranks(save_every_step, world, tmp_path, config, log, reached + 1)

    config.run.directory = str(tmp_path / "straight")
    straight, straight_end = run_ranks(continue_run, world, tmp_path, config, 0, reached + 1, None)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    print(
        f"KILLS {tries} at TP{tensor}-DP2, {interrupted} within a save; {len(records)} steps for {reached + 1}, "
        "equal to a straight run"
    )
    assert interrupted >= tries // 4, "the kills must hit saves"
    assert [record[1:] for record in records] == [list(straight[record[0] - 1]) for record in records]
    assert end == straight_end


def test_nobody_waits_for_a_dead_writer(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, run={"directory": str(tmp_path / "run")}, parallel={"data_parallel_size": 2})
    log = tmp_path / "steps.jsonl"
    log.touch()
    survivor, victim = start_ranks(save_every_step, 2, tmp_path, config, log, None)
    while len(log.read_text().splitlines()) < 3:
        time.sleep(0.001)
    victim.kill()
    survivor.join()
    assert survivor.exitcode == 1, "it failed by itself"
    root = checkpoint.checkpoint_root(config)
    latest = root / (root / "latest").read_text().strip()
    assert find_fault(latest) is None
