"""A rehearsed rank does what a real one does: bytes, FLOPs and collectives of gloo ranks, one after the other."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from megatron_dlm.config.load import from_dict
from megatron_dlm.config.tree import Config
from megatron_dlm.parallel import topology as parallel
from megatron_dlm.rehearsal.step import RankStep, SyntheticStream, build, record, rehearse
from tests.ranks import run_ranks

VOCABULARY = 1000
LAYOUTS = {
    "TP2+SP-PP2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    "TP2-DP2": {"tensor_model_parallel_size": 2},
    "PP2xVP2-DP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "DP4": {},
}


def config(layout: str, **train: Any) -> Config:
    return from_dict(
        {
            "model": {"num_layers": 12, "hidden_size": 128, "num_query_groups": 2, "ffn_hidden_size": 352},
            "parallel": LAYOUTS[layout],
            "data": {"train": [{"path": "x"}], "tokenizer": "byte", "sequence_length": 64},
            "train": {"steps": 10, "micro_batch_size": 2, "global_batch_size": 32, **train},
            "optimizer": {"warmup_steps": 1, "decay_steps": 1},
        }
    )


CASES = {name: config(name) for name in LAYOUTS} | {
    "bf16": config("TP2+SP-PP2", precision="bf16"),
    "recompute": config("TP2-DP2", recompute="full"),
}


def facts(step: RankStep) -> dict[str, Any]:
    """What has to be equal, and the activations, which may differ a little."""
    ledger = step.ledger
    return {
        "layout": step.layout,
        "parameters": step.parameters,
        "held": step.held,
        "micro_batches": step.micro_batches,
        "flops": dict(ledger.flops),
        "calls": dict(ledger.calls),
        "sent": dict(ledger.sent),
        "activations": ledger.peak,
    }


def real_ranks(names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """For each case, the facts of all ranks."""
    found = {}
    for name, case in ((name, CASES[name]) for name in names):
        topology = parallel.initialize(case.parallel)
        chunks, optimizer = parts = build(case, topology, VOCABULARY)
        for chunk in chunks:
            for parameter in chunk.parameters():
                torch.nn.init.constant_(parameter, 0.01)  # finite gradients, or the step would not be taken
        optimizer.megatron.reload_model_params()
        stream = SyntheticStream(case, topology, 1.0)
        with FlopCounterMode(display=False) as counter:
            own = facts(record(case, topology, *parts, stream))
        own["counted"] = counter.get_total_flops()
        found[name] = [{}] * dist.get_world_size()
        dist.all_gather_object(found[name], own)
    return found


def rehearsed_ranks(names: Sequence[str]) -> dict[tuple[str, int], dict[str, Any]]:
    """The facts of the first and the last rank of each case."""
    return {
        (name, rank): facts(rehearse(CASES[name], rank, 4, vocab_size=VOCABULARY, gpu=False))
        for name in names
        for rank in (0, 3)
    }


@pytest.mark.parametrize("names", [("bf16", "PP2xVP2-DP2"), pytest.param((*CASES,), marks=pytest.mark.slow)])
def test_a_rehearsed_rank_is_a_real_one(names: Sequence[str], tmp_path: Path) -> None:
    real = run_ranks(real_ranks, 4, tmp_path, names)
    # Not here: a process that has used autograd's threads cannot be forked by the tests that follow.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        steps = pool.apply(rehearsed_ranks, (names,))
    for name in names:
        for rank in (0, 3):
            expected, rehearsed = real[name][rank], steps[name, rank]
            activations, counted = expected.pop("activations"), expected.pop("counted")
            difference = rehearsed.pop("activations") / activations - 1
            print(f"{name} rank {rank}: activations {activations:,} bytes, rehearsed {difference:+.2%}")
            assert rehearsed == expected, f"{name}, rank {rank}"
            # Gloo's ranks free what they have sent when it suits them. With recomputation they hold more for a moment,
            # by so much of a layer; why is not known.
            assert (-0.3 if name == "recompute" else -0.05) < difference < 0.08
            matmuls = sum(flops for (_, kind), flops in expected["flops"].items() if kind == "matmul")
            assert matmuls == counted, "torch's own counter"
    assert not dist.is_initialized()
