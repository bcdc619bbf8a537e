"""One process reads whole weights out of any layout's checkpoint, and writes checkpoints that any layout loads."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_dlm.checkpoint.model_weights import load_weights
from megatron_dlm.checkpoint.stored import open_checkpoint
from megatron_dlm.checkpoint.whole_tensors import TensorInfo, WeightsReader, write_weights
from megatron_dlm.config.tree import Config
from megatron_dlm.hf.tensor_map import weight_map
from megatron_dlm.parallel import topology as parallel
from megatron_dlm.training import saving as checkpoint
from megatron_dlm.training.setup import build
from megatron_dlm.training.state import Training
from megatron_dlm.training.step import train_step
from tests.ranks import run_ranks
from tests.runs import assemble, shards, tiny_config

FOUR = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
INTERLEAVED = {**FOUR, "virtual_pipeline_model_parallel_size": 2, "sequence_parallel": True}


def whole_parameters(training: Training) -> dict[str, torch.Tensor]:
    """The model's parameters, put together from all ranks without any file."""
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, shards(training.chunks))
    return assemble(gathered)


def save_and_load(config: Config, written: Path) -> list[dict[str, torch.Tensor]]:
    """The parameters that a checkpoint was saved from, and those that the directory ``written`` gives."""
    training = build(config, parallel.initialize(config.parallel))
    train_step(training, training.progress_at(0))
    checkpoint.save(training, training.progress_at(1))
    saved = whole_parameters(training)
    load_weights([chunk.module for chunk in training.chunks], written)
    return [saved, whole_parameters(training)]


def test_whole_weights_come_out_of_a_sharded_checkpoint_and_go_into_one(tiny_data: Path, tmp_path: Path) -> None:
    run = {"directory": str(tmp_path / "run"), "seed": 7}
    config = tiny_config(tiny_data, run=run, parallel=INTERLEAVED)
    maps = {whole.key: whole for whole in weight_map(config.model, vocab_size=258)}
    generator = torch.Generator().manual_seed(3)
    made = {key: torch.randn(whole.shape, generator=generator) for key, whole in maps.items()}
    written = tmp_path / "written"
    written.mkdir()
    infos = {key: TensorInfo(whole.shape, torch.float32) for key, whole in maps.items()}
    write_weights(written, infos, made.__getitem__)

    saved, loaded = run_ranks(save_and_load, 4, tmp_path, config, written)
    assert saved.keys() == loaded.keys() == made.keys()
    for key in made:
        assert torch.equal(loaded[key], made[key]), key

    reader = WeightsReader(open_checkpoint(tmp_path / "run").directory)
    assert len(reader.files) == 4, "every rank has written a file"
    assert reader.tensors == infos
    for key, tensor in saved.items():
        assert torch.equal(reader.read(key), tensor), key
        assert torch.equal(reader.read(key, torch.bfloat16), tensor.bfloat16()), key
