"""How training amplifies rounding: the two runs in which layouts were seen to differ most, beside one process.

    OMP_NUM_THREADS=1 python -m tests.amplification

One process sums in another order where its micro-batch is another one, and starts from weights that are wrong in the
last bit where it is told so. If either ends as far from the straight run as a layout does, the layout adds nothing.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import megatron_dlm.training.setup  # noqa: F401  (imported once, in the parent of the forked ranks)
from megatron_dlm.config.tree import Config
from tests.ranks import run_ranks
from tests.runs import TINY, Trace, tiny_config, trace, write_data

LAST_BIT = 1e-7
Case = tuple[Config, float]  # and the perturbation of its initial weights
# The sections of either run, its steps, and those of the layout with its name.
RUNS: dict[str, tuple[dict[str, Any], int, str, dict[str, Any]]] = {
    "four rows, antithetic noise levels, lr 3e-3 after one step": (
        {
            "diffusion": {"noise_levels": "antithetic", "random_length_probability": 0.1},
            "optimizer": {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 1, "decay_steps": 5},
            "train": {"steps": 20, "global_batch_size": 4, "micro_batch_size": 2},
        },
        8,
        "DP2, micro-batch 1",
        {"train": {"steps": 20, "global_batch_size": 4, "micro_batch_size": 1}},
    ),
    "eight rows, autoregressive": (
        {
            "model": {**TINY["model"], "objective": "autoregressive"},
            "train": {"steps": 20, "global_batch_size": 8, "micro_batch_size": 2},
        },
        20,
        "TP2",
        {"parallel": {"tensor_model_parallel_size": 2}},
    ),
}


def main() -> None:
    """Print a line for each comparison: largest relative differences, and the worst matrix."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_data(folder)
        for title, (sections, steps, layout, changes) in RUNS.items():
            small = {**sections, "train": {**sections["train"], "micro_batch_size": 1}}
            cases = [(tiny_config(folder, **keys), 0.0) for keys in (sections, small, {**sections, **changes})]
            alone = [*cases[:2], (cases[0][0], LAST_BIT)]
            straight, *others = [
                *run_ranks(_traces, 1, folder, alone, steps),
                *run_ranks(_traces, 2, folder, cases[2:], steps),
            ]
            print(f"{title}, {steps} steps")
            for name, other in zip(
                ("one process, micro-batch 1", "one process, last bit", layout), others, strict=True
            ):
                print(f"  {name:<28}{_compare(straight, other)}", flush=True)


def _traces(cases: list[Case], steps: int) -> list[Trace]:
    return [trace(config, steps, perturbation) for config, perturbation in cases]


def _compare(straight: Trace, other: Trace) -> str:
    norms = [abs(a - b) / a for a, b in zip(straight.grad_norms, other.grad_norms, strict=True)]
    difference = {
        key: float((other.parameters[key] - whole).norm() / whole.norm()) for key, whole in straight.parameters.items()
    }
    worst = max(difference, key=difference.__getitem__)
    elements = (other.parameters[worst] - straight.parameters[worst]).abs()
    share = float(elements.max() / elements.norm())
    return (
        f"gradient norm {max(norms):.0e} (step {norms.index(max(norms)) + 1}) | parameters {difference[worst]:.0e}, "
        f"{share:.0%} of it in one weight ({worst})"
    )


if __name__ == "__main__":
    main()
