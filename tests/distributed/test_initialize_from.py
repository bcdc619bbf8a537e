"""Runs that begin with given weights: exactly those at every layout, only at step 0, and only of the same model."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megatron_dlm.checkpoint.model_weights import load_weights
from megatron_dlm.checkpoint.stored import open_checkpoint
from megatron_dlm.checkpoint.tensor_files import TensorReader
from megatron_dlm.checkpoint.whole_tensors import WeightsReader
from megatron_dlm.config.load import from_dict, to_dict
from megatron_dlm.config.tree import Config
from megatron_dlm.errors import ConfigError, TrainingError
from megatron_dlm.hf.import_model import import_model
from megatron_dlm.model.transformer import build_model
from megatron_dlm.parallel import topology as parallel
from megatron_dlm.preparation.prepare import PrepareOptions, prepare
from megatron_dlm.training import saving as checkpoint
from megatron_dlm.training import trainer
from megatron_dlm.training.run_log import banner
from megatron_dlm.training.setup import build
from megatron_dlm.training.step import train_step
from tests.hf_sources import save_source
from tests.ranks import run_ranks
from tests.resuming import continue_run
from tests.runs import TINY, assemble, shards, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
ROOT = Path(__file__).parents[2]
TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
PP2_VP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights-only checkpoint in fp32 with tied embeddings, and data of its tokenizer in ``data`` beside it."""
    folder = tmp_path_factory.mktemp("imported")
    save_source(folder / "source", "qwen3", tie_word_embeddings=True, head_dim=8, num_hidden_layers=4)
    import_model(str(folder / "source"), folder / "out", objective="autoregressive")
    spec = str(folder / "out" / "tokenizer")
    prepare(PrepareOptions(output=folder / "data", inputs=[ROOT / "LICENSE"], tokenizer=spec))
    return folder / "out"


def begin_with(directory: Path, run: Path, **sections: dict[str, Any]) -> Config:
    """A tiny diffusion run that begins with the weights in ``directory``, whose configuration it takes."""
    tree = to_dict(open_checkpoint(directory).config)
    tree["run"] = {"directory": str(run), "seed": 7}
    tree["model"] |= {"objective": "masked_diffusion", "init_std": 0.5}
    tree["data"] |= {"train": [{"path": str(directory.with_name("data") / "train")}], "sequence_length": 32}
    tree["checkpoint"]["initialize_from"] = str(directory)
    for name in ("train", "optimizer", "evaluate"):
        tree[name] = TINY[name]
    for name, values in sections.items():
        tree[name] = {**tree[name], **values}
    return from_dict(tree)


def begin(config: Config) -> tuple[float, list[str]]:
    """Save what the run begins with; loss of the first step, and the banner."""
    training = build(config, parallel.initialize(config.parallel))
    checkpoint.save(training, training.progress_at(0))
    return train_step(training, training.progress_at(0)).loss, banner(training, None)


def saved(config: Config, key: str) -> torch.Tensor:
    """A tensor of the run's checkpoint of step 0."""
    directory = checkpoint.checkpoint_root(config) / "step-00000000"
    stored = TensorReader(directory).read_metadata().state_dict_metadata[key]
    result = torch.empty(stored.size, dtype=stored.properties.dtype)
    dcp.load({key: result}, storage_reader=TensorReader(directory), no_dist=True)
    return result


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_layout_begins_with_the_same_bits(precision: str, imported: Path, tmp_path: Path) -> None:
    source = WeightsReader(imported)
    losses = []
    for index, (world_size, layout) in enumerate([(1, {}), (4, TP2_PP2), (2, PP2_VP2)]):
        train = {**TINY["train"], "precision": precision}
        config = begin_with(imported, tmp_path / f"run{index}", parallel=layout, train=train)
        loss, lines = run_ranks(begin, world_size, tmp_path, config)
        losses.append(loss)
        assert lines[-1] == f"weights    from {imported}"
        for key in source.tensors:
            expected = source.read(key)
            weight = saved(config, key)
            assert weight.dtype is (torch.bfloat16 if precision == "bf16" else torch.float32)
            assert torch.equal(weight, expected.to(weight.dtype)), key
            assert torch.equal(saved(config, f"optimizer.state.param.{key}"), expected), key
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6 if precision == "fp32" else 1e-2)


