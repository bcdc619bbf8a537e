"""Pass-through mappings reach megatron, and mistakes in them are one-line errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dlm.errors import ConfigError
from megatron_dlm.model.transformer import build_model
from megatron_dlm.parallel.megatron_config import (
    _PASS_THROUGH,
    DistributedDataParallelConfig,
    OptimizerConfig,
    TransformerConfig,
    check_pass_through,
    ddp_config,
    optimizer_config,
    transformer_config,
)
from megatron_dlm.parallel.topology import initialize
from megatron_dlm.training.setup import build
from megatron_dlm.training.step import train_step
from tests.runs import tiny_config


def test_pass_through_fields_reach_megatron() -> None:
    config = tiny_config(
        Path("data"),
        model={"transformer_config": {"softmax_scale": 0.2}},
        parallel={"ddp_config": {"overlap_grad_reduce": True}},
        optimizer={"optimizer_config": {"adam_eps": 1e-6}},
    )
    assert transformer_config(config).softmax_scale == 0.2
    assert ddp_config(config).overlap_grad_reduce is True
    assert optimizer_config(config).adam_eps == 1e-6


def test_interleaving_avoids_batched_p2p() -> None:
    """Batched sends to the one peer of PP 2 are matched in the wrong order."""
    parallel = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    config = transformer_config(tiny_config(Path("data"), parallel=parallel))
    assert (config.overlap_p2p_comm, config.batch_p2p_comm) == (True, False)


def test_bf16_keeps_fp32_gradient_reduction() -> None:
    config = tiny_config(Path("data"), train={"steps": 2, "precision": "bf16"})
    assert transformer_config(config).params_dtype == torch.bfloat16
    assert ddp_config(config).grad_reduce_in_fp32 is True
    assert optimizer_config(config).bf16 is True


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "model",
            {"transformer_config": {"num_layers": 3}},
            "model.transformer_config.num_layers is set by megatron_dlm",
        ),
        (
            "model",
            {"transformer_config": {"hiden_dropout": 3}},
            "takes no hiden_dropout; it takes: softmax_scale,",
        ),
        ("model", {"transformer_config": {"num_moe_experts": 4}}, "takes no num_moe_experts"),
        ("model", {"transformer_config": {"rotary_interleaved": "yes"}}, "is 'yes'; give true or false"),
        ("model", {"transformer_config": {"softmax_scale": "abc"}}, "is 'abc'; give a number"),
        ("parallel", {"ddp_config": {"use_distributed_optimizer": False}}, "is set by megatron_dlm's own keys"),
        ("parallel", {"ddp_config": {"bucket": 1}}, "parallel.ddp_config takes no bucket"),
        ("parallel", {"ddp_config": {"bucket_size": 1.5}}, "give an integer"),
        ("optimizer", {"optimizer_config": {"lr": 1.0}}, "is set by megatron_dlm's own keys"),
        ("optimizer", {"optimizer_config": {"adam_eps": "small"}}, "give a number"),
        ("optimizer", {"optimizer_config": {"adam_eps": 0}}, "adam_eps is 0; it must be from 1e-30 to 1000.0"),
        ("optimizer", {"optimizer_config": {"decoupled_lr": -1e-3}}, "decoupled_lr is -0.001; it must be from"),
        ("model", {"transformer_config": {"softmax_scale": float("nan")}}, "softmax_scale is nan; it must be from"),
        ("model", {"transformer_config": {"glu_linear_offset": float("inf")}}, "glu_linear_offset is inf; it must"),
        ("parallel", {"ddp_config": {"bucket_size": 2**63}}, "bucket_size is 9223372036854775808; it must be from 1"),
    ],
)
def test_bad_pass_through_is_one_line(section: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_pass_through(tiny_config(Path("data"), **{section: values}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def losses(data: Path, section: str, key: str, values: dict[str, Any]) -> list[float]:
    config = tiny_config(data, **{section: {key: values}} if values else {})
    training = build(config, initialize(config.parallel))
    return [train_step(training, training.progress_at(step)).loss for step in range(3)]


CHANGES = {
    "softmax_scale": 0.5,
    "rotary_interleaved": True,
    "activation_func_clamp_value": 0.01,
    "glu_linear_offset": 0.5,
    "adam_eps": 1.0,
    "decoupled_lr": 1.0,
}
SAME_MATHEMATICS = {"overlap_grad_reduce": True, "bucket_size": 1000}
SECTIONS = {
    TransformerConfig: ("model", "transformer_config"),
    DistributedDataParallelConfig: ("parallel", "ddp_config"),
    OptimizerConfig: ("optimizer", "optimizer_config"),
}
ACCEPTED = [(SECTIONS[kind], name) for kind, names in _PASS_THROUGH.items() for name in names]


@pytest.mark.parametrize(("where", "name"), ACCEPTED, ids=[name for _, name in ACCEPTED])
def test_every_accepted_field_has_its_effect(where: tuple[str, str], name: str, tiny_data: Path) -> None:
    plain = losses(tiny_data, *where, {})
    here = losses(tiny_data, *where, {name: (CHANGES | SAME_MATHEMATICS)[name]})
    assert (here == pytest.approx(plain, rel=1e-7)) == (name in SAME_MATHEMATICS)


def test_interleaved_rotation_is_a_rotation() -> None:
    """Scores of a rotated query and key depend on their distance only; with the wrong angles they do not."""
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    config = tiny_config(Path("data"), model={"transformer_config": {"rotary_interleaved": True}})
    topology = initialize(config.parallel)
    (chunk,) = build_model(config, topology, vocab_size=250)
    angles = chunk.rotary_pos_emb(12)
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 16).expand(2, 12, 1, 1, 16).unbind()
    query, key = (apply_rotary_pos_emb(t, angles, config=chunk.config) for t in (query, key))
    scores = (query[:-1] * key[1:]).sum(-1).flatten()
    torch.testing.assert_close(scores, scores[:1].expand_as(scores), rtol=1e-4, atol=1e-4)
