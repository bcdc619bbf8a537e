"""Curves of paired runs, compared: where they cross, best against best, data potential, and how it is reported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dlm.crossover.cells import analyse
from megatron_dlm.crossover.curves import (
    Arm,
    Curve,
    Run,
    best,
    common_epochs,
    compare,
    data_potential,
    higher_is_better,
    last_crossing,
    mean_curve,
    read_run,
)
from megatron_dlm.crossover.figure import draw
from megatron_dlm.crossover.report import arms_table, as_json, best_table, crossing_table, markdown, spread
from megatron_dlm.errors import DataError
from megatron_dlm.run_folder import RunFolder

EPOCHS = np.arange(1.0, 51.0)


def curve(values: Any, epochs: Any = None, ci95: float = 0.1, flops: float = 10.0) -> Curve:
    values = np.asarray(values, dtype=float)
    epochs = EPOCHS[: len(values)] if epochs is None else np.asarray(epochs, dtype=float)
    return Curve(epochs, values, np.full(len(values), ci95), flops * epochs)


def u_shaped(bottom: float, level: float = 2.4) -> np.ndarray:
    """An AR's loss, lowest at epoch ``bottom``."""
    return level + 0.001 * (EPOCHS - bottom) ** 2


def falling(level: float, slope: float = 0.02) -> np.ndarray:
    """A DLM's loss."""
    return level - slope * EPOCHS


def run(arm: Arm, values: Any, **options: Any) -> Run:
    tasks = options.pop("tasks", {})
    return Run(arm, curve(values, **options), tasks, unigram=3.3)


def pair(seed: int, dlm: Any, ar: Any, tokens: int = 20_000, **options: Any) -> list[Run]:
    return [
        run(Arm("small", tokens, "masked_diffusion", seed), dlm, flops=9.0, **options),
        run(Arm("small", tokens, "autoregressive", seed), ar, **options),
    ]


def rows(table: list[list[str]]) -> list[dict[str, str]]:
    """By the names in the head; one that stands twice is numbered."""
    head, *rest = table
    names = [name if head.count(name) == 1 else f"{name} {head[: i + 1].count(name)}" for i, name in enumerate(head)]
    return [dict(zip(names, row, strict=True)) for row in rest]


def test_the_crossing_of_two_lines_is_where_algebra_puts_it() -> None:
    # DLM 4 - 0.02 e, AR 2 + 0.03 e: equal at e = 40; the gap is -0.05 e + 2.
    found = compare(curve(4 - 0.02 * EPOCHS), curve(2 + 0.03 * EPOCHS))
    assert found.kind == "crosses" and found.crossings == 1
    assert found.epoch == pytest.approx(40)
    error = 0.1 * math.sqrt(2)
    assert found.low == pytest.approx((2 - error) / 0.05) and found.high == pytest.approx((2 + error) / 0.05)
    assert found.last_epoch == 50 and found.gap == pytest.approx(-0.5)
    assert found.gap_ci95 == pytest.approx(error)


def test_the_place_between_two_evaluations_is_linear() -> None:
    found = compare(curve([3, 2], epochs=[10, 20]), curve([2, 2.25], epochs=[10, 20]))
    assert found.epoch == pytest.approx(10 + 10 * 1 / 1.25)


def test_no_crossing_is_never_and_a_lead_from_the_start_is_always() -> None:
    never = compare(curve(falling(4)), curve(u_shaped(50)))
    assert (never.kind, never.epoch, never.low, never.high) == ("never", None, None, None) and never.gap > 0
    always = compare(curve(u_shaped(50, 2.0)), curve(u_shaped(50, 2.4)))
    assert (always.kind, always.epoch, always.crossings) == ("always", None, 0) and always.gap < 0


def test_of_several_crossings_the_last_counts() -> None:
    # Ahead, behind, ahead, behind, ahead for good between epochs 8 and 9, exactly half way.
    gap = np.array([-1, 1, 1, -1, -1, 1, 2, 1, -1, -2.0])
    found = compare(curve(2 + gap), curve(np.full(10, 2.0)))
    assert found.epoch == pytest.approx(8.5) and found.crossings == 4
    # A lead that is lost by the end is no crossing, however long it was.
    lost = compare(curve(2 + np.array([1, -1, -1, -1, 1.0])), curve(np.full(5, 2.0)))
    assert lost.kind == "never" and lost.crossings == 2


