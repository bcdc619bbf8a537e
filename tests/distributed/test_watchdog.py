"""A run that does not go on: who is named, what is written, and what nobody may connect to."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import psutil
import torch.distributed as dist

from megatron_dlm.config.tree import Config, ParallelConfig, RunConfig
from megatron_dlm.launch.launcher import launch
from megatron_dlm.launch.run_lock import directory_in_use
from megatron_dlm.parallel import topology as parallel
from megatron_dlm.parallel.pulse import PULSE
from megatron_dlm.run_folder import RunFolder
from megatron_dlm.training import watchdog
from megatron_dlm.training.watchdog import Beat, Watchdog

SECONDS = 3.0


def run_config(folder: Path) -> Config:
    run = RunConfig(directory=str(folder / "run"), step_timeout_minutes=SECONDS / 60, timeout_minutes=SECONDS / 60)
    return Config(run=run)


def one_thinks(config: dict) -> None:
    """Rank 1 is busy in Python while rank 0 waits for it in a collective; both are in the same step."""
    parallel.initialize(ParallelConfig())
    rank = dist.get_rank()
    listening = [found.laddr.ip for found in psutil.Process().net_connections() if found.status == "LISTEN"]
    Path(config["run"]["directory"], f"listening-{rank}").write_text(" ".join(listening))
    with Watchdog(RunConfig(**config["run"]), rank, 2):
        PULSE.begin("training", 3)
        if rank == 1:
            watchdog._in_time(threading.Event().wait, 3600)
        dist.barrier()


def test_a_rank_that_is_elsewhere_is_named(tmp_path: Path, capfd) -> None:
    config = run_config(tmp_path)
    folder = RunFolder(Path(config.run.directory))
    assert launch(one_thinks, config, 2) == 1
    error = capfd.readouterr().err
    print(error)
    assert error.count("\n") == 1 and "no progress in 3 seconds of training at step 3: rank " in error
    assert "is at training, step 3, in training/watchdog.py:" in error and "while 1 of 2 are at" in error
    assert f"[rank {'01'['[rank 1]' in error]}] {folder.status().reason}\n" in error
    for rank, name in enumerate(("barrier", "_in_time")):
        assert name in (folder.stacks / f"rank-{rank:05d}.txt").read_text()
    listening = [(folder.path / f"listening-{rank}").read_text() for rank in (0, 1)]
    assert {*" ".join(listening).split()} == {"127.0.0.1"}, "nobody else is to reach a run of one machine"


def late(config: dict) -> None:
    """The others come after the limit, and the run has ended by then."""
    parallel.initialize(ParallelConfig())
    with Watchdog(RunConfig(**config["run"]), 0, 1):
        for phase in ("training", "saving", "training", "evaluating"):  # each takes less than its limit
            PULSE.begin(phase, 1)
            time.sleep(SECONDS * 0.4)
        for _ in range(4):  # and so does everything in this one
            PULSE.beat()
            time.sleep(SECONDS * 0.4)
    assert not RunFolder(Path(config["run"]["directory"])).stacks.exists()
    with Watchdog(RunConfig(**config["run"]), 0, 1):
        threading.Event().wait()


def test_only_what_does_not_go_on_is_ended(tmp_path: Path, capfd) -> None:
    """In a process of its own, where a run of one process would be this one."""
    config = run_config(tmp_path)
    child = os.fork()
    if child == 0:
        os._exit(launch(late, config, 1))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    status = RunFolder(Path(config.run.directory)).status()
    assert "no progress in 3 seconds of evaluating at step 1: it is in launch/launcher.py" in status.reason
    assert capfd.readouterr().err == f"megatron-dlm: error: {status.reason}\n"
    with directory_in_use(config):
        pass


def beat(rank: int, told: int = 5, phase: str = "training", step: int = 7, where: str = "a.py:1 f") -> Beat:
    return Beat(rank, "host", 100 + rank, told, phase, step, where)


def missing(*beats: Beat, before: dict[int, int] | None = None) -> tuple[list[int], str]:
    earlier = [found._replace(told=(before or {}).get(found.rank, found.told - 1)) for found in beats]
    silent, sentence = watchdog._find_missing((earlier, list(beats)))
    return [found.rank for found in silent], sentence


def test_who_is_missing() -> None:
    assert missing(beat(0), beat(1), beat(2), before={1: 5}) == (
        [1],
        "rank 1 (process 101 on host) does not answer, last heard of at training, step 7",
    )
    assert missing(*map(beat, range(4)), before={2: 5, 3: 5})[0] == [2, 3]
    assert "rank 2 (process 102 on host) (and 1 more)" in missing(*map(beat, range(4)), before={2: 5, 3: 5})[1]
    behind = missing(beat(0), beat(1, phase="saving", step=6, where="s.py:2 g"), beat(2))
    assert behind == (
        [],
        "rank 1 (process 101 on host) is at saving, step 6, in s.py:2 g, while 2 of 3 are at training, step 7, in "
        "a.py:1 f",
    )
    assert (
        "rank 2 (process 102 on host) is at training, step 7, in b.py:9 h"
        in missing(beat(0), beat(1), beat(2, where="b.py:9 h"))[1]
    )
    assert missing(beat(0), beat(1)) == ([], "all ranks are in a.py:1 f")


def test_a_question_that_takes_too_long_has_no_answer() -> None:
    assert watchdog._in_time(lambda: 3, 60) == 3
    assert watchdog._in_time(lambda: threading.Event().wait(), 0.01) is None
