"""`data.verify`: which files a start reads, and that every rank refuses what was not prepared."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_dlm.data.tokenizer import load_tokenizer
from megatron_dlm.errors import DataError
from megatron_dlm.parallel import topology as parallel
from megatron_dlm.preparation.prepare import PrepareOptions, prepare
from megatron_dlm.training.setup import open_data
from megatron_dlm.training.verification import verify_data
from tests.ranks import run_ranks
from tests.runs import tiny_config

ROOT = Path(__file__).parents[2]


def outcomes(folder: Path, cases: list[tuple[str, str, str]]) -> list[list[str | None]]:
    """What every (prefix of the training data, of the held-out data, data.verify) is refused with, on each rank."""
    parallel.initialize(tiny_config(folder).parallel)
    found: list[str | None] = []
    for train, valid, verify in cases:
        data = {"train": [{"path": str(folder / train)}], "valid": [{"path": str(folder / valid)}], "verify": verify}
        config = tiny_config(folder, data=data)
        try:
            verify_data(config, *open_data(config, load_tokenizer("byte")))
            found.append(None)
        except DataError as error:
            found.append(str(error))
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return everywhere


def test_what_has_changed_is_read_and_refused_on_all_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepare(PrepareOptions(output=tmp_path / "good", inputs=[ROOT / "LICENSE"], tokenizer="byte"))
    for name in ("kept", "copied", "bad", "forged", "old"):
        shutil.copytree(tmp_path / "good", tmp_path / name)  # with times
        path = tmp_path / name / "train.bin"
        times = os.stat(path)
        if name in ("bad", "forged"):
            with path.open("r+b") as file:
                file.seek(4000)
                file.write(b"A\0B\0C\0")
            os.utime(path, (1, 1) if name == "bad" else (times.st_atime, times.st_mtime))
    for suffix in ("bin", "idx"):
        os.utime(tmp_path / "copied" / f"train.{suffix}", (1, 1))
    old = json.loads((tmp_path / "old" / "train.json").read_text())
    kept = {key: value for key, value in old.items() if not key.endswith(("_sha256", "_mtime"))}
    (tmp_path / "old" / "train.json").write_text(json.dumps(kept))
    wanted = [  # training and held-out data, data.verify, whether it is refused, how many files are read
        ("kept", "good", "auto", False, 0),
        ("copied", "good", "auto", False, 2),
        ("bad", "good", "auto", True, 1),
        ("good", "bad", "auto", True, 1),
        ("bad", "good", "never", False, 0),
        ("forged", "good", "auto", False, 0),
        ("forged", "good", "always", True, 4),
        ("old", "good", "auto", False, 0),
        ("old", "good", "always", False, 2),
        ("good", "good", "auto", False, 0),
    ]
    cases = [(f"{train}/train", f"{valid}/train", verify) for train, valid, verify, *_ in wanted]
    first, second = run_ranks(outcomes, 2, tmp_path, tmp_path, cases)
    assert first == second
    assert [fault is not None for fault in first] == [refused for *_, refused, _ in wanted]
    assert all("train.bin is not what was prepared (SHA-256" in fault for fault in first if fault)
    said = capfd.readouterr().err
    assert said.count("verify     ") == sum(read for *_, read in wanted)
    assert said.count("old/train cannot be verified: it was prepared without") == 1
    assert said.count("good/train is trained on too") == 1
