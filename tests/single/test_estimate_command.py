"""`megatron-dlm estimate`: what it prints, where it takes the model from, its figure, and the FLOPs of two runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest

from megatron_dlm import cli
from megatron_dlm.config.load import load_config
from megatron_dlm.config.tree import ModelConfig
from megatron_dlm.costs.inference import Row, inference_costs, sampler_flops
from megatron_dlm.costs.training import Point, compare_training, read_points
from megatron_dlm.errors import DataError
from megatron_dlm.figures import style
from megatron_dlm.formatting import format_flops, format_ratio
from tests.exports import MODEL, make_checkpoint

ROOT = Path(__file__).parents[2]
PAPER = str(ROOT / "examples/configs/paper_1b.yaml")
TINY = str(ROOT / "examples/configs/tiny.yaml")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def estimate(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> str:
        assert cli.main(["estimate", *arguments]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> str:
        before = sorted(Path.cwd().rglob("*"))
        assert cli.main(["estimate", *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1
        assert sorted(Path.cwd().rglob("*")) == before, "something was written"
        return printed.err

    return run


def test_the_table_has_the_published_numbers(estimate: Any) -> None:
    text = estimate("inference", "--config", PAPER, "--vocab-size", "50257")
    published, ours = text.split("our sampler, no prompt")
    row = next(line for line in published.splitlines() if line.startswith("DLM, L steps  ")).split()
    assert row[4::2] == ["16.0x", "64.2x", "258.8x", "1,067x", "4,708x"]
    assert row[3::2] == ["557G", "8.95T", "145T", "2.48P", "49.2P"]
    assert "1,086,011,136 with the LM head" in published and "(50,304 columns)" in ours
    assert all(len(line) <= 110 for line in text.splitlines())


def test_a_prompt_is_of_our_sampler_only(estimate: Any) -> None:
    arguments = ("inference", "--config", PAPER, "--vocab-size", "50258")
    plain, prompted = estimate(*arguments), estimate(*arguments, "--prompt-tokens", "512")
    assert "our sampler, prompt of 512 tokens" in prompted
    section = "published convention, no prompt"
    assert prompted.partition(section)[2].split("our sampler")[0] == plain.partition(section)[2].split("our sampler")[0]
    content = json.loads(estimate(*arguments, "--prompt-tokens", "512", "--json"))
    assert (content["prompt_tokens"], content["vocab_size"], content["head_columns"]) == (512, 50258, 50304)
    model = load_config(["--config", PAPER]).model
    costs = inference_costs(model, 50258, head_columns=50304, prompt_tokens=512, last_layer_rows=True)
    assert content["sampler"] == [curve._asdict() for curve in costs.sampler]
    assert content["published"] == [curve._asdict() for curve in costs.published]
    assert content["tokens"] == [16, 64, 256, 1024, 4096]


def test_no_slow_imports() -> None:
    code = (
        "import sys; from megatron_dlm.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules), 'slow imports'"
    )
    arguments = ["estimate", "inference", "--config", PAPER, "--vocab-size", "50257", "--json"]
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def write_config(path: Path, tokenizer: str = "byte") -> Path:
    content = {"model": MODEL, "data": {"train": [{"path": "x"}], "tokenizer": tokenizer}, "train": {"steps": 100}}
    path.write_text(json.dumps(content))  # which is YAML
    return path


def test_the_model_comes_from_a_file_a_checkpoint_or_a_hugging_face_directory(estimate: Any, tmp_path: Path) -> None:
    """Checkpoints pad the vocabulary of 258 bytes and control tokens; exports do not, and compute whole layers."""
    (tmp_path / "hub").mkdir()
    hub = {
        "model_type": "qwen3",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
    }
    (tmp_path / "hub/config.json").write_text(json.dumps(hub))
    sources = {
        str(write_config(tmp_path / "config.yaml")): (258, 320),
        str(make_checkpoint(tmp_path / "checkpoint")): (258, 320),
        str(tmp_path / "hub"): (300, 300),
    }
    for path, (vocab_size, columns) in sources.items():
        content = json.loads(estimate("inference", "--config", path, "--json"))
        assert (content["vocab_size"], content["head_columns"]) == (vocab_size, columns), path
        spent = sampler_flops(ModelConfig(**MODEL), columns, [Row(16, 16)], last_layer_rows=columns == 320)
        assert content["sampler"][1]["flops"][0] == spent
        given = json.loads(estimate("inference", "--config", path, "--vocab-size", "310", "--json"))
        assert given["vocab_size"] == 310 and given["head_columns"] == max(310, 320 if columns == 320 else 0)


def test_what_cannot_be_estimated_is_one_line(refused: Any, tmp_path: Path) -> None:
    inference = ("inference", "--config")
    assert "give --vocab-size; its tokenizer: cannot read" in refused(*inference, PAPER)
    unknown = write_config(tmp_path / "unknown.yaml", tokenizer="nosuch")
    assert "give --vocab-size; its tokenizer: 'nosuch' is no tokenizer" in refused(*inference, str(unknown))
    assert "cannot read the configuration file 'nosuch.yaml'" in refused(*inference, "nosuch.yaml")
    assert "has no checkpoint" in refused(*inference, str(tmp_path))
    assert "--vocab-size is 0; it must be at least 1" in refused(*inference, PAPER, "--vocab-size", "0")
    assert "--prompt-tokens is -1; it must be at least 0" in refused(*inference, PAPER, "--prompt-tokens", "-1")
    assert "name it with one of .png, .svg, .pdf" in refused(*inference, PAPER, "--output", "figure.jpg")
    assert "make it first" in refused(*inference, PAPER, "--output", str(tmp_path / "no" / "figure.png"))
    assert "--config" in refused("inference")
    assert "{inference,training}" in refused()


def test_a_figure_needs_matplotlib(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "find_spec", lambda name: None)
    assert "pip install 'megatron-dlm[log]'" in refused("inference", "--config", PAPER, "--output", "figure.png")


def test_the_figure_shows_what_the_table_says(estimate: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k)
    )
    text = estimate("inference", "--config", PAPER, "--vocab-size", "50257", "--output", "figure.png")
    assert text.endswith("figure    figure.png\n")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]
    flops, ratio = drawn[0].axes
    assert [panel.get_xscale() + panel.get_yscale() for panel in (flops, ratio)] == ["loglog"] * 2
    assert [note.get_text() for note in ratio.texts] == ["16x", "64x", "259x", "1,067x", "4,708x"]
    model = load_config(["--config", PAPER]).model
    costs = inference_costs(model, 50257, head_columns=50304, last_layer_rows=True)
    for panel, name in ((flops, "flops"), (ratio, "ratio")):
        lines = [line.get_ydata() for line in panel.lines if len(line.get_xdata()) == 9]
        for curve in (*costs.sampler[:4], costs.sampler[-1], costs.published[4]):
            assert any(list(line[::2]) == getattr(curve, name) for line in lines), curve.name
        circles = [line.get_ydata() for line in panel.lines if line.get_marker() == "o"]
        assert [list(values) for values in circles] == [getattr(curve, name) for curve in costs.published[:2]]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_figure_that_fails_leaves_the_old_one(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "figure.svg").write_text("old")

    def fail(self: Any, path: Path, **options: Any) -> None:
        path.write_text("<svg")
        raise error

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail)
    code = cli.main(["estimate", "inference", "--config", PAPER, "--vocab-size", "50257", "--output", "figure.svg"])
    assert code == (2 if isinstance(error, OSError) else 130)
    assert [path.name for path in tmp_path.iterdir()] == ["figure.svg"] and (
        tmp_path / "figure.svg"
    ).read_text() == "old"
    assert ("No space left on device; choose another file" in capsys.readouterr().err) == isinstance(error, OSError)


@pytest.mark.parametrize(
    ("value", "text"),
    [(950, "950"), (999.6, "1.00k"), (34_800_000_000, "34.8G"), (4.92e16, "49.2P"), (3e26, "300Y")],
)
def test_flops_have_three_digits_and_a_unit(value: float, text: str) -> None:
    assert format_flops(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.87, "0.87x"), (9.96, "10.0x"), (999.4, "999.4x"), (4708.02, "4,708x")])
def test_ratios(value: float, text: str) -> None:
    assert format_ratio(value) == text


def write_run(folder: Path, objective: str, losses: dict[int, float | None], flops_per_step: float) -> Path:
    """A run's directory as the trainer writes it: a record a step, and evaluations."""
    from megatron_dlm.training.reporter import Reporter
    from tests.runs import tiny_config

    config = tiny_config(Path("data"), run={"directory": str(folder)}, model={"objective": objective})
    reporter = Reporter(config, active=True, steps=max(losses), first_step=0)
    reporter.say = lambda line: None  # type: ignore[method-assign]
    rest = {"valid_nelbo_ci95": 0.01, "valid_bits_per_byte": 1.0, "valid_bits_per_byte_ci95": 0.01}
    rest |= {"valid_perplexity_bound": 9.0, "valid_unigram": 3.0}
    for step in range(1, max(losses) + 1):
        reporter.step({"step": step, "loss": 3.0, "training_flops": flops_per_step * step}, show=False)
        if step in losses:
            loss = float("nan") if losses[step] is None else losses[step]
            reporter.evaluation({"step": step, "valid_nelbo": loss, **rest})
    reporter.close()
    (folder / "config.yaml").write_text(f"model: {{objective: {objective}}}\n")
    return folder


