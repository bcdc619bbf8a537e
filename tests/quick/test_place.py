"""Which process this one is: variables of torchrun, srun and mpirun; and what torchrun does after a stop."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_dlm.config.tree import Config, RunConfig
from megatron_dlm.errors import ConfigError
from megatron_dlm.launch import launcher, place, restart

TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
BATCH = {
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NUM_NODES": "2",
}
SRUN = BATCH | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[03-04]",
}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
MPIRUN |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-77"}


@pytest.fixture
def environment(monkeypatch):
    """An environment of no launcher, and a function that adds to it; what ``adopt`` adds ends with the test."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name in {*TORCHRUN, *SRUN, *MPIRUN} or name.startswith(("TORCHELASTIC", "SLURM", "OMPI")):
            monkeypatch.delenv(name)
    yield lambda variables: [monkeypatch.setenv(*item) for item in variables.items()]
    os.environ.clear()
    os.environ.update(before)


def test_the_launchers_agree_on_what_torch_reads(environment, monkeypatch):
    assert place.find({}) is None and not place.adopt({}) and place.is_first_rank()
    assert place.find(TORCHRUN) == place.Place(3, 4, 1, "node0", 29500)
    port = place.find(SRUN).port
    assert place.find(SRUN) == place.Place(3, 4, 1, "node03", port) and 15_000 <= port < 30_000
    other_step, other_rank = SRUN | {"SLURM_STEP_ID": "1"}, SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert place.find(other_rank).port == port != place.find(other_step).port
    assert place.find(MPIRUN)[:4] == (3, 4, 3, "127.0.0.1")
    given = {"MASTER_ADDR": "here", "MASTER_PORT": "1234"}
    for variables in (SRUN, MPIRUN):
        assert place.find(variables | given)[3:] == ("here", 1234)
        adopted = dict(variables)
        assert place.adopt(adopted) and {*TORCHRUN} <= {*adopted}
        assert place.find(adopted) == place.find(variables), "as from torchrun from then on"
    environment(SRUN)
    assert not place.is_first_rank() and os.environ["RANK"] == "3"