def test_a_crossing_within_the_held_out_error_has_no_latest_epoch() -> None:
    found = compare(curve(2.05 - 0.002 * EPOCHS, ci95=0.1), curve(np.full(50, 2.0), ci95=0.1))
    assert found.epoch == pytest.approx(25) and found.low == 1.0 and found.high is None


def test_without_intervals_the_error_is_not_taken_to_be_zero() -> None:
    found = compare(curve(4 - 0.02 * EPOCHS, ci95=math.inf), curve(2 + 0.03 * EPOCHS))
    assert found.epoch == pytest.approx(40) and found.low == 1.0 and found.high is None


def test_equal_is_not_better() -> None:
    assert compare(curve([3, 2]), curve([2, 2])).kind == "never"
    assert last_crossing(np.array([1.0, 2, 3]), np.array([1.0, 0, -1])) == 2.0


def test_curves_are_compared_at_common_epochs_only() -> None:
    dlm = curve([4, 3, 2, 1.0], epochs=[1, 2, 3, 4])
    # Beyond epoch 3, and between the DLM's evaluations, the AR is far worse: neither may count.
    ar = curve([2, 2, 9, 2.5, 9, 9], epochs=[1, 2, 2.5, 3, 5, 6])
    assert common_epochs([dlm, ar]).tolist() == [1, 2, 3]
    found = compare(dlm, ar)
    assert found.last_epoch == 3 and found.gap == pytest.approx(-0.5) and found.epoch == pytest.approx(2 + 1 / 1.5)
    apart = compare(curve([4, 1], epochs=[1, 2]), curve([2, 2], epochs=[1.5, 2.5]))
    assert apart.kind == "apart" and apart.epoch is None and apart.gap is None
    assert compare(curve([4, 1], epochs=[1, 2]), curve([2, 2], epochs=[2, 3])).kind == "apart"


def test_of_accuracies_the_higher_is_better() -> None:
    found = compare(curve(0.2 + 0.004 * EPOCHS), curve(0.4 - 0.001 * EPOCHS), higher=True)
    assert found.kind == "crosses" and found.epoch == pytest.approx(40) and found.gap == pytest.approx(-0.05)
    assert higher_is_better("hellaswag/acc") and higher_is_better("mmlu/acc_norm")
    assert not higher_is_better("loss") and not higher_is_better("lambada/perplexity")
    assert best(curve([0.1, 0.3, 0.2]), higher=True).epoch == 2


def test_best_is_the_first_minimum_and_says_whether_it_is_the_end() -> None:
    found = best(curve([3, 1, 2, 1]))
    assert (found.value, found.epoch, found.flops, found.at_end) == (1, 2, 20, False)
    assert best(curve([3, 2, 1])).at_end


def test_the_mean_curve_is_of_common_epochs() -> None:
    average = mean_curve([curve([1, 2, 3], epochs=[1, 2, 3]), curve([3, 5], epochs=[2, 3])])
    assert average.epochs.tolist() == [2, 3] and average.values.tolist() == [2.5, 4]
    assert average.ci95 == pytest.approx([0.1 / math.sqrt(2)] * 2)


def test_data_potential_is_interpolated_in_the_logarithm() -> None:
    ar = {1000: 3.0, 4000: 2.0, 16000: 1.0}
    assert data_potential(2.5, ar).tokens == pytest.approx(2000) and data_potential(2.5, ar).relation == "="
    assert data_potential(1.0, ar) == (pytest.approx(16000), "=")
    assert data_potential(0.9, ar) == (16000, ">")
    assert data_potential(3.0, ar) == (1000, "<=") and data_potential(3.5, ar) == (1000, "<=")