def test_a_bf16_run_hands_over_its_fp32_weights(tiny_data: Path, tmp_path: Path) -> None:
    train = {**TINY["train"], "precision": "bf16"}
    first = tiny_config(tiny_data, run={"directory": str(tmp_path / "first")}, train=train)
    run_ranks(continue_run, 1, tmp_path, first, 0, 2, 2)
    (tmp_path / "first" / "checkpoints" / "step-00000002").rename(tmp_path / "first" / "checkpoints" / "step-00000000")
    (tmp_path / "first" / "checkpoints" / "latest").write_text("step-00000000\n")
    second = tiny_config(
        tiny_data,
        run={"directory": str(tmp_path / "second")},
        train=train,
        checkpoint={"initialize_from": str(tmp_path / "first")},
        parallel={"tensor_model_parallel_size": 2},
    )
    trainer.preflight(second)
    run_ranks(begin, 2, tmp_path, second)
    for key in WeightsReader(tmp_path / "first" / "checkpoints" / "step-00000000").tensors:
        main = saved(first, f"optimizer.state.param.{key}")
        assert torch.equal(saved(second, f"optimizer.state.param.{key}"), main), key
        assert torch.equal(saved(second, key), main.bfloat16())
    assert not torch.equal(main, main.bfloat16().float()), "the fp32 weights were no more exact"


def load_bf16(directory: Path) -> dict[str, torch.Tensor]:
    """What ``load_weights`` makes of the checkpoint in bf16 chunks."""
    stored = open_checkpoint(directory)
    stored.config.train.precision = "bf16"
    topology = parallel.initialize(stored.config.parallel)
    chunks = build_model(stored.config, topology, vocab_size=stored.info["vocab_size"])
    load_weights(chunks, stored.directory)
    assert {parameter.dtype for parameter in chunks[0].parameters()} == {torch.bfloat16}
    return assemble([shards([SimpleNamespace(module=chunk) for chunk in chunks])])


def test_loading_for_inference_casts(imported: Path, tmp_path: Path) -> None:
    source = WeightsReader(imported)
    loaded = run_ranks(load_bf16, 1, tmp_path, imported)
    assert set(loaded) == set(source.tensors)
    for key, tensor in loaded.items():
        assert torch.equal(tensor, source.read(key).bfloat16().float()), key


def test_a_resumed_run_does_not_need_them(imported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(imported, copy)
    shutil.copytree(imported.with_name("data"), tmp_path / "data")
    config = begin_with(copy, tmp_path / "run")
    straight, _ = run_ranks(continue_run, 1, tmp_path, config, 0, 3, 2)
    config.data.tokenizer = str(imported / "tokenizer")
    shutil.rmtree(copy)
    trainer.preflight(config)
    resumed, _ = run_ranks(continue_run, 1, tmp_path, config, 2, 3, None)
    assert resumed == straight[2:]
    config.run.directory = str(tmp_path / "other")
    with pytest.raises(ConfigError, match=f"{copy} is no directory; give a run directory"):
        trainer.preflight(config)


def test_other_models_are_refused_before_workers_start(imported: Path, tiny_data: Path, tmp_path: Path) -> None:
    trainer.preflight(begin_with(imported, tmp_path / "run", model={"hidden_dropout": 0.1}))
    config = begin_with(imported, tmp_path / "run")
    trainer.preflight(config)
    config.model.hidden_size, config.model.rope_theta, config.model.qk_norm = 64, 5e5, False
    config.model.num_query_groups, config.model.transformer_config = 4, {"softmax_scale": 0.5}
    with pytest.raises(ConfigError) as raised:
        trainer.preflight(config)
    for difference in (
        "model.hidden_size is 64 but was 32, model.num_query_groups is 4 but was 2, ",
        "model.qk_norm is False but was True, model.rope_theta is 500000.0 but was 10000.0, ",
        "model.transformer_config is {'softmax_scale': 0.5} but was {}; take the values of its config.yaml",
    ):
        assert difference in str(raised.value)
    assert "\n" not in str(raised.value) and "head_dim" not in str(raised.value)
    other = begin_with(imported, tmp_path / "run")
    other.data.tokenizer, other.data.train[0].path = "byte", str(tiny_data / "train")
    with pytest.raises(ConfigError, match="the vocabulary of data.tokenizer is 258 but was .* the fingerprint of data"):
        trainer.preflight(other)
    other.checkpoint.initialize_from = " "
    with pytest.raises(ConfigError, match="checkpoint.initialize_from is empty"):
        trainer.preflight(other)


def try_to_begin(config: Config) -> list[Any]:
    """The errors of all ranks."""
    try:
        build(config, parallel.initialize(config.parallel))
        error = None
    except (ConfigError, TrainingError) as caught:
        error = str(caught)
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return errors


def test_damage_is_found_by_all_ranks(imported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(imported, copy)
    shutil.copytree(imported.with_name("data"), tmp_path / "data")
    config = begin_with(copy, tmp_path / "run", parallel={"pipeline_model_parallel_size": 2})
    path = copy / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    trainer.preflight(config)  # looks at sizes only
    errors = run_ranks(try_to_begin, 2, tmp_path, config)
    assert errors[0] == errors[1] and "__0_0.distcp has changed since it was written" in errors[0]
    config.data.tokenizer = str(imported / "tokenizer")
    shutil.rmtree(copy)
    errors = run_ranks(try_to_begin, 2, tmp_path, config)
    assert errors[0] == errors[1] and "is no directory" in errors[0]
