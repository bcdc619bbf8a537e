"""Joining the workers that torchrun started, and how many to start without it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from megatron_dlm import cli
from megatron_dlm.config.tree import Config, ParallelConfig, RunConfig
from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.launch import launcher as launch
from megatron_dlm.launch import place


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(run=RunConfig(directory=str(tmp_path / "run")))


def status(config: Config) -> dict:
    return json.loads(Path(config.run.directory, "status.json").read_text())


@pytest.mark.parametrize(("rank", "local_rank"), [(0, 0), (1, 1), (2, 0)])
@pytest.mark.parametrize("error", [ConfigError("bad key"), DataError("bad file"), None])
def test_joining_torchrun(config, capfd, monkeypatch, rank, local_rank, error):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("WORLD_SIZE", "3")
    ran = []

    def check(config: Config, world_size: int) -> None:
        assert world_size == 3
        if error:
            raise error

    code = launch.join(lambda mapping: ran.append(mapping["run"]["seed"]), config, check)
    checks = local_rank == 0 and error is not None
    prints = checks and (rank == 0 or isinstance(error, DataError))
    assert code == (2 if checks else 0)
    assert ran == ([] if checks else [1234])
    assert capfd.readouterr().err == (f"megatron-dlm: error: {error}\n" if prints else "")
    assert Path(config.run.directory, "status.json").exists() == (rank == 0)
    if rank == 0:
        assert status(config)["exit_code"] == code


def test_joining_torchrun_passes_on_the_exit_code(config, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launch.join(lambda mapping: sys.exit(75), config) == 75
    assert status(config)["exit_code"] == 75
    assert launch.join(lambda mapping: 1 / 0, config) == 1
    assert "ZeroDivisionError" in status(config)["reason"] and "Traceback" in capfd.readouterr().err


def test_torchrun_is_recognised(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert not place.adopt()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK is not"):
        place.adopt()
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    assert place.adopt()


@pytest.mark.parametrize(
    ("name", "value", "bounds"),
    [
        ("RANK", "7", "0 to 1"),
        ("RANK", "-1", "0 to 1"),
        ("WORLD_SIZE", "two", "1 to 2147483647"),
        ("WORLD_SIZE", "0", "1 to 2147483647"),
        ("LOCAL_RANK", "2", "0 to 1"),
        ("MASTER_PORT", "99999999", "1 to 65535"),
        ("MASTER_PORT", "9" * 10_000, "1 to 65535"),
    ],
    ids=range(7),
)
def test_variables_that_are_no_place(monkeypatch, capsys, name, value, bounds):
    place = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="a", MASTER_PORT="1")
    for key, text in (place | {name: value}).items():
        monkeypatch.setenv(key, text)
    assert cli.main(["train", "--run.seed", "1"]) == 2
    line = capsys.readouterr().err  # also where RANK is that of no process
    assert f"variable {name} is " in line and f"; it must be from {bounds}: start with torchrun" in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("gpus", "data_parallel_size", "expected"),
    [(0, None, 4), (0, 3, 12), (8, None, 8), (8, 2, 8), (16, 2, 8), (4, 2, None)],
)
def test_number_of_workers(monkeypatch, gpus, data_parallel_size, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = Config(
        parallel=ParallelConfig(
            tensor_model_parallel_size=2, pipeline_model_parallel_size=2, data_parallel_size=data_parallel_size
        )
    )
    if expected is None:
        with pytest.raises(ConfigError, match="needs 8 GPUs but this machine has 4"):
            launch.count_workers(config)
    else:
        assert launch.count_workers(config) == expected
