"""A run is the same at every parallel layout, micro-batch size and recompute setting."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_dlm.training.setup  # noqa: F401  (imported once, in the parent of the forked ranks)
from tests.ranks import run_ranks
from tests.runs import Trace, run_cases, tiny_config

pytestmark = pytest.mark.time_limit(3600)  # all runs are those of the first test
STEPS, BATCH = 20, 16
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, TP2),
    "TP2+SP": (2, {**TP2, "sequence_parallel": True}),
    "PP2": (2, PP2),
    "PP2xVP2": (2, {**PP2, "virtual_pipeline_model_parallel_size": 2}),
    "DP2": (2, {}),
    "TP2-PP2-DP2": (8, {**TP2, **PP2}),
}
# Sections of the configuration.
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "diffusion": {"model": {"objective": "masked_diffusion"}},
    "diffusion tied": {"model": {"objective": "masked_diffusion", "tie_embeddings": True}},
    "autoregressive": {"model": {"objective": "autoregressive"}},
    "autoregressive tied": {"model": {"objective": "autoregressive", "tie_embeddings": True}},
}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "unweighted": {"diffusion": {"weighting": "none", "masking": "bernoulli", "random_length_probability": 0.1}},
    "cart": {"diffusion": {"weighting": "cart", "random_length_probability": 0.1}},
    "complementary": {"diffusion": {"complementary": True, "random_length_probability": 0.1}},
}
# Model, layout, extra settings of train and kernels; compared with the model on one process.
Case = tuple[str, str, dict[str, Any]]
KERNELS = ["last_layer_rows"]
USUAL: list[Case] = [
    *(("diffusion", layout, {}) for layout in LAYOUTS),
    ("diffusion tied", "TP2+SP", {}),
    ("diffusion tied", "PP2xVP2", {}),
    ("autoregressive", "TP2+SP", {}),
    ("autoregressive", "TP2-PP2-DP2", {}),
    ("autoregressive tied", "PP2", {}),
    ("autoregressive tied", "DP2", {}),
    ("diffusion", "TP2+SP", {"recompute": "full"}),
    ("diffusion", "PP2xVP2", {"recompute": "full"}),
    ("diffusion", "DP2", {"micro_batch_size": 4}),
    ("diffusion", "one", {"micro_batch_size": 8}),
    ("diffusion", "one", {"micro_batch_size": 1}),
    ("diffusion", "one", {"last_layer_rows": "all"}),
    ("autoregressive", "one", {"recompute": "full", "micro_batch_size": 4}),
    *((variant, "DP2", {"micro_batch_size": 1}) for variant in VARIANTS),
    *((variant, "one", {"micro_batch_size": 4}) for variant in VARIANTS),
    ("unweighted", "PP2", {}),
    ("complementary", "PP2", {"micro_batch_size": 1}),
]
# The rest of the matrix takes minutes: `make parity` runs it.
REST: list[Case] = [
    case
    for case in [
        *((model, layout, {}) for model in MODELS for layout in LAYOUTS),
        *((model, layout, {"recompute": "full"}) for model in MODELS for layout in ("TP2", "PP2xVP2", "TP2-PP2-DP2")),
    ]
    if case not in USUAL
]


def name(case: Case) -> str:
    return " ".join([case[0], case[1], *(f"{key}={value}" for key, value in case[2].items())])


CASES = [
    *(pytest.param(case, id=name(case)) for case in USUAL),
    *(pytest.param(case, id=name(case), marks=pytest.mark.slow) for case in REST),
]


@pytest.fixture(scope="module")
def traces(
    request: pytest.FixtureRequest, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Trace]:
    """The traces of the selected cases; the cases of one world size share one launch."""
    layouts = {"one": (1, {}), **LAYOUTS}
    cases: list[Case] = [(model, "one", {}) for model in [*MODELS, *VARIANTS]]
    for item in request.session.items:
        case = item.callspec.params["case"] if item.path == request.path else None
        if case and case not in cases:
            cases.append(case)
    results: dict[str, Trace] = {}
    for world in (1, 2, 8):
        here = [case for case in cases if layouts[case[1]][0] == world]
        configs = [
            tiny_config(
                tiny_data,
                **(MODELS | VARIANTS)[model],
                parallel=layouts[layout][1],
                kernels={key: extra[key] for key in KERNELS if key in extra},
                train={
                    **{"steps": STEPS, "micro_batch_size": 2, "global_batch_size": BATCH},
                    **{key: value for key, value in extra.items() if key not in KERNELS},
                },
            )
            for model, layout, extra in here
        ]
        folder = tmp_path_factory.mktemp(f"world{world}")
        if here:
            traced = run_ranks(run_cases, world, folder, configs, STEPS)
            results |= {name(case): trace for case, trace in zip(here, traced, strict=True)}
    return results


def _worst(before: list[float], now: list[float]) -> float:
    assert all(map(math.isfinite, [*before, *now]))
    return max(abs(a - b) / abs(a) for a, b in zip(before, now, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_run_equals_one_process(case: Case, traces: dict[str, Trace]) -> None:
    one, here = traces[f"{case[0]} one"], traces[name(case)]
    assert one.losses[-1] < one.losses[0], "the run must learn, or equality says little"
    loss, norm = _worst(one.losses, here.losses), _worst(one.grad_norms, here.grad_norms)
    assert here.parameters.keys() == one.parameters.keys()
    difference = {
        key: float((here.parameters[key] - whole).norm() / whole.norm()) for key, whole in one.parameters.items()
    }
    assert all(map(math.isfinite, difference.values())), "a hole in the assembled parameters is NaN"
    worst = max(difference, key=difference.__getitem__)
    print(f"PARITY {name(case):40} loss {loss:.1e} gradient norm {norm:.1e} parameters {difference[worst]:.1e}")
    assert loss < 1e-6
    assert norm < 1e-5
    assert difference[worst] < 1e-5, worst
    assert here.nelbo == pytest.approx(one.nelbo, rel=1e-6)
    torch.testing.assert_close(here.logits, one.logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_noised_tokens_are_identical(case: Case, traces: dict[str, Trace]) -> None:
    one, here = traces[f"{case[0]} one"], traces[name(case)]
    assert len(one.noised) == STEPS * BATCH
    assert here.noised == one.noised
