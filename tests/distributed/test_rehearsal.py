"""A rehearsed rank does what a real one does: bytes, FLOPs and collectives of gloo ranks, one after the other."""

from __future__ import annotations

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
from megatron_dlm.rehearsal import search
from megatron_dlm.rehearsal.machines import MACHINES
from megatron_dlm.rehearsal.one_rank import one_rank
from megatron_dlm.rehearsal.prediction import predict
from megatron_dlm.rehearsal.step import MICRO_BATCHES, RankStep, SyntheticStream, build, record, rehearse
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


@pytest.mark.parametrize("names", [("bf16", "PP2xVP2-DP2"), pytest.param((*CASES,), marks=pytest.mark.slow)])
def test_a_rehearsed_rank_is_a_real_one(names: Sequence[str], tmp_path: Path) -> None:
    real = run_ranks(real_ranks, 4, tmp_path, names)
    for name, case in ((name, CASES[name]) for name in names):
        for rank in (0, 3):
            expected = real[name][rank]
            rehearsed = facts(rehearse(case, rank, 4, vocab_size=VOCABULARY, gpu=False))
            activations, counted = expected.pop("activations"), expected.pop("counted")
            difference = rehearsed.pop("activations") / activations - 1
            print(f"{name} rank {rank}: activations {activations:,} bytes, rehearsed {difference:+.2%}")
            assert rehearsed == expected, f"{name}, rank {rank}"
            # Gloo's ranks free what they have sent when it suits them. With recomputation they hold more for a moment,
            # by so much of a layer; why is not known.
            assert (-0.3 if name == "recompute" else -0.05) < difference < 0.08
            matmuls = sum(flops for (_, kind), flops in expected["flops"].items() if kind == "matmul")
            assert matmuls == counted or "attention" in str(expected["flops"]) and matmuls <= counted
    assert not dist.is_initialized()


def test_the_waits_of_a_step_are_known() -> None:
    """Every place in which the host waits for the device: aim at one, at the end."""
    waits = rehearse(config("TP2+SP-PP2"), 3, 4, vocab_size=VOCABULARY).ledger.waits
    print(*waits, sep="\n")
    found = {(wait.what, wait.where.rpartition(":")[0]): times for wait, times in waits.items()}
    found.pop(("item", "megatron/core/distributed/finalize_model_grads.py"), 1)  # of 0.16: whether there are tokens
    assert found == {
        ("item", "training/optimizer.py"): 1,  # the norm: whether to skip the step
        ("cpu", "training/step.py"): 1,  # the figures
    }


def test_a_gpu_keeps_less_than_torchs_cpu_build() -> None:
    case = config("TP2+SP-PP2", precision="bf16")
    on_gpu, on_cpu = (rehearse(case, 0, 4, vocab_size=VOCABULARY, gpu=gpu).ledger for gpu in (True, False))
    assert on_gpu.saved < on_cpu.saved and on_gpu.flops == on_cpu.flops


def test_a_prediction_is_made_of_its_parts() -> None:
    case, machine = config("TP2+SP-PP2", precision="bf16"), MACHINES["h100"]
    slow, fast = (predict(case, gpus, machine, vocab_size=VOCABULARY) for gpus in (4, 16))
    assert slow.micro_batches == 4 * fast.micro_batches == 16
    assert slow.seconds == pytest.approx(
        16 * max(time.total for time in slow.stages) + slow.bubble + slow.gradients + slow.update
    )
    assert slow.tokens_per_second < fast.tokens_per_second < 4 * slow.tokens_per_second
    assert all(memory.total == sum(memory) for memory in slow.memory) and slow.fits(machine)
    assert not slow.fits(machine._replace(memory=1e9))
    phases = {phase for phase, _ in slow.collectives}
    assert MICRO_BATCHES in phases and sum(slow.waits.values()) in (2, 3)


def test_the_search_says_what_fits_and_why_the_rest_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    case = config("DP4", precision="bf16")
    case.model.num_layers = 4
    small = MACHINES["h100"]._replace(memory=3.0095e9)
    monkeypatch.setattr(search, "_MICRO_BATCHES", (2,))
    found = search.search(case, 4, small, vocab_size=VOCABULARY)
    rates = [candidate.prediction.tokens_per_second for candidate in found if not candidate.reason]
    assert rates == sorted(rates, reverse=True) and rates
    reasons = {candidate.label: candidate.reason for candidate in found if candidate.reason}
    print(found[0].label, reasons, sep="\n")
    assert any("GB" in reason for reason in reasons.values()), "some layouts do not fit"
    assert all("\n" not in reason for reason in reasons.values())


def test_a_process_with_groups_is_no_other_rank() -> None:
    with one_rank(config("DP4").parallel, 1, 4) as topology:
        assert (topology.rank, topology.world_size, topology.data_size) == (1, 4, 4)
        with pytest.raises(RuntimeError), one_rank(config("DP4").parallel, 0, 4):
            pass
    assert not dist.is_initialized()
