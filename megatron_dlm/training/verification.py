"""Whether the data of a run is what was prepared: files are read once, divided over the ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_dlm.checkpoint.collective import on_rank_zero
from megatron_dlm.config.tree import Config
from megatron_dlm.data.dataset import Dataset
from megatron_dlm.data.token_file import TokenFile
from megatron_dlm.errors import DataError
from megatron_dlm.formatting import format_count


def verify_data(config: Config, train: Dataset, valid: Dataset | None) -> None:
    """Compare the files that `data.verify` says with the digests of `prepare`; collective. Rank 0 names what is read.

    Raises:
        DataError: one has another content, or cannot be read; on all ranks.
    """
    held_out = valid.files if valid else []
    files = {file.identity: file for file in (*train.files, *held_out)}.values()

    def choose() -> list[Path]:
        trained_on = [file.identity for file in train.files]
        for file in held_out:
            if file.identity in trained_on:
                _warn(f"{file.prefix} is trained on too, so the NELBO of data.valid is no held-out one; name another")
        return _choose(config, list(files))

    chosen = on_rank_zero(choose)  # time stamps need not look the same on all nodes
    own = [record for file in files for record in file.recorded() if record.path in chosen]
    fault = None
    try:
        for record in own[dist.get_rank() :: dist.get_world_size()]:
            record.verify()
    except DataError as error:
        fault = str(error)
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    if found := [fault for fault in faults if fault]:
        raise DataError(found[0])


def _choose(config: Config, files: list[TokenFile]) -> list[Path]:
    """The files to read."""
    chosen = []
    for file in files if config.data.verify != "never" else []:
        records = file.recorded()
        if not records and config.data.verify == "always":
            _warn(f"{file.prefix} cannot be verified: it was prepared without digests; prepare it again")
        for record in records:
            if config.data.verify == "always" or record.touched():
                size = format_count(os.path.getsize(record.path))
                print(f"verify     {record.path} ({size} bytes) against its SHA-256", file=sys.stderr, flush=True)
                chosen.append(record.path)
    return chosen


def _warn(text: str) -> None:
    print(f"megatron-dlm: warning: {text}", file=sys.stderr, flush=True)
