"""The kernel benchmark runs, on a CPU with tiny shapes of the torch twins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import plot_kernels
from tools.benchmark_kernels import KERNELS, main


def test_it_runs_and_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.json"
    assert main(["--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["device"].startswith("CPU") and result["ceilings"]["gemm_tflops"] > 0
    rows = result["rows"]
    assert {row["kernel"] for row in rows} == set(KERNELS)
    assert all("error" not in row and row["ms"] > 0 for row in rows)
    forms = {(row["implementation"], row["form"]) for row in rows if row["kernel"] == "linear_cross_entropy"}
    assert forms >= {("ours", "compacted"), ("torch eager", "rows selected first"), ("torch eager", "dense")}
    ours = next(row for row in result["errors"] if row["implementation"] == "ours fp32 logits")
    assert max(ours["loss"], ours["d_hidden"], ours["d_weight"]) < 1e-2
    assert plot_kernels.main([str(output)]) == 0
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert all(row["implementation"] in table for row in rows)


def test_an_unknown_kernel_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "mask_token"])
    assert "mask_token is none of mask_tokens" in capsys.readouterr().err


def test_another_file_is_no_results_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("", "[]", '{"device": 1}'):
        (tmp_path / "other.json").write_text(content)
        assert plot_kernels.main([str(tmp_path / "other.json")]) == 2
        assert "other.json is no results file" in capsys.readouterr().err


def test_parts_of_a_benchmark_make_one_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [tmp_path / f"{name}.json" for name in ("mask_tokens", "cross_entropy")]
    for path in parts:
        assert main(["--only", path.stem, "--output", str(path)]) == 0
    capsys.readouterr()
    assert plot_kernels.main([*map(str, parts), "--output", str(tmp_path / "both.png")]) == 0
    table = capsys.readouterr().out
    assert "| mask_tokens |" in table and "| cross_entropy |" in table and (tmp_path / "both.png").exists()
    parts[0].write_text(parts[0].read_text().replace('"CPU', '"another CPU'))
    assert plot_kernels.main([*map(str, parts)]) == 2
    assert "several devices or dates" in capsys.readouterr().err
