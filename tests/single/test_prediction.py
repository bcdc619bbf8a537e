"""What `plan` makes of rehearsed steps: waits of the host, predictions, the search for a layout."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_dlm.rehearsal import search
from megatron_dlm.rehearsal.machines import MACHINES
from megatron_dlm.rehearsal.one_rank import one_rank
from megatron_dlm.rehearsal.prediction import predict
from megatron_dlm.rehearsal.step import MICRO_BATCHES, rehearse
from tests.distributed.test_rehearsal import VOCABULARY, config


@pytest.fixture(autouse=True)
def no_groups() -> None:
    """Other tests of this process may have left theirs."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
