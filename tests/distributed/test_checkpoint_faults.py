"""Damage is found before anything is loaded, a crash or a full disk loses nothing, and pickles are refused."""

from __future__ import annotations

import errno
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_dlm.checkpoint import manifest
from megatron_dlm.checkpoint.stored import find_fault
from megatron_dlm.config.tree import Config
from megatron_dlm.errors import ConfigError, TrainingError
from megatron_dlm.parallel import topology as parallel
from megatron_dlm.training import saving as checkpoint
from megatron_dlm.training.setup import build
from megatron_dlm.training.state import Training
from megatron_dlm.training.step import train_step
from tests.ranks import run_ranks
from tests.resuming import digest
from tests.runs import tiny_config

SMALL = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48}
WRITING = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


class Killed(BaseException):
    """The process is gone."""


class Faults:
    """Lets the n-th change of a file or directory below ``root`` fail, and if it was a kill all later ones.

    Python announces these to audit hooks before they happen.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.countdown, self.error = str(root), 0, None
        sys.addaudithook(self._hook)  # there is no way to remove it

    def after(self, count: int, error: BaseException, action: Callable[[], object]) -> bool:
        """Run ``action`` with a fault at the ``count``-th change (from 0); whether there were so many."""
        self.countdown, self.error = count, error
        try:
            action()
        except (Killed, TrainingError):
            pass
        finally:
            self.error = None
        return self.countdown < 0

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.error is None or event not in WRITING or not str(arguments[0]).startswith(self.root):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        self.countdown -= 1
        if self.countdown == -1 or (self.countdown < 0 and isinstance(self.error, Killed)):
            raise self.error


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Config:
    run = {"directory": str(tmp_path / "run"), "seed": 7}
    return tiny_config(tiny_data, run=run, model=SMALL, checkpoint={"keep": 2})


def two_checkpoints(config: Config) -> tuple[Training, Path, dict[int, str]]:
    """A training that saved after its steps 1 and 2, the folder, and the digests of both states."""
    training = build(config, parallel.initialize(config.parallel))
    digests = {}
    for step in (0, 1):
        assert train_step(training, training.progress_at(step)).applied
        checkpoint.save(training, training.progress_at(step + 1))
        digests[step + 1] = digest(training)
    return training, checkpoint.checkpoint_root(config), digests


def variants(directory: Path) -> Iterator[tuple[str, str]]:
    """Damage every file of a checkpoint in three ways, one at a time: (what was done, file)."""
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name, content = path.relative_to(directory).as_posix(), path.read_bytes()
        middle = len(content) // 2
        yield_content = {
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "truncated": content[:-1] if name != manifest.NAME else content[:middle],
        }
        for kind, damaged in yield_content.items():
            path.write_bytes(damaged)
            yield kind, name
        path.unlink()
        yield "missing", name
        path.write_bytes(content)


def find_despite_damage(config: Config, own_rank: int) -> int:
    training, root, _ = two_checkpoints(config)
    newest, count = root / "step-00000002", 0
    if own_rank:  # the file of another rank, damaged by one of them, is found by all
        if training.topology.rank == own_rank:
            path = newest / f"__{own_rank}_0.distcp"
            path.write_bytes(path.read_bytes()[:-100] + bytes(100))
        torch.distributed.barrier()
        assert checkpoint.resume(training)[0] == root / "step-00000001"
        return 1
    for kind, name in variants(newest):
        assert checkpoint.resume(training)[0] == root / "step-00000001", (kind, name)
        assert (root / "latest").read_text() == "step-00000001\n"
        (root / "latest").write_text("step-00000002\n")
        count += 1
    assert checkpoint.resume(training)[0] == newest, "as it was"
    (newest / "common.pt").unlink()
    (root / "step-00000001" / manifest.NAME).unlink()
    with pytest.raises(ConfigError, match=r"common.pt is missing; step-00000001: it has no manifest"):
        checkpoint.resume(training)[0]
    return count


def test_damage_falls_back_to_the_checkpoint_before(
    config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    count = run_ranks(find_despite_damage, 1, tmp_path, config, 0)
    lines = capfd.readouterr().err.splitlines()
    assert count == len(lines) >= 3 * 7
    for kind, name, text in (
        ("flipped", "__0_0.distcp", "the content of __0_0.distcp has changed since it was written"),
        ("truncated", ".metadata", ".metadata has "),
        ("missing", "tokenizer/tokenizer.byte", "tokenizer/tokenizer.byte is missing"),
        ("missing", manifest.NAME, "it has no manifest.json, so it was not completed"),
    ):
        assert any(text in line for line in lines), (kind, name)
    assert all(
        line.endswith("; continuing from step-00000001") and "step-00000002 is damaged" in line for line in lines
    )


def test_all_ranks_agree_on_damage(config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config.parallel.pipeline_model_parallel_size = 2
    run_ranks(find_despite_damage, 2, tmp_path, config, 1)
    assert capfd.readouterr().err.count("the content of __1_0.distcp has changed") == 1


def crash_everywhere(config: Config) -> tuple[int, int]:
    training, root, digests = two_checkpoints(config)
    assert train_step(training, training.progress_at(2)).applied
    digests[3] = digest(training)
    snapshot, faults, found = root.with_name("snapshot"), Faults(root), set()
    shutil.copytree(root, snapshot)
    restored = build(config, training.topology)
    for count in range(1000):
        crashed = faults.after(count, Killed(), lambda: checkpoint.save(training, training.progress_at(3)))
        step = checkpoint.resume(restored)[1].step
        assert digest(restored) == digests[step], f"after a kill at change {count}"
        found.add(step)
        if not crashed:
            break
        # The next save clears up what the killed one has left.
        if step == 2:
            checkpoint.save(training, training.progress_at(3))
            assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000002", "step-00000003"]
        shutil.rmtree(root)
        shutil.copytree(snapshot, root)
    assert not crashed and found == {2, 3}
    return count, len(found)


def test_a_crash_at_any_write_leaves_a_loadable_checkpoint(config: Config, tmp_path: Path) -> None:
    count, _ = run_ranks(crash_everywhere, 1, tmp_path, config)
    assert count >= 12


def fill_disk(config: Config, tmpfs: str) -> str:
    training, root, digests = two_checkpoints(config)
    before = sorted(path.name for path in root.iterdir())
    errors = []
    if tmpfs:
        assert train_step(training, training.progress_at(2)).applied
        room = shutil.disk_usage(root).free
        (root.parent / "ballast").write_bytes(bytes(max(0, room - 40_000)))
        with pytest.raises(TrainingError) as caught:
            checkpoint.save(training, training.progress_at(3))
        errors.append(str(caught.value))
    else:
        snapshot = root.with_name("snapshot")
        shutil.copytree(root, snapshot)
        faults, error = Faults(root), OSError(errno.ENOSPC, "No space left on device")
        for count in range(1000):
            if not faults.after(count, error, lambda: checkpoint.save(training, training.progress_at(3))):
                break
            new = root / "step-00000003"
            if new.exists():  # a fault that did not matter, or one after it was complete
                assert find_fault(new) is None
                shutil.rmtree(root)
                shutil.copytree(snapshot, root)
            assert sorted(path.name for path in root.iterdir()) == before, count
        assert count >= 12
        shutil.rmtree(root)
        shutil.copytree(snapshot, root)
    assert sorted(path.name for path in root.iterdir() if not path.name.startswith(".latest")) == before
    assert checkpoint.resume(training)[1].step == 2
    assert digest(training) == digests[2]
    return "\n".join(errors)


def test_a_full_disk_at_any_write_keeps_what_is_there(config: Config, tmp_path: Path) -> None:
    run_ranks(fill_disk, 1, tmp_path, config, "")


def test_a_really_full_disk(config: Config, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        config.run.directory = str(disk / "run")
        message = run_ranks(fill_disk, 1, tmp_path, config, "tmpfs")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert "step-00000003: No space left on device (__0_0.distcp); make room" in message and "\n" not in message


def fill_disks_of_some(config: Config, full: tuple[int, ...]) -> str:
    """The system refuses what these ranks write beyond some bytes, as it does on a full disk."""
    training, root, digests = two_checkpoints(config)
    before = sorted(path.name for path in root.iterdir())
    assert train_step(training, training.progress_at(2)).applied
    own, after = training.topology.rank, digest(training)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if own in full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited[1]))
    with pytest.raises(TrainingError) as caught:
        checkpoint.save(training, training.progress_at(3))
    torch.distributed.barrier()
    assert sorted(path.name for path in root.iterdir()) == before
    assert find_fault(root / "step-00000002") is None and (root / "latest").read_text() == "step-00000002\n"
    torch.distributed.barrier()
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    checkpoint.save(training, training.progress_at(3))
    assert checkpoint.resume(training)[1].step == 3 and digest(training) == after
    shutil.rmtree(root / "step-00000003") if own == 0 else None
    torch.distributed.barrier()
    assert checkpoint.resume(training)[1].step == 2 and digest(training) == digests[2]
    messages: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(messages, str(caught.value))
    return "\n".join(sorted(set(messages)))


def test_full_disks_of_some_ranks_end_all_of_them(config: Config, tmp_path: Path) -> None:
    config.parallel.tensor_model_parallel_size = 2
    message = run_ranks(fill_disks_of_some, 4, tmp_path, config, (1, 3))
    assert re.search(r"step-00000003: File too large \(__[13]_0.distcp\); make room", message) and "\n" not in message


class Attack:
    def __reduce__(self) -> Any:
        return os.system, ("touch " + os.environ["ATTACK_MARKER"],)


def load_attacks(config: Config) -> list[str]:
    training, root, _ = two_checkpoints(config)
    directory = root / "step-00000002"
    index = pickle.loads((directory / ".metadata").read_bytes())
    key = next(iter(index.state_dict_metadata))

    def call_in_index() -> None:
        (directory / ".metadata").write_bytes(pickle.dumps(Attack()))

    def call_in_common() -> None:
        torch.save({"step": Attack()}, directory / "common.pt")

    def object_for_tensor() -> None:
        index.state_dict_metadata[key] = BytesStorageMetadata()
        index.planner_data = None
        with (directory / ".metadata").open("wb") as file:
            pickle.dump(index, file)

    messages = []
    for attack in (call_in_index, call_in_common, object_for_tensor):
        files = {name: (directory / name).read_bytes() for name in (".metadata", "common.pt")}
        attack()
        manifest.write(directory, {})  # who can write a checkpoint can write its manifest
        assert find_fault(directory) is None
        with pytest.raises(TrainingError) as caught:
            checkpoint.load(training, directory)
        messages.append(str(caught.value))
        for name, content in files.items():
            (directory / name).write_bytes(content)
    return messages


def test_unsafe_pickles_are_refused(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTACK_MARKER", str(tmp_path / "attacked"))
    messages = run_ranks(load_attacks, 1, tmp_path, config)
    assert "refusing to load posix.system" in messages[0]
    assert all(message.startswith("cannot read checkpoint ") and "\n" not in message for message in messages)
    assert not (tmp_path / "attacked").exists()


def read_with_megatron(config: Config) -> None:
    from megatron.core import dist_checkpointing  # only after megatron_dlm.parallel

    training, root, _ = two_checkpoints(config)
    tensors = dist_checkpointing.load_plain_tensors(str(root / "step-00000002"))
    ours = {name: value for chunk in training.chunks for name, value in chunk.module.named_parameters()}
    layer = "decoder.layers.1.self_attention.linear_proj.weight"
    assert torch.equal(tensors[layer], ours[layer])
    assert any(key.startswith("optimizer.") and key.endswith(f"exp_avg.{layer}") for key in tensors)
    assert dist_checkpointing.load_common_state_dict(str(root / "step-00000002"))["step"] == 2


def test_megatron_reads_our_checkpoints(config: Config, tmp_path: Path) -> None:
    run_ranks(read_with_megatron, 1, tmp_path, config)
