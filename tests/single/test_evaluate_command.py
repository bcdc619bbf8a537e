"""The evaluate command: the same answers from runs and exports, kills, damaged files, refusals."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_dlm.cli import main
from megatron_dlm.commands import evaluate as command
from megatron_dlm.evaluation import scoring
from megatron_dlm.evaluation.multiple_choice import Answer
from megatron_dlm.evaluation.partial_answers import PartialAnswers
from megatron_dlm.hf.export import export
from megatron_dlm.parallel import topology as parallel
from megatron_dlm.training.progress import Progress
from megatron_dlm.training.saving import save
from megatron_dlm.training.setup import build
from tests.questions import hellaswag, mmlu, write
from tests.runs import tiny_config

OBJECTIVES = ("masked_diffusion", "autoregressive")


@pytest.fixture(scope="module")
def models(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained runs of both objectives, and their exports."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for objective in OBJECTIVES:
        found[objective] = folder / objective
        model = {"objective": objective, "init_std": 0.3, "num_layers": 2}
        directory = {"directory": str(found[objective])}
        config = tiny_config(tiny_data, run=directory, model=model, data={"sequence_length": 64})
        save(build(config, parallel.initialize(config.parallel)), Progress())
        parallel.shutdown()
        found[f"{objective} export"] = folder / f"{objective}-export"
        export(found[objective], found[f"{objective} export"])
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    write(folder / "hellaswag.jsonl", hellaswag(12))
    write(folder / "mmlu.jsonl", mmlu(6))
    write(folder / "lambada.jsonl", [{"text": "the class of names"}, {"text": "import a list of value"}])
    (folder / "nelbo.txt").write_text("A list of names is the value of it.\n" * 8)
    return folder


def evaluate(model: Path, data: Path | None, tasks: str, *arguments: str) -> int:
    where = [] if data is None else ["--data", str(data)]
    return main(["evaluate", "--checkpoint", str(model), "--tasks", tasks, "--masks", "8", *where, *arguments])


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_runs_and_exports_answer_the_same(
    objective: str, models: dict[str, Path], data: Path, tmp_path: Path, capsys: Any
) -> None:
    found = []
    for name in (objective, f"{objective} export"):
        output = tmp_path / f"{name}.json"
        arguments = ("hellaswag,mmlu,lambada,nelbo", "--output", str(output), "--log-questions")
        assert evaluate(models[name], data, *arguments) == 0
        assert [path.name for path in tmp_path.iterdir() if name == path.stem] == [output.name], "nothing else is left"
        found.append(read(output))
    run, exported = found
    for task, questions in (("hellaswag", 12), ("mmlu", 6), ("lambada", 2)):
        ours, theirs = (each["results"][task] for each in found)
        assert ours["questions"] == len(ours["log"]) == questions
        for a, b in zip(ours["log"], theirs["log"], strict=True):
            assert a["values"] == pytest.approx(b["values"], abs=1e-4) and a["choice"] == b["choice"]
        assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-4)
        assert len({value for each in ours["log"] for value in each["values"]}) > questions / 2
    assert run["results"]["mmlu"]["truncated"] == 6 and set(run["results"]["mmlu"]["subjects"]) == {
        "high_school_names",
        "lists",
    }
    nelbo = run["results"]["nelbo"]
    assert nelbo["metrics"] == pytest.approx(exported["results"]["nelbo"]["metrics"], rel=1e-4)
    assert nelbo["tokens"] == 289 and nelbo["metrics"]["bits_per_byte"] > 1
    assert run["model"]["kind"] == "checkpoint" and exported["model"]["kind"] == "hugging_face"
    assert len(run["model"]["tokenizer"]["fingerprint"]) == len(run["model"]["digest"]) == 64
    assert run["model"]["layout"] == "TP1-PP1-DP1" and run["versions"]["megatron-core"]
    (options,) = {json.dumps(each["results"]["hellaswag"]["options"]) for each in found}
    assert (json.loads(options) or {"masks": 8})["masks"] == 8
    out, _ = capsys.readouterr()
    assert "note     mmlu: 6 contexts were cut at their beginnings to fit the model" in out
    lines = out.splitlines()
    assert lines[0].startswith("model    ") and lines[1].split()[:4] == ["task", "questions", "metric", "value"]
    shown = next(line for line in lines if line.startswith("hellaswag"))
    assert shown.split()[:4] == ["hellaswag", "12", "acc", f"{run['results']['hellaswag']['metrics']['acc']:.4f}"]


def _child(arguments: tuple[str, ...], reached: Event) -> None:
    os.setpgid(0, 0)
    plain, calls = scoring.loglikelihoods, []

    def waiting(*values: Any, **keys: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            reached.set()
            time.sleep(3600)  # until the kill
        return plain(*values, **keys)

    scoring.loglikelihoods = waiting  # type: ignore[assignment]
    os._exit(main(list(arguments)))


def test_a_killed_evaluation_goes_on(models: dict[str, Path], data: Path, tmp_path: Path, capsys: Any) -> None:
    model = models["masked_diffusion export"]
    # Rounds of 32 forwards of 16 tokens: a question each.
    options = ("--tokens-per-batch", "16", "--log-questions", "--output")
    assert evaluate(model, data, "hellaswag", *options, str(tmp_path / "straight.json")) == 0
    output, partial = tmp_path / "killed.json", tmp_path / "killed.json.partial"
    arguments = ("evaluate", "--checkpoint", str(model), "--tasks", "hellaswag", "--masks", "8", "--data", str(data))
    context = multiprocessing.get_context("fork")
    reached = context.Event()
    child = context.Process(target=_child, args=((*arguments, *options, str(output)), reached))
    child.start()
    while not reached.wait(0.1):
        assert child.is_alive()
    assert evaluate(model, data, "hellaswag", *options, str(output)) == 2
    assert f"another evaluation is writing {partial}; wait" in capsys.readouterr().err
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    assert not output.exists()
    with contextlib.closing(sqlite3.connect(partial)) as database:
        ((before,),) = database.execute("SELECT count(*) FROM answers").fetchall()
    assert before == 4, "one a round"
    assert evaluate(model, data, "hellaswag", *options, str(output)) == 0
    assert f"hellaswag: {before} of 12 questions are of an earlier run" in capsys.readouterr().err
    straight, resumed = (read(path)["results"]["hellaswag"] for path in (tmp_path / "straight.json", output))
    assert resumed["resumed"] == before and straight["resumed"] == 0
    assert resumed["log"] == straight["log"] and resumed["metrics"] == straight["metrics"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.json", "straight.json"]


def test_what_is_kept_belongs_to_the_question(models: dict[str, Path], data: Path, tmp_path: Path, capsys: Any) -> None:
    """Answers of other options, files or models are not taken, those of more or fewer questions are."""
    output, model = tmp_path / "out.json", models["masked_diffusion export"]
    path = tmp_path / "out.json.partial"
    run = ("hellaswag", "--output", str(output), "--overwrite")

    def resumed(*arguments: str, model: Path = model, data: Path = data) -> int:
        path.write_bytes(content)
        assert evaluate(model, data, *run, *arguments) == 0
        assert not path.exists()
        return read(output)["results"]["hellaswag"]["resumed"]

    content = b""
    assert resumed() == 0
    known: list[tuple[str, dict[int, Answer]]] = []
    original = PartialAnswers.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialAnswers, "add", lambda self, key, new: known.append((key, dict(new))))
        assert evaluate(model, data, *run) == 0
    partial = PartialAnswers(output)
    original(partial, known[0][0], {index: known[0][1][index] for index in (0, 1, 5)})
    partial.close()
    content = path.read_bytes()
    assert resumed() == 3 and resumed("--limit", "4") == 2 and resumed("--tokens-per-batch", "99") == 3
    assert resumed("--seed", "1") == resumed("--guidance", "0.5") == resumed("--estimator", "one_over_t") == 0
    assert resumed(model=models["autoregressive export"]) == 0
    changed = shutil.copytree(model, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    weights[next(iter(weights))].mul_(1.01)
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    assert resumed(model=changed) == 0
    other = write(tmp_path / "other" / "hellaswag.jsonl", hellaswag(12, seed=1))
    assert resumed(data=other) == 0
    capsys.readouterr()
    content = content.replace(b", null]", b", true]", 1)  # one answer, in a sound database
    assert resumed() == 0 and "was damaged, so what it had is evaluated again" in capsys.readouterr().err


def test_a_stopped_evaluation_says_how_to_go_on(
    models: dict[str, Path], data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*values: Any, **keys: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "_gather", stop)
    assert evaluate(models["masked_diffusion export"], data, "hellaswag", "--output", str(tmp_path / "x.json")) == 130
    assert "stopped; the same command goes on where it was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tasks", "arguments", "message"),
    [
        ("hellaswag,pica", [], "the task 'pica' is unknown; choose from hellaswag, mmlu"),
        ("hellaswag,hellaswag", [], "names no task, or one twice"),
        (",", [], "names no task"),
        ("lm_eval:", [], "the task 'lm_eval:' is unknown"),
        ("hellaswag", ["--limit", "0"], "--limit is 0"),
        ("hellaswag", ["--masks", "0"], "--masks is 0"),
        ("hellaswag", ["--guidance", "-2"], "guidance is -2.0"),
        ("hellaswag", ["--seed", "-1"], "seed is -1"),
        ("hellaswag", ["--tokens-per-batch", "0"], "tokens_per_batch is 0"),
        ("mmlu", ["--num-fewshot", "1"], "has no mmlu_dev.jsonl"),
        ("mmlu", ["--num-fewshot", "-1"], "--num-fewshot is -1"),
        ("hellaswag", ["--num-fewshot", "1"], "--num-fewshot is for mmlu and lm-eval's tasks"),
        ("piqa", [], "has no piqa.jsonl or .parquet"),
        ("noise_levels", [], "the task 'noise_levels' is unknown; choose from hellaswag, "),
        ("piqa,nelbo", [], "has no piqa.jsonl or .parquet"),
        ("hellaswag", ["--output", "/nowhere/x.json"], "/nowhere is no directory; make it first"),
        ("hellaswag", ["--tensor-model-parallel-size", "2"], "torchrun --nproc-per-node 2"),
        ("hellaswag", ["--tensor-model-parallel-size", "0"], "must be at least 1"),
    ],
)
def test_refusals_are_one_line(
    models: dict[str, Path], data: Path, tasks: str, arguments: list[str], message: str, capsys: Any
) -> None:
    assert evaluate(models["masked_diffusion export"], data, tasks, *arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("megatron-dlm: error: ") and message in err and err.count("\n") == 1 and not out


def test_more_refusals(
    models: dict[str, Path], data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["autoregressive export"]
    assert evaluate(model, None, "hellaswag") == 2
    assert "hellaswag needs --data" in capsys.readouterr().err
    assert evaluate(model, data, "hellaswag", "--guidance", "1") == 2
    assert "an autoregressive model has no guidance; leave out --guidance" in capsys.readouterr().err
    (tmp_path / "there.json").touch()
    assert evaluate(model, write(tmp_path / "piqa.jsonl", []).parent, "piqa,nelbo") == 2
    assert "has no nelbo.txt beside the questions; put the text there" in capsys.readouterr().err
    (tmp_path / "piqa.jsonl").unlink()
    assert evaluate(model, data, "hellaswag", "--output", str(tmp_path / "there.json")) == 2
    assert "is there already; use --overwrite" in capsys.readouterr().err
    long = write(tmp_path / "long.jsonl", [{**hellaswag(1)[0], "endings": ["a", "b" * 70]}])
    assert evaluate(model, long, "hellaswag", "--output", str(tmp_path / "new.json")) == 2
    assert "long.jsonl line 1: ' bbbbbb" in (err := capsys.readouterr().err) and "has 71 tokens" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.jsonl", "there.json"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert evaluate(model, data, "hellaswag") == 2
    assert "only those run on several processes; leave out torchrun" in capsys.readouterr().err


def test_without_lm_eval(models: dict[str, Path], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert evaluate(models["autoregressive export"], None, "lm_eval:arc_easy") == 2
    assert "need the package lm-eval: pip install 'megatron-dlm[eval]'" in capsys.readouterr().err