AR = {10: 3.6, 20: 2.4, 30: 2.5, 40: 3.1}
DLM = {10: 3.7, 20: None, 30: 2.9, 40: 2.4, 50: 2.2, 60: 2.3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "ar": write_run(folder / "ar", "autoregressive", AR, 1e15),
        "dlm": write_run(folder / "dlm", "masked_diffusion", DLM, 3e15),
        "short": write_run(folder / "short", "masked_diffusion", {10: 3.7, 30: 2.9}, 3e15),
    }


def test_training_costs_of_two_runs(runs: dict[str, Path], estimate: Any) -> None:
    arguments = ("training", "--autoregressive", str(runs["ar"]), "--diffusion", str(runs["dlm"] / "metrics.jsonl"))
    assert json.loads(estimate(*arguments, "--json")) == {
        "autoregressive": {"step": 20, "loss": 2.4, "flops": 2e16},
        "diffusion": {"step": 50, "loss": 2.2, "flops": 1.5e17},
        "reached": {"step": 40, "loss": 2.4, "flops": 1.2e17},
        "ratio_at_best": 7.5,
        "ratio_at_equal_loss": 6.0,
    }
    lines = estimate(*arguments).splitlines()
    assert lines[0] == "AR at its best         2.4000 nats/tok at step 20 | 20.0P FLOPs"
    assert lines[1] == "DLM at its best        2.2000 nats/tok at step 50 | 150P FLOPs | 7.50x AR at its best"
    assert lines[2] == "DLM at AR's best loss  2.4000 nats/tok at step 40 | 120P FLOPs | 6.00x AR at its best"


