"""Pass-through mappings reach megatron, and mistakes in them are one-line errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dlm.config import ConfigError
from megatron_dlm.parallel.megatron_config import check_pass_through, ddp_config, optimizer_config, transformer_config
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
        ("model", {"transformer_config": {"hiden_dropout": 3}}, "is not a field of megatron-core's TransformerConfig"),
        ("model", {"transformer_config": {"num_moe_experts": 4}}, "feature that this model does not build"),
        ("model", {"transformer_config": {"rotary_interleaved": "yes"}}, "is 'yes'; give true or false"),
        ("parallel", {"ddp_config": {"use_distributed_optimizer": False}}, "is set by megatron_dlm's own keys"),
        ("parallel", {"ddp_config": {"bucket": 1}}, "DistributedDataParallelConfig"),
        ("optimizer", {"optimizer_config": {"lr": 1.0}}, "is set by megatron_dlm's own keys"),
        ("optimizer", {"optimizer_config": {"adam_eps": "small"}}, "give a number"),
    ],
)
def test_bad_pass_through_is_one_line(section: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_pass_through(tiny_config(Path("data"), **{section: values}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