def test_the_miniature_crosses_and_its_best_dlm_is_still_not_the_better_model() -> None:
    runs = [*pair(0, falling(3.4), u_shaped(12)), *pair(1, falling(3.45), u_shaped(12))]
    (cell,) = analyse(runs)
    (loss,) = cell.pairings
    crossings = [compare(curve(falling(level)), curve(u_shaped(12))).epoch for level in (3.4, 3.45)]
    assert loss.epochs == crossings and 20 < crossings[0] < crossings[1] < 45
    assert cell.best_gap[0][0] == pytest.approx(2.4 - 2.4, abs=1e-9) and cell.best_gap[1][0] == pytest.approx(0.05)
    assert [costs.ratio_at_best for costs in cell.costs.values()] == pytest.approx([50 * 9 / 120] * 2)
    crossing, against = rows(crossing_table([cell]))[0], rows(best_table([cell]))[0]
    assert crossing["crossing"] == "crosses" and crossing["at epoch 1"] == spread(crossings, 1)
    errors = [(c.low, c.high) for c in loss.by_seed.values()]
    assert crossing["held-out error"] == f"{min(low for low, _ in errors):.1f} to {max(high for _, high in errors):.1f}"
    assert crossing["+-"] == f"{0.1 * math.sqrt(2):.3f}" and crossing["at epoch 2"] == "50.0"
    assert against["better"] == "undecided" and against["data potential"] == "<= 1x"
    assert against["gap of the best"] == "+0.025 (+0.000 to +0.050)" and against["+-"] == f"{0.1 * math.sqrt(2):.3f}"
    assert against["FLOPs at best"] == "3.75x" and "in 1 of 2" in against["FLOPs at equal loss"]
    assert rows(best_table(analyse(runs[2:])))[0]["FLOPs at equal loss"] == "never reached"
    dlm, ar = sorted(rows(arms_table([cell])), key=lambda row: row["arm"], reverse=True)
    assert (dlm["arm"], dlm["best is last"], ar["best is last"]) == ("DLM", "2 of 2", "0 of 2")


def test_the_better_model_is_told_only_from_the_best_of_both() -> None:
    worse = analyse(pair(0, falling(3.9), u_shaped(5)))[0]
    assert worse.pairings[0].by_seed[0].kind == "crosses" and worse.better == "AR"
    better = analyse(pair(0, falling(3.19), u_shaped(12)))[0]
    assert better.better == "DLM"
    # 3.19 - 0.02 e is at most 2.4 from epoch 40 on.
    assert rows(best_table([better]))[0]["FLOPs at equal loss"] == f"{40 * 9 / 120:.2f}x"
    # One seed that says otherwise, and nothing is decided.
    mixed = analyse([*pair(0, falling(3.2), u_shaped(12)), *pair(1, falling(3.9), u_shaped(12))])[0]
    assert mixed.better == "undecided"


def test_seeds_that_do_not_cross_are_counted() -> None:
    cells = analyse([*pair(0, falling(3.4), u_shaped(12)), *pair(1, falling(9.0), u_shaped(12))])
    assert rows(crossing_table(cells))[0]["crossing"] == "crosses 1 of 2, never 1 of 2"
    none = rows(crossing_table(analyse(pair(1, falling(9.0), u_shaped(12)))))[0]
    assert (none["crossing"], none["at epoch 1"], none["held-out error"]) == ("never", "", "")


def test_a_crossing_that_the_error_may_undo_has_no_latest_epoch() -> None:
    found = rows(crossing_table(analyse(pair(0, 2.05 - 0.002 * EPOCHS, np.full(50, 2.0)))))[0]
    assert found["held-out error"] == "1.0 to beyond the last"


def test_a_seed_without_its_pair_is_not_compared() -> None:
    runs = [*pair(0, falling(3.4), u_shaped(12)), pair(1, falling(1.0), u_shaped(12))[0]]
    (cell,) = analyse(runs)
    assert list(cell.pairings[0].by_seed) == [0] and list(cell.best_gap) == [0]
    alone = analyse(runs[:1])
    assert alone[0].better == "undecided" and not rows(crossing_table(alone)) and not rows(best_table(alone))
    assert markdown(alone, []).count("\n|-") == 1, "an empty table is left out"


def test_budgets_and_variants_of_a_grid() -> None:
    runs = []
    for tokens, dlm, ar in ((10_000, 3.0, 2.6), (40_000, 2.9, 1.8)):
        runs += pair(0, falling(dlm), u_shaped(12, ar), tokens)
    masked = Arm("small", 10_000, "autoregressive", 0, input_mask_ratio=0.3)
    runs.append(run(masked, u_shaped(12, 2.4)))
    small, large = analyse(reversed(runs))
    assert [(c.model, c.unique_tokens) for c in (small, large)] == [("small", 10_000), ("small", 40_000)]
    assert [p.variant for p in small.pairings] == ["AR", "AR mask0.3"]
    assert small.best_gap[0][0] == pytest.approx(2.0 - 2.4), "the best of the variants"
    # The AR's best falls from 2.4 to 1.8 between the budgets: 2.0 at two thirds of the way, in the logarithm.
    assert small.potential == (pytest.approx(10_000 * 4 ** (2 / 3)), "=")
    assert rows(best_table([small]))[0]["data potential"] == f"{4 ** (2 / 3):.3g}x"
    assert large.potential == (pytest.approx(10_000 * 4 ** (2.5 / 3)), "=")


