"""Checkpoints of weights alone: written and read one tensor at a time, damage and foreign pickles refused."""

from __future__ import annotations

import os
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata

from megatron_dlm.checkpoint import manifest
from megatron_dlm.checkpoint.whole_tensors import TensorInfo, WeightsReader, model_keys, write_weights
from megatron_dlm.errors import ConfigError

TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4) / 7,
    "b.weight": torch.linspace(-3, 3, 5).bfloat16(),
    "optimizer.state.exp_avg.a.weight": torch.ones(3, 4),
    "c": torch.tensor(2.5),
}


def infos(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {key: TensorInfo(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_weights(tmp_path, infos(TENSORS), TENSORS.__getitem__)
    return tmp_path


def test_what_is_written_is_read(written: Path) -> None:
    reader = WeightsReader(written)
    assert reader.tensors == {key: info for key, info in infos(TENSORS).items() if not key.startswith("optimizer.")}
    assert model_keys(TENSORS) == list(reader.tensors)
    for key in reader.tensors:
        assert torch.equal(reader.read(key), TENSORS[key])
        assert reader.read(key).dtype == TENSORS[key].dtype
        for dtype in (torch.bfloat16, torch.float32):
            assert torch.equal(reader.read(key, dtype), TENSORS[key].to(dtype))


def test_the_records_are_those_of_the_files(tmp_path: Path) -> None:
    records = write_weights(tmp_path, infos(TENSORS), TENSORS.__getitem__)
    assert list(records) == WeightsReader(tmp_path).files == ["__0_0.distcp"]
    assert all(record[:2] == manifest.record(tmp_path / name)[:2] for name, record in records.items())
    assert {path.name for path in tmp_path.iterdir()} == {*records, ".metadata", "common.pt", "metadata.json"}


def test_one_tensor_is_alive_at_a_time_while_writing(tmp_path: Path) -> None:
    alive: set[str] = set()
    keys = [f"t{i}" for i in range(6)]

    def read(key: str) -> torch.Tensor:
        assert not alive, "those before are gone"
        array = np.zeros((10, 10), np.float32)
        weakref.finalize(array, alive.discard, key)
        alive.add(key)
        return torch.from_numpy(array)  # the array lives as long as the tensor's memory

    write_weights(tmp_path, dict.fromkeys(keys, TensorInfo((10, 10), torch.float32)), read)
    assert set(WeightsReader(tmp_path).tensors) == set(keys)


def test_views_are_written_without_what_they_view(tmp_path: Path) -> None:
    large = torch.arange(100_000.0)
    tensors = {"row": large[10:20], "column": large.view(1000, 100)[:, 3]}
    write_weights(tmp_path, infos(tensors), tensors.__getitem__)
    assert (tmp_path / "__0_0.distcp").stat().st_size < 20_000
    reader = WeightsReader(tmp_path)
    assert all(torch.equal(reader.read(key), tensor) for key, tensor in tensors.items())


def test_an_error_while_a_tensor_is_made_comes_through(tmp_path: Path) -> None:
    def read(key: str) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_weights(tmp_path, infos(TENSORS), read)
    assert not (tmp_path / ".metadata").exists()
    with pytest.raises(AssertionError, match="announced"):
        write_weights(tmp_path, {"x": TensorInfo((2,), torch.float32)}, lambda key: torch.zeros(3))


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", pickle.dumps({"a": 1}), pickle.dumps([]), pickle.dumps(Metadata)]
)
def test_an_index_that_is_none_is_refused(content: bytes, written: Path) -> None:
    (written / ".metadata").write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot read .*\.metadata: .*; restore it") as caught:
        WeightsReader(written)
    assert "\n" not in str(caught.value)
    (written / ".metadata").unlink()
    with pytest.raises(ConfigError, match="No such file"):
        WeightsReader(written)


def test_no_pickle_runs_anything(written: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    proof = tmp_path_factory.mktemp("proof") / "ran"
    attack = Attack(f"touch {proof}")
    index = (written / ".metadata").read_bytes()
    (written / ".metadata").write_bytes(pickle.dumps(attack))
    with pytest.raises(ConfigError, match="refusing to load posix.system"):
        WeightsReader(written)
    (written / ".metadata").write_bytes(index)

    reader = WeightsReader(written)
    place = next(place for item, place in reader._index.storage_data.items() if item.fqn == "a.weight")
    torch.save(attack, written / "__0_0.distcp")
    place.offset, place.length = 0, (written / "__0_0.distcp").stat().st_size
    with pytest.raises(ConfigError, match="cannot read a.weight of ") as caught:
        reader.read("a.weight")
    assert "\n" not in str(caught.value)
    assert not proof.exists()


def edited(written: Path, change: Callable[[Metadata], None]) -> None:
    index = pickle.loads((written / ".metadata").read_bytes())
    change(index)
    (written / ".metadata").write_bytes(pickle.dumps(index))


def test_files_elsewhere_are_not_read(written: Path) -> None:
    def change(index: Metadata) -> None:
        for place in index.storage_data.values():
            place.relative_path = "/etc/passwd"

    edited(written, change)
    with pytest.raises(ConfigError, match="/etc/passwd', which is not one of its files"):
        WeightsReader(written)


def test_shards_that_leave_a_gap_are_refused(written: Path) -> None:
    def change(index: Metadata) -> None:
        stored = index.state_dict_metadata["a.weight"]
        stored.chunks = [ChunkStorageMetadata(offsets=torch.Size((0, 0)), sizes=torch.Size((2, 4)))]

    edited(written, change)
    with pytest.raises(ConfigError, match="a.weight of .*: its shards are not the whole tensor"):
        WeightsReader(written).read("a.weight")


@pytest.mark.parametrize("damage", ["missing", "cut", "zeroed"])
def test_a_damaged_file_is_one_line(damage: str, written: Path) -> None:
    path = written / "__0_0.distcp"
    reader, content = WeightsReader(written), path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:100] if damage == "cut" else bytes(len(content)))
    with pytest.raises(ConfigError, match="cannot read b.weight of .*; restore it or give another") as caught:
        reader.read("b.weight")
    assert "\n" not in str(caught.value)


def test_another_shape_than_the_index_says_is_refused(written: Path) -> None:
    def change(index: Metadata) -> None:
        stored = index.state_dict_metadata["a.weight"]
        stored.size = torch.Size((30, 4))
        stored.chunks = [ChunkStorageMetadata(offsets=torch.Size((0, 0)), sizes=stored.size)]

    edited(written, change)
    with pytest.raises(ConfigError, match="cannot read a.weight"):
        WeightsReader(written).read("a.weight")
