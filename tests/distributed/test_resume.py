"""A resumed run is the same run, bit by bit, and any layout continues what another has saved.

``pytest -s`` prints the table of differences; ``make exactness`` runs every case.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.resuming import Figures, continue_runs
from tests.runs import tiny_config

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
TRAIN = {"steps": 20, "micro_batch_size": 2, "global_batch_size": 8}
BF16 = {"train": {**TRAIN, "precision": "bf16"}}
DROPOUT = {"model": {"num_layers": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1}}
AUTOREGRESSIVE = {"model": {"objective": "autoregressive"}, "autoregressive": {"input_mask_ratio": 0.3}}

RESUME: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "one bf16": (1, BF16),
    "one dropout": (1, DROPOUT),
    "one autoregressive": (1, AUTOREGRESSIVE),
    "PP2": (2, {"parallel": PP2}),
    "PP2-VP2 dropout": (
        2,
        {"parallel": {**PP2, "virtual_pipeline_model_parallel_size": 2}, "model": {"hidden_dropout": 0.1}},
    ),
    "TP2-DP2": (4, {"parallel": TP2}),
    "TP2+SP-DP2 bf16 dropout": (4, {"parallel": {**TP2, "sequence_parallel": True}, **BF16, **DROPOUT}),
}
RESHARD: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "TP4": (4, {"tensor_model_parallel_size": 4}),
    "PP2-VP2": (2, {**PP2, "virtual_pipeline_model_parallel_size": 2}),
    "DP4": (4, {}),
    "TP2-PP2-DP2": (8, {**TP2, **PP2}),
}
MODELS = [pytest.param({}, id="untied"), pytest.param({"tie_embeddings": True}, id="tied", marks=pytest.mark.slow)]
HALF, STEPS = 10, 20


@pytest.fixture(scope="module")
def resumed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Figures, str, Figures, str]]:
    """For every case the straight run and the one that was continued half-way; one launch for each world size."""
    results = {}
    for world in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"world{world}")
        names = [name for name, (size, _) in RESUME.items() if size == world]
        configs = [
            tiny_config(
                tiny_data, **{"run": {"directory": str(folder / name), "seed": 7}, "train": TRAIN, **RESUME[name][1]}
            )
            for name in names
        ]
        straight = run_ranks(continue_runs, world, folder, configs, 0, STEPS, HALF)
        second = run_ranks(continue_runs, world, folder, configs, HALF, STEPS, None)
        results |= {name: (*a, *b) for name, a, b in zip(names, straight, second, strict=True)}
    return results


@pytest.mark.parametrize("case", RESUME)
def test_resume_is_bit_exact(case: str, resumed: dict[str, tuple[Figures, str, Figures, str]]) -> None:
    straight, end, continued, continued_end = resumed[case]
    assert straight[-1][0] < straight[0][0], "the run must learn, or equality says little"
    differing = sum(a != b for a, b in zip(straight[HALF:], continued, strict=True))
    print(f"RESUME {case:24} {differing} of {HALF} losses and norms differ, digests equal: {end == continued_end}")
    assert continued == straight[HALF:]
    assert continued_end == end


@pytest.mark.parametrize("model", MODELS)
def test_another_layout_continues_the_run(model: dict[str, Any], tiny_data: Path, tmp_path: Path) -> None:
    def config(layout: dict[str, Any]) -> Any:
        run = {"directory": str(tmp_path / "run"), "seed": 7}
        return tiny_config(tiny_data, run=run, parallel=layout, train=TRAIN, model={"num_query_groups": 4, **model})

    world, layout = RESHARD["TP2-PP2-DP2"]
    ((straight, _),) = run_ranks(continue_runs, world, tmp_path, [config(layout)], 0, HALF + 3, HALF)
    for name, (world, layout) in RESHARD.items():
        ((here, _),) = run_ranks(continue_runs, world, tmp_path, [config(layout)], HALF, HALF + 3, None)
        pairs = list(zip(here, straight[HALF:], strict=True))
        loss, norm = (max(abs(a[i] - b[i]) / b[i] for a, b in pairs) for i in (0, 1))
        following = abs(pairs[0][0][0] - pairs[0][1][0]) / pairs[0][1][0]
        print(f"RESHARD TP2-PP2-DP2 -> {name:12} next loss {following:.1e}, 3 steps: loss {loss:.1e} norm {norm:.1e}")
        assert following < 1e-6
        assert loss < 1e-6 and norm < 1e-5