def test_the_report_is_json_and_markdown_and_names_what_is_left_out(tmp_path: Path) -> None:
    task = {"hellaswag/acc": curve(0.2 + 0.004 * EPOCHS, ci95=math.inf)}
    other = {"hellaswag/acc": curve(0.4 - 0.001 * EPOCHS)}
    runs = [
        run(Arm("small", 20_000, "masked_diffusion", 0), falling(3.4), tasks=task),
        run(Arm("small", 20_000, "autoregressive", 0), u_shaped(12), tasks=other),
        run(Arm("small", 80_000, "autoregressive", 0), u_shaped(12)),
    ]
    cells = analyse(runs)
    read = json.loads(json.dumps(as_json(cells, ["late"]), allow_nan=False))
    assert read["unfinished"] == ["late"] and read["cells"][0]["comparisons"][1]["metric"] == "hellaswag/acc"
    arm = next(arm for arm in read["cells"][0]["arms"] if arm["objective"] == "masked_diffusion")
    assert arm["name"] == "small-20000tokens-dlm-seed0" and arm["curves"]["loss"]["values"][49] == pytest.approx(2.4)
    assert arm["curves"]["hellaswag/acc"]["ci95"][0] is None
    text = markdown(cells, ["late"])
    assert "Not finished, so left out: late." in text
    assert [(row["figure"], row["crossing"]) for row in rows(crossing_table(cells))] == [
        ("loss", "crosses"),
        ("hellaswag/acc", "crosses"),
    ]
    assert [(c["better"], c["data_potential"]) for c in read["cells"]] == [
        ("undecided", {"tokens": 20_000, "relation": "<="}),
        ("undecided", None),
    ]
    assert text.count("\n|-") == 3 and {line.count("|") for line in text.splitlines() if "|" in line} == {9, 11}
    for axis in ("epochs", "flops"):
        draw(cells, tmp_path / f"{axis}.png", axis)  # type: ignore[arg-type]
        assert (tmp_path / f"{axis}.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epochs.png", "flops.png"]


def write(folder: Path, lines: list[Any]) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_curves_are_read_from_a_runs_records(tmp_path: Path) -> None:
    lines: list[Any] = []
    for step in range(1, 7):
        lines.append({"step": step, "loss": 3.0, "epoch": step / 2, "training_flops": 7.0 * step})
        if step % 2 == 0:
            loss = None if step == 4 else 4.0 - step / 10  # the loss was not finite
            lines.append({"step": step, "valid_nelbo": loss, "valid_nelbo_ci95": 0.2, "valid_unigram": 3.3})
            lines[-1] |= {"task/arc/acc": step / 10, "task/arc/acc_stderr": 0.01, "task/other": "text"}
    found = read_run(Arm("small", 9, "masked_diffusion", 0), RunFolder(write(tmp_path, lines)))
    assert found.loss.epochs.tolist() == [1, 3] and found.loss.values.tolist() == pytest.approx([3.8, 3.4])
    assert found.loss.flops.tolist() == [14, 42] and found.loss.ci95.tolist() == [0.2, 0.2]
    assert list(found.tasks) == ["arc/acc"] and found.tasks["arc/acc"].epochs.tolist() == [1, 2, 3]
    assert found.tasks["arc/acc"].ci95 == pytest.approx([0.0196] * 3) and found.unigram == 3.3


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "No such file"),
        (["{"], "metrics.jsonl:1 is no record"),
        (["3"], "metrics.jsonl:1 is no record"),
        ([{"step": 1, "valid_nelbo": 2.0}], "has no evaluation"),
        ([{"step": 1, "epoch": 1.0, "loss": 3.0}], "has no evaluation"),
    ],
)
def test_records_that_cannot_be_used_are_one_line(tmp_path: Path, lines: list[Any] | None, message: str) -> None:
    if lines is not None:
        write(tmp_path, lines)
    with pytest.raises(DataError, match=message) as raised:
        read_run(Arm("small", 9, "masked_diffusion", 0), RunFolder(tmp_path))
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)
    assert str(raised.value).endswith(f"remove {tmp_path} to train this arm again"), "what helps an arm of a crossover"