def test_the_innermost_launcher_counts():
    assert place.find(SRUN | TORCHRUN).address == "node0", "torchrun, one agent a node started by srun"
    daemons = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    assert place.find(daemons | MPIRUN).world_size == 4, "mpirun, one daemon a node started by srun"
    for alone in (BATCH, SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, MPIRUN | {"OMPI_COMM_WORLD_SIZE": "1"}):
        assert place.find(alone) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[07-9,12],m", "n07"),
        ("n[3]", "n3"),
        ("x-[1-2]-ib,y", "x-1-ib"),
        ("a1.b.c", "a1.b.c"),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert place.first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", ",", "[1-2]", "a[", "a[x-y]"])
def test_a_list_without_a_first_host(nodes):
    with pytest.raises(ConfigError, match="set MASTER_ADDR"):
        place.first_host(nodes)


@pytest.mark.parametrize(
    "variables",
    [
        *[
            {name: value for name, value in TORCHRUN.items() if name != left}
            for left in TORCHRUN
            if left != "WORLD_SIZE"
        ],
        *[
            TORCHRUN | {name: value}
            for name, values in {
                "RANK": ["4", "-1", "x", "", "1e3", "3.0", "9" * 40],
                "WORLD_SIZE": ["0", "-4", "four", str(2**31)],
                "LOCAL_RANK": ["4", "one"],
                "MASTER_PORT": ["0", "65536", "99999999", "port"],
            }.items()
            for value in values
        ],
        {name: value for name, value in SRUN.items() if name != "SLURM_PROCID"},
        SRUN | {"SLURM_STEP_NUM_TASKS": "many"},
        SRUN | {"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""},
        MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
        MPIRUN | {"OMPI_COMM_WORLD_RANK": "4"},
    ],
)
def test_what_cannot_be_is_one_line(variables):
    with pytest.raises(ConfigError) as error:
        place.find(variables)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_batch_script_of_several_nodes_is_no_place_to_train(environment):
    place.refuse_batch_script({})
    place.refuse_batch_script(BATCH | {"SLURM_JOB_NUM_NODES": "1"})
    place.refuse_batch_script(SRUN)
    with pytest.raises(ConfigError, match="put srun or torchrun before"):
        place.refuse_batch_script(BATCH)


def test_one_process_for_several_gpus():
    one_a_node = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
    with pytest.raises(ConfigError, match="--ntasks-per-node=8"):
        place.refuse_idle_gpus(8, one_a_node)
    place.refuse_idle_gpus(1, one_a_node)
    place.refuse_idle_gpus(8, one_a_node | {"TORCHELASTIC_RUN_ID": "job"})
    place.refuse_idle_gpus(8, SRUN | {"SLURM_STEP_NUM_NODES": "2"})
    place.refuse_idle_gpus(8, {})


def test_torchrun_does_not_start_again_what_a_signal_has_stopped(environment, tmp_path, capfd):
    config, ran = Config(run=RunConfig(directory=str(tmp_path / "run"))), []

    def work(code: int, warned: bool) -> None:
        ran.append("work")
        if warned:
            os.kill(os.getpid(), signal.SIGUSR1)
        exit(code)

    def start(attempt: int, run_id: str = "job", code: int = 0, warned: bool = False) -> int:
        environment(TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": run_id})
        environment({"TORCHELASTIC_RESTART_COUNT": str(attempt), "TORCHELASTIC_MAX_RESTARTS": "3"})
        ran.append((run_id, attempt))
        return launcher.join(lambda mapping: work(code, warned), config)

    assert start(0, code=1) == 1 and start(1, code=75) == 75 and start(2, code=75) == 75
    assert ran == [("job", 0), "work", ("job", 1), "work", ("job", 2), "work"], "a failure, or torchrun's own SIGTERM"
    assert start(2, warned=True) == 75 and ran[-1] == "work"
    assert start(3) == 75 and ran[-1] == ("job", 3), "what a warning has stopped is not started again"
    assert "not started again" in capfd.readouterr().err
    assert start(0) == 0 and ran[-1] == "work", "but a new start is"
    assert start(1) == 0 and ran[-1] == "work" and not (tmp_path / "run" / ".stopped").exists()


def test_a_save_that_takes_longer_than_torchrun_waits(environment, monkeypatch):
    assert restart.warn_of_slow_save(1e9) is None, "without torchrun nobody waits"
    environment({"TORCHELASTIC_RUN_ID": "job"})
    assert restart.warn_of_slow_save(29) is None
    assert "a save took 31 s" in restart.warn_of_slow_save(31) and "--shutdown-timeout 62" in restart.warn_of_slow_save(
        31
    )
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    assert restart.warn_of_slow_save(31) is None and "120 s after" in restart.warn_of_slow_save(121)
    for options in (["--shutdown-timeout", "7"], ["--shutdown_timeout=7"]):
        monkeypatch.setattr(
            restart.psutil.Process, "cmdline", lambda self, options=options: ["torchrun", *options, "x"]
        )
        assert "7 s after" in restart.warn_of_slow_save(8)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    from megatron_dlm.launch import run_lock

    config = Config(run=RunConfig(directory=str(tmp_path / "run")))
    owner = tmp_path / "run" / ".owner.json"

    def no_locks(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "flock", no_locks)
    with run_lock.directory_in_use(config):
        with pytest.raises(ConfigError, match=rf"another run \(process {os.getpid()} on .*wait for its end"):
            with run_lock.directory_in_use(config):
                pass
        assert owner.exists(), "the refused one has left it alone"
    assert not owner.exists()
    for dead in ('{"host": "elsewhere", "process": 1}', "", "[]"):  # of a machine that was switched off a while ago
        owner.write_text(dead)
        with pytest.raises(ConfigError, match="another run"):
            with run_lock.directory_in_use(config):
                pass
        os.utime(owner, (0, 0))
        with run_lock.directory_in_use(config):
            assert str(os.getpid()) in owner.read_text()
    for gone in (2**22 + 1, os.getpid()):  # no process has such a number; one that began later has it by now
        owner.write_text(f'{{"host": "{os.uname().nodename}", "process": {gone}, "started": 1.5}}')
        with run_lock.directory_in_use(config):
            pass
    assert sorted(path.name for path in owner.parent.iterdir()) == [".lock"]