def test_a_loss_that_is_not_reached_has_no_ratio(runs: dict[str, Path], estimate: Any) -> None:
    arguments = ("training", "--autoregressive", str(runs["ar"]), "--diffusion", str(runs["short"]))
    content = json.loads(estimate(*arguments, "--json"))
    assert content["reached"] is None and content["ratio_at_equal_loss"] is None
    assert content["ratio_at_best"] == 4.5
    assert "not reached in this run: 0.5000 nats/tok above at its best" in estimate(*arguments)


def test_the_first_of_equal_losses_is_the_best() -> None:
    points = [Point(step, loss, 10.0 * step) for step, loss in ((1, 3.0), (2, 2.0), (3, 2.0))]
    costs = compare_training(points, points)
    assert costs.autoregressive == costs.diffusion == costs.reached == points[1]
    assert costs.ratio_at_best == costs.ratio_at_equal_loss == 1.0


def test_runs_in_each_other_s_place_are_refused(runs: dict[str, Path], refused: Any) -> None:
    error = refused("training", "--autoregressive", str(runs["dlm"]), "--diffusion", str(runs["ar"]))
    assert "is a masked_diffusion run" in error and "give a run of autoregressive" in error


def test_a_file_cut_short_is_read_and_others_are_one_line(runs: dict[str, Path], refused: Any, tmp_path: Path) -> None:
    records = (runs["ar"] / "metrics.jsonl").read_text()
    file = tmp_path / "metrics.jsonl"
    file.write_text(records + '{"step": 41, "lo')  # a kill in the middle of a line
    assert read_points(tmp_path) == read_points(runs["ar"]) == [Point(s, x, 1e15 * s) for s, x in AR.items()]
    step, evaluation = '{"step": 1, "loss": 3.0}\n', '{"step": 1, "valid_nelbo": 2.0}\n'
    for content, message in (
        (step + "step 2\n" + step, f"{file}:2 is no record of a step"),
        (step + "[1]\n", f"{file}:2 is no record of a step"),
        (step, "has no held-out evaluation: train with data.valid"),
        (step + evaluation, "has no training_flops of the step of any evaluation"),
        (step + '{"step": 1, "valid_nelbo": null}\n', "has no finite valid_nelbo"),
        (b"\xff\xfe\n", f"{file}:1 is no record of a step"),
    ):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DataError, match="^[^\n]+$"):
            read_points(file)
        assert message in refused("training", "--autoregressive", str(file), "--diffusion", str(runs["dlm"]))
    assert "cannot read" in refused("training", "--autoregressive", "nowhere", "--diffusion", str(runs["dlm"]))
