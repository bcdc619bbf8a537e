"""The kernels of `mask_tokens`, compiled for sm_90 as the host code launches them: resources, and what recompiles."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from dlm_kernels.philox import Purpose
from dlm_kernels.types import NoiseDraw
from tests.aot import Launch, count_instructions, recorded_launches, resources, sass, skip_unless_available

DRAW = NoiseDraw("stratified_antithetic", step=3, global_batch_size=512)
ODD_DRAW = NoiseDraw("stratified_antithetic", step=3, global_batch_size=513)

# Name: shape, then what else is given.
CALLS: dict[str, dict[str, Any]] = {
    "32 x 4096": {"shape": (32, 4096), "draw": DRAW},
    "16 x 8192": {"shape": (16, 8192), "draw": DRAW},
    "33 x 8192, lengths, odd": {"shape": (33, 8192), "draw": ODD_DRAW, "eligible": True, "consecutive": False},
    "4 x 8192, pairs, lengths": {"shape": (4, 8192), "eligible": True, "complement": True, "consecutive": False},
    "300 x 1000, levels": {"shape": (300, 1000)},
    "3 x 5002, pairs": {"shape": (3, 5002), "complement": True, "capacity": None, "consecutive": False},
    "1 x 1, stratified": {"shape": (1, 1), "draw": NoiseDraw("stratified", 3, 512), "capacity": None},
    "3 x 5001, pairs": {"shape": (3, 5001), "complement": True, "consecutive": False},
    "3 x 8191": {"shape": (3, 8191), "draw": DRAW},
    "1 x 131072": {"shape": (1, 131072), "draw": DRAW},
    "2 x 131072, pairs, lengths": {"shape": (2, 131072), "eligible": True, "complement": True, "consecutive": False},
    "64 x 4096, lengths": {"shape": (64, 4096), "draw": DRAW, "eligible": True},
    "32 x 4096, Bernoulli": {"shape": (32, 4096), "draw": DRAW, "masking": "bernoulli"},
    "32 x 4096, Bernoulli, pairs, lengths": {
        "shape": (32, 4096),
        "masking": "bernoulli",
        "eligible": True,
        "complement": True,
        "consecutive": False,
    },
}

INSTRUCTIONS = "LDG.E.128 STG.E.128 LDL STL BAR.SYNC SHFL REDUX IMAD.HI.U32 IMAD.WIDE.U32".split()


@pytest.fixture(autouse=True)
def compiler() -> None:
    skip_unless_available()


def launches_of(
    shape: tuple[int, int],
    *,
    seed: int = 11,
    first: int | None = None,
    mask_token_id: int = 50257,
    consecutive: bool = True,
    draw: NoiseDraw | None = None,
    eligible: bool = False,
    complement: bool = False,
    capacity: int | None = 65536,
    **options: Any,
) -> list[Launch]:
    """What `mask_tokens` launches for sequences from sample id `first` on; nothing is executed."""
    from dlm_kernels.triton_mask_tokens import mask_tokens

    batch = shape[0]
    if first is None:
        first = 0 if draw is None else draw.step * draw.global_batch_size
    ids = first + np.arange(batch)
    if draw is None:
        options |= {"levels": torch.zeros(batch, dtype=torch.int64), "weights": torch.zeros(batch)}
    if eligible:
        options["eligible"] = torch.zeros(shape, dtype=torch.bool)
    if complement:
        options["complement"] = torch.zeros(batch, dtype=torch.bool)
    options |= {"seed": seed, "mask_token_id": mask_token_id, "capacity": capacity, "draw": draw}
    with recorded_launches() as launches:
        mask_tokens(torch.empty(shape, dtype=torch.int64), ids if consecutive else ids[::-1].copy(), **options)
    return launches


@pytest.mark.parametrize("name", CALLS)
def test_resources(name: str) -> None:
    shape = CALLS[name]["shape"]
    for launch in launches_of(**CALLS[name]):
        compiled = launch.compile()
        used, code = resources(compiled), sass(compiled)
        counts = count_instructions(code, *INSTRUCTIONS)
        print(
            f"\n{name:37} {launch.name:15} {used.threads:3} threads {used.registers:3} registers {used.spills} spilled "
            f"{used.shared:6} shared  {' '.join(f'{key} {count}' for key, count in counts.items() if count)}",
            end="",
        )
        assert used.spills == 0 and used.stack == 0 and counts["LDL"] + counts["STL"] == 0
        assert used.fits()
        if launch.name in ("mask_rows", "apply_blocks") and shape[1] % 2 == 0:
            # All of the int64 tokens are loaded and stored in units of 16 bytes.
            needed = launch.kwargs["BLOCK"] // 2 // used.threads
            assert counts["LDG.E.128"] >= needed and counts["STG.E.128"] >= needed
            # Nothing moves between threads but sums and scans.
            assert "ttg.convert_layout" not in compiled.asm["ttgir"]


def test_launches() -> None:
    """Exact counts of rows that fit into one program: one launch, and one more for the eligible tokens."""
    names = {name: [launch.name for launch in launches_of(**CALLS[name])] for name in CALLS}
    assert names["32 x 4096"] == ["mask_rows"]
    assert names["33 x 8192, lengths, odd"] == ["count_eligible", "mask_rows"]
    assert names["1 x 131072"] == ["select_rows", "count_blocks", "apply_blocks"]
    assert names["32 x 4096, Bernoulli"] == ["count_blocks", "apply_blocks"]


def test_consecutive_ids_are_one_number() -> None:
    (launch,) = launches_of((4, 64), first=70)
    assert launch.kwargs["SAMPLE_IDS"] is None and launch.kwargs["first_id"] == 70
    (launch,) = launches_of((4, 64), first=70, consecutive=False)
    assert launch.kwargs["SAMPLE_IDS"].tolist() == [73, 72, 71, 70]


@pytest.mark.parametrize("masking", ["exact_count", "bernoulli"])
@pytest.mark.parametrize("seq", [4096, 131072])
def test_what_changes_with_the_steps_compiles_nothing(masking: str, seq: int) -> None:
    """Triton compiles once per key, and by itself takes 1, multiples of 16 and 64-bit numbers for special cases."""

    def keys(step: int, size: int, **options: Any) -> list[str]:
        draw = NoiseDraw("stratified_antithetic", step, size)
        return [launch.key() for launch in launches_of(draw=draw, masking=masking, **options)]

    first = keys(0, 64, shape=(1, seq), capacity=1)
    assert keys(1, 64, shape=(16, seq), capacity=4096) == first
    assert keys(2**31 + 7, 510, shape=(17, seq), capacity=65537, seed=2**64 - 1) == first
    assert keys(16, 512, shape=(32, seq), seed=1, mask_token_id=1) == first
    assert keys(16, 512, shape=(32, seq), purpose=Purpose.VALIDATION) != first


def test_weights_are_divided_as_on_the_host() -> None:
    """Correctly rounded, in fp64; what Triton makes of a division of float32 is not."""
    for masking in ("exact_count", "bernoulli"):
        launch = launches_of((32, 4096), draw=DRAW, masking=masking)[0]
        assert re.search(r"div\.rn\.f64", launch.compile().asm["ptx"])
