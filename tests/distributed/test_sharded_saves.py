"""Every rank saves and loads its own share, whatever the layout, and nothing else."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dlm.checkpoint import collective
from megatron_dlm.checkpoint.collective import require_shared
from megatron_dlm.config.tree import Config
from megatron_dlm.errors import TrainingError
from megatron_dlm.generation.text_model import open_text_model
from megatron_dlm.parallel import topology as parallel
from megatron_dlm.training import saving
from megatron_dlm.training.progress import Progress
from megatron_dlm.training.setup import build
from megatron_dlm.training.step import train_step
from tests.ranks import run_ranks
from tests.resuming import digest
from tests.runs import tiny_config


def shares(configs: list[Config]) -> list[dict[str, int]]:
    """Bytes of tensors in every file of a checkpoint of each configuration."""
    found = []
    for config in configs:
        training = build(config, parallel.initialize(config.parallel))
        directory = saving.save(training, Progress())
        index = pickle.loads((directory / ".metadata").read_bytes())
        sizes: dict[str, int] = {}
        for item, place in index.storage_data.items():
            stored = index.state_dict_metadata[item.fqn]
            chunk = next(chunk for chunk in stored.chunks if chunk.offsets == item.offset)
            sizes.setdefault(place.relative_path, 0)
            sizes[place.relative_path] += chunk.sizes.numel() * stored.properties.dtype.itemsize
        assert sorted(sizes) == sorted(path.name for path in directory.glob("*.distcp")), "and no empty ones"
        found.append(sizes)
    return found


def test_a_rank_s_share_falls_with_the_number_of_replicas(tiny_data: Path, tmp_path: Path) -> None:
    whole: dict[str, int] = {}
    for replicas in (1, 2, 4, 8):
        configs = [
            tiny_config(
                tiny_data,
                run={"directory": str(tmp_path / f"{replicas}-{precision}")},
                train={"precision": precision, "micro_batch_size": 1},
            )
            for precision in ("fp32", "bf16")
        ]
        for precision, sizes in zip(("fp32", "bf16"), run_ranks(shares, replicas, tmp_path, configs), strict=True):
            total = sum(sizes.values())
            assert total == whole.setdefault(precision, total), "nothing is written twice"
            assert len(sizes) == replicas and max(sizes.values()) < 1.02 * total / replicas
            print(f"SAVE {precision} DP{replicas}: {max(sizes.values()):,} bytes by the rank that writes most")


def test_model_parallel_copies_are_written_once(tiny_data: Path, tmp_path: Path) -> None:
    layouts: list[dict[str, Any]] = [
        {"tensor_model_parallel_size": 4, "sequence_parallel": True},
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ]
    configs = [
        tiny_config(
            tiny_data,
            run={"directory": str(tmp_path / str(number))},
            model={"num_layers": 4, "hidden_size": 64, "num_query_groups": 4, "tie_embeddings": True},
            parallel=layout,
            train={"micro_batch_size": 1},
        )
        for number, layout in enumerate(layouts)
    ]
    totals = {sum(sizes.values()) for sizes in run_ranks(shares, 4, tmp_path, configs)}
    assert len(totals) == 1, "norms and tied embeddings count once"


def resume_with_extra_states(config: Config) -> None:
    from megatron_dlm.model import layer_spec

    class Norm(layer_spec.RMSNorm):
        """Has the two methods by which Transformer Engine's modules keep a state of their own."""

        def get_extra_state(self) -> torch.Tensor:
            return torch.empty(0, dtype=torch.uint8)

        def set_extra_state(self, state: Any) -> None:
            raise AssertionError("there is nothing to set")

    layer_spec.RMSNorm = Norm  # type: ignore[misc]  # in this forked rank
    first = build(config, parallel.initialize(config.parallel))
    assert any("_extra_state" in key for chunk in first.chunks for key in chunk.module.state_dict())
    assert train_step(first, first.progress_at(0)).applied
    saving.save(first, first.progress_at(1))
    saved = digest(first)
    again = build(config, parallel.initialize(config.parallel))
    assert saving.resume(again)[1] == first.progress_at(1)
    assert digest(again) == saved


def test_modules_with_a_state_of_their_own_resume(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, run={"directory": str(tmp_path / "run")})
    run_ranks(resume_with_extra_states, 2, tmp_path, config)


def sample_from_damage(config: Config) -> list[str]:
    training = build(config, parallel.initialize(config.parallel))
    directory = saving.save(training, Progress())
    path = directory / "__0_0.distcp"
    content = path.read_bytes()
    messages = []
    for name in ("embedding.word_embeddings.weight", "decoder.layers.1.mlp.linear_fc2.weight"):
        index = pickle.loads((directory / ".metadata").read_bytes())
        place = next(place for item, place in index.storage_data.items() if item.fqn == name)
        middle = place.offset + place.length // 2
        path.write_bytes(content[:middle] + bytes(2000) + content[middle + 2000 :])
        with pytest.raises(TrainingError) as caught:
            open_text_model(str(directory))
        messages.append(str(caught.value))
        path.write_bytes(content)
    open_text_model(str(directory))
    return messages


def test_damaged_weights_are_neither_sampled_from_nor_evaluated(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, run={"directory": str(tmp_path / "run")})
    for message in run_ranks(sample_from_damage, 1, tmp_path, config):
        assert "the content of __0_0.distcp has changed since it was written (its SHA-256 differs)" in message


def save_apart(config: Config, folders: list[Path]) -> list[str]:
    """The errors of all ranks, each of which has a disk of its own."""
    os.chdir(folders[dist.get_rank()])
    training = build(config, parallel.initialize(config.parallel))
    collective._SECONDS_UNTIL_SHOWN = 0.5
    messages = []
    for attempt in (
        lambda: require_shared(Path(config.run.directory)),
        lambda: saving.save(training, Progress()),
    ):
        with pytest.raises(TrainingError) as caught:
            attempt()
        messages.append(str(caught.value))
    assert not list(Path(config.run.directory).glob(".shared*"))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, messages)
    assert gathered[0] == gathered[1]
    return messages


def test_a_folder_that_is_not_shared_is_found(tiny_data: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    config = tiny_config(tiny_data, run={"directory": "run"}, parallel={"tensor_model_parallel_size": 2})
    start, save = run_ranks(save_apart, 2, tmp_path, config, folders)
    assert "rank 1 on " in start and "does not see what rank 0 writes into run; run.directory must be" in start
    assert "__1_0.distcp, which another rank has written, is not there" in save
    assert not list(folders[0].rglob("step-*")), "nothing that looks like a checkpoint"
