"""Which of a run's processes this one is, as torchrun, srun or mpirun has told it.

torch reads torchrun's variables; ``adopt`` gives it the same from those of the other two.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from megatron_dlm.errors import ConfigError

_FIRST_PORT, _PORTS = 15_000, 15_000  # below those that Linux gives to connections (32768)


class Place(NamedTuple):
    """This process among those of the run."""

    rank: int
    world_size: int
    local_rank: int
    """Of this machine's processes."""
    address: str
    """Host of rank 0."""
    port: int
    """Where rank 0, or torchrun's agent beside it, listens."""


def adopt(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several that a launcher started; torch's variables then say which.

    Raises ``ConfigError`` if it cannot be told which.
    """
    place = find(environment)
    if place is None:
        return False
    environment["RANK"], environment["WORLD_SIZE"] = str(place.rank), str(place.world_size)
    environment["LOCAL_RANK"] = str(place.local_rank)
    environment["MASTER_ADDR"], environment["MASTER_PORT"] = place.address, str(place.port)
    return True


def is_first_rank() -> bool:
    """Whether this process is the one that prints and writes; known before there are process groups."""
    try:
        return not adopt() or os.environ["RANK"] == "0"
    except ConfigError:  # it is none of several, and says so
        return True


def find(environment: Mapping[str, str]) -> Place | None:
    """The place that the variables name, those of the innermost launcher first; None for a process on its own.

    Raises ``ConfigError`` where they are incomplete, contradict each other, or are no numbers.
    """
    if "WORLD_SIZE" in environment:  # torchrun, perhaps inside a job of srun
        return _of_torchrun(environment)
    if _several(environment, "OMPI_COMM_WORLD_SIZE"):  # mpirun, whose daemons srun may have started
        return _of_mpirun(environment)
    if "SLURM_STEP_ID" in environment and _several(environment, "SLURM_STEP_NUM_TASKS"):
        return _of_srun(environment)
    return None


def refuse_batch_script(environment: Mapping[str, str] = os.environ) -> None:
    """Raise ``ConfigError`` in the script of a Slurm job on several nodes, which is no place to train in."""
    nodes = environment.get("SLURM_JOB_NUM_NODES", "1")
    if find(environment) is None and "SLURM_STEP_ID" not in environment and nodes.isdigit() and int(nodes) > 1:
        raise ConfigError(
            f"this job has {nodes} nodes and only this one would be used; put srun or torchrun before the command "
            "(or unset SLURM_JOB_NUM_NODES to use one node)"
        )


def refuse_idle_gpus(gpus: int, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ``ConfigError`` where srun has started one process on each node, and each sees ``gpus``, more than one."""
    nodes, tasks = environment.get("SLURM_STEP_NUM_NODES"), environment.get("SLURM_STEP_NUM_TASKS")
    if gpus > 1 and nodes == tasks is not None and "TORCHELASTIC_RUN_ID" not in environment:
        raise ConfigError(
            f"srun has started one process on this node, which has {gpus} GPUs; use srun --ntasks-per-node={gpus}, or "
            "torchrun in its place on every node"
        )


def _of_torchrun(environment: Mapping[str, str]) -> Place:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in environment:
            raise ConfigError(f"WORLD_SIZE is set but {name} is not; start with torchrun, or unset WORLD_SIZE")
    return _place(environment, "RANK", "WORLD_SIZE", "LOCAL_RANK", environment["MASTER_ADDR"])


def _of_mpirun(environment: Mapping[str, str]) -> Place:
    size, local = environment["OMPI_COMM_WORLD_SIZE"], environment.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    address = environment.get("MASTER_ADDR") or ("127.0.0.1" if local == size else None)
    if address is None:
        raise ConfigError(
            "mpirun does not say where rank 0 is; add -x MASTER_ADDR=HOST, the first host of the job (and -x "
            "MASTER_PORT=PORT)"
        )
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
    job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid", "")
    return _place(environment, *names, address, job=job)


def _of_srun(environment: Mapping[str, str]) -> Place:
    address = environment.get("MASTER_ADDR")
    if not address:
        address = first_host(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", ""))
    job = f"{environment.get('SLURM_JOB_ID', '')}.{environment['SLURM_STEP_ID']}"
    return _place(environment, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", address, job=job)


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes, such as node7 of ``node[7-9,12],other``. Raises ``ConfigError``."""
    found = re.match(r"([^,\[\]]+)(?:\[(\d+)[^\]]*\]([^,\[\]]*))?(?:,|$)", nodes)
    if not found:
        raise ConfigError(f"cannot tell the first node from Slurm's list {nodes!r}; set MASTER_ADDR to it")
    return "".join(part or "" for part in found.groups())


def _place(environment: Mapping[str, str], rank: str, size: str, local: str, address: str, job: str = "") -> Place:
    """The place that the variables of these names give, checked.

    Args:
        job: names the run where no port is given: all its processes, and no others, choose the same one.
    """
    port = _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS
    if "MASTER_PORT" in environment:
        port = _number(environment, "MASTER_PORT", 1, 2**16)
    world_size = _number(environment, size, 1, 2**31)
    return Place(
        _number(environment, rank, 0, world_size),
        world_size,
        _number(environment, local, 0, world_size),
        address,
        port,
    )


def _number(environment: Mapping[str, str], name: str, low: int, high: int) -> int:
    """The number in a variable. Raises ``ConfigError`` unless it is at least ``low`` and below ``high``."""
    text = environment.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 12 and low <= int(text) < high):
        raise ConfigError(
            f"the environment variable {name} is {text[:40]!r}; it must be from {low} to {high - 1}: start with "
            "torchrun, srun or mpirun, or unset it"
        )
    return int(text)


def _several(environment: Mapping[str, str], name: str) -> bool:
    return name in environment and _number(environment, name, 1, 2**31) > 1
