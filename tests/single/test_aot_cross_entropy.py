"""The cross-entropy kernels compiled for sm_90: no spills, room for 1024 threads per SM, 16-byte loads and stores.

The launches are the host code's own, for the vocabularies of 50304 and 131072 tokens and an eighth of the latter; and
for one of odd size, whose logits the head pads.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.aot import Launch, count_instructions, recorded_launches, resources, sass, skip_unless_available

ROWS = 16
ODD = 50257
# EF: evict first, the accesses of whole tiles by the gradient.
WIDE = ["LDG.E.128", "LDG.E.EF.128", "STG.E.128", "STG.E.EF.128", "STG.E.64", "STG.E.EF.64"]
WIDTHS = [50304, 131072, 131072 // 8, 32768]


@pytest.fixture(scope="module")
def launches() -> dict[str, Launch]:
    """One launch per compiled kernel, by name and key."""
    skip_unless_available()
    from dlm_kernels import triton_cross_entropy as module
    from dlm_kernels.vocab_parallel import VocabShard

    targets, factors = torch.zeros(ROWS, dtype=torch.int64), torch.ones(ROWS)
    with recorded_launches() as recorded:
        for dtype in (torch.bfloat16, torch.float32):
            for columns in (*WIDTHS, ODD):
                logits = torch.empty(ROWS, -(-columns // 64) * 64, dtype=dtype)
                shard = VocabShard(3 * columns, columns, 4 * columns, None, 1)
                statistics = module.row_statistics(logits, targets, factors, shard)
                merged = module.merge_rows(statistics, factors, shard)
                for upstream in (None, torch.ones(())):
                    module.write_gradient(logits, targets, statistics[0], merged, shard, upstream=upstream)
                module.loss_and_gradient(logits, targets, factors, shard)
                if dtype == torch.float32:  # fp32_logits
                    half = torch.empty_like(logits, dtype=torch.bfloat16)
                    module.loss_and_gradient(logits, targets, factors, shard, out=half)
    return {launch.key(): launch for launch in recorded}


@pytest.fixture(scope="module")
def report(launches: dict[str, Launch]) -> Iterator[list[str]]:
    lines: list[str] = []
    yield lines
    print("\n" + "\n".join(lines))


def test_every_kernel_is_lean(launches: dict[str, Launch], report: list[str]) -> None:
    assert len({launch.name for launch in launches.values()}) == 4
    for launch in launches.values():
        compiled = launch.compile()
        used, found = resources(compiled), sass(compiled)
        counts = count_instructions(found, *WIDE, "LDL", "STL", "MUFU.EX2")
        constants = {name: launch.kwargs.get(name) for name in ("R", "K", "RESIDENT", "WORLD")}
        case = f"{launch.name} {launch.args[0].dtype} {constants} warps={used.threads // 32}"
        report.append(f"{case}: {used.registers} registers, {used.shared} bytes shared, {counts}")
        assert used.spills == used.stack == counts["LDL"] == counts["STL"] == 0, case
        assert used.fits(1024 // used.threads), case
        if launch.name != "merge_kernel":
            _require_wide_accesses(launch, used.threads, counts, case)


def _require_wide_accesses(launch: Launch, threads: int, counts: dict[str, int], case: str) -> None:
    lanes, columns = launch.kwargs["R"], launch.kwargs["K"]
    loads = max(lanes // threads, 1)  # of 16 bytes, per thread and tile
    elements = loads * columns
    assert columns * launch.args[0].element_size() == 16
    # One exponential per element and one per lane, in the loop over whole tiles and in the masked one.
    resident = launch.kwargs.get("RESIDENT", False)
    statistics = launch.name != "gradient_kernel" and not resident
    gradient = launch.name != "statistics_kernel" and not resident
    exponentials = 2 * (elements + loads) * statistics + 2 * elements * gradient + elements * resident
    # Some more per row: one per lane when the lanes meet, and those of the cross-entropy.
    assert exponentials <= counts["MUFU.EX2"] <= exponentials + loads + 4, case
    assert counts["LDG.E.128"] >= loads * (statistics or resident), case
    if gradient or resident:
        bits = 128 if launch.args[1].dtype == launch.args[0].dtype else 64
        assert counts[f"STG.E.EF.{bits}" if gradient else f"STG.E.{bits}"] >= loads, case
        assert counts["LDG.E.EF.128"] == loads * gradient, case


def test_eight_ranks_are_merged_in_one_launch(launches: dict[str, Launch], report: list[str]) -> None:
    (launch,) = (launch for launch in launches.values() if launch.name == "merge_kernel")
    of_eight = Launch(launch.kernel, launch.grid, launch.args, {**launch.kwargs, "WORLD": 8})
    used = resources(of_eight.compile())
    report.append(f"merge_kernel of 8 ranks: {used.registers} registers")
    assert used.spills == used.stack == 0 and used.fits(1024 // used.threads)
