"""Tasks at parallel layouts: the answers of one process, and in training they leave no trace."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_dlm.config.tree import Config
from megatron_dlm.data.tokenizer import ByteTokenizer
from megatron_dlm.errors import ConfigError
from megatron_dlm.hf.export import export
from megatron_dlm.parallel import topology as parallel
from tests.questions import hellaswag, mmlu, write
from tests.ranks import run_ranks
from tests.runs import tiny_config

OBJECTIVES = ("masked_diffusion", "autoregressive")
TASKS = "hellaswag,mmlu,lambada"
LAYOUTS = {
    "TP2-PP1-DP1": (2, ["--tensor-model-parallel-size", "2"]),
    "TP1-PP2-DP2": (4, ["--pipeline-model-parallel-size", "2"]),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    write(folder / "hellaswag.jsonl", hellaswag(11))
    write(folder / "mmlu.jsonl", mmlu(5))
    write(folder / "lambada.jsonl", [{"text": "the class of names"}, {"text": "import a list of value"}])
    return folder


def config(data: Path, directory: Path, objective: str, /, **sections: Any) -> Config:
    model = {"objective": objective, "init_std": 0.3, "num_layers": 2}
    return tiny_config(data, run={"directory": str(directory)}, model=model, **sections)


def save_all(configs: list[Config]) -> None:
    from megatron_dlm.training.progress import Progress
    from megatron_dlm.training.saving import save
    from megatron_dlm.training.setup import build

    for each in configs:
        save(build(each, parallel.initialize(each.parallel)), Progress())


def evaluate_all(runs: list[tuple[Path, Path]], data: Path, arguments: list[str], interrupted: bool = False) -> None:
    """``megatron-dlm evaluate`` of (run, output), on ranks that torchrun seems to have started."""
    from megatron_dlm.commands import evaluate
    from megatron_dlm.evaluation import scoring

    parallel.shutdown = lambda: None  # the process group is the test's, which ends it
    gather, calls = scoring._gather, 0

    def stopping(*values: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return gather(*values)

    for run, output in runs:
        parser = ArgumentParser()
        evaluate.add_arguments(parser)
        common = ["--checkpoint", str(run), "--tasks", TASKS, "--data", str(data), "--masks", "8"]
        # Rounds of few questions, so that replicas have several to share.
        more = ["--tokens-per-batch", "99", "--log-questions", "--output", str(output), *arguments]
        if interrupted:
            calls, scoring._gather = 0, stopping
            with pytest.raises(KeyboardInterrupt):
                evaluate.run(parser.parse_args([*common, *more]))
            scoring._gather = gather
            dist.barrier()  # the answers are closed
        assert evaluate.run(parser.parse_args([*common, *more])) == 0
        dist.barrier()


def values(path: Path) -> dict[str, list[list[float]]]:
    results = json.loads(path.read_text())["results"]
    return {name: [each["values"] for each in result["log"]] for name, result in results.items()}


def test_every_layout_and_the_export_answer_the_same(tiny_data: Path, data: Path, tmp_path: Path) -> None:
    runs = {objective: tmp_path / objective for objective in OBJECTIVES}
    run_ranks(save_all, 1, tmp_path, [config(tiny_data, runs[objective], objective) for objective in OBJECTIVES])
    exports = {objective: tmp_path / f"{objective}-export" for objective in OBJECTIVES}
    for objective in OBJECTIVES:
        export(runs[objective], exports[objective])

    def output(objective: str, place: str) -> Path:
        return tmp_path / f"{objective}-{place}.json"

    def pairs(folders: dict[str, Path], place: str) -> list[tuple[Path, Path]]:
        return [(folders[objective], output(objective, place)) for objective in OBJECTIVES]

    run_ranks(evaluate_all, 1, tmp_path, pairs(runs, "one"), data, [])
    run_ranks(evaluate_all, 1, tmp_path, pairs(exports, "export"), data, [])
    for layout, (ranks, arguments) in LAYOUTS.items():
        run_ranks(evaluate_all, ranks, tmp_path, pairs(runs, layout), data, arguments, ranks == 4)
    worst = 0.0
    for objective in OBJECTIVES:
        one = values(output(objective, "one"))
        assert [len(one[name]) for name in TASKS.split(",")] == [11, 5, 2]
        for place in ("export", *LAYOUTS):
            content, found = json.loads(output(objective, place).read_text()), values(output(objective, place))
            assert content["model"]["layout"] == ("one process" if place == "export" else place)
            resumed = sum(result["resumed"] for result in content["results"].values())
            assert 0 < resumed < 18 if place == "TP1-PP2-DP2" else resumed == 0
            for name in one:
                assert found[name] == [pytest.approx(row, abs=1e-4) for row in one[name]], (objective, place, name)
                pairs_of_rows = zip(sum(one[name], []), sum(found[name], []), strict=True)
                worst = max(worst, *(abs(a - b) for a, b in pairs_of_rows))
    print(f"EVALUATE largest difference of log-likelihoods {worst:.1e}")
    assert not list(tmp_path.glob("*.partial"))


def compare_noise_levels(runs: list[Path], text: Path, output: Path, arguments: list[str]) -> None:
    """``megatron-dlm noise-levels`` of two runs, on ranks that torchrun seems to have started."""
    from megatron_dlm.commands import noise_levels

    parallel.shutdown = lambda: None  # the process group is the test's, which ends it
    parser = ArgumentParser()
    noise_levels.add_arguments(parser)
    models = [part for run in runs for part in ("--checkpoint", str(run))]
    common = ["--data", str(text), "--levels", "4", "--windows", "5", "--tokens-per-batch", "99", "--json", str(output)]
    assert noise_levels.run(parser.parse_args([*models, *common, *arguments])) == 0


def test_noise_levels_are_the_same_at_every_layout(tiny_data: Path, tmp_path: Path, capfd: Any) -> None:
    runs = [tmp_path / "first", tmp_path / "second"]
    first = config(tiny_data, runs[0], "masked_diffusion")
    second = config(tiny_data, runs[1], "masked_diffusion", data={"sequence_length": 24})
    second.run.seed += 1
    run_ranks(save_all, 1, tmp_path, [first, second])
    text = tmp_path / "text.txt"
    text.write_text("A list of names is the value of it.\n" * 6)
    run_ranks(compare_noise_levels, 1, tmp_path, runs, text, tmp_path / "one.json", [])
    alone = capfd.readouterr().out
    one = json.loads((tmp_path / "one.json").read_text())
    assert set(one) == {"first", "second", "difference"} and one["first"]["nelbo"] != one["second"]["nelbo"]
    for layout, (ranks, arguments) in LAYOUTS.items():
        run_ranks(compare_noise_levels, ranks, tmp_path, runs, text, tmp_path / f"{layout}.json", arguments)
        assert capfd.readouterr().out == alone.replace("one.json", f"{layout}.json"), "one rank prints"
        found = json.loads((tmp_path / f"{layout}.json").read_text())
        for name, table in one.items():
            assert found[name]["levels"] == [pytest.approx(level, abs=1e-5) for level in table["levels"]], layout


def train_all(configs: list[Config]) -> None:
    from megatron_dlm.evaluation.during_training import DuringTraining
    from megatron_dlm.training.setup import build
    from megatron_dlm.training.trainer import train

    for each in configs:
        assert train(build(each, parallel.initialize(each.parallel)), DuringTraining)


def read(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tasks_during_training(objective: str, tiny_data: Path, data: Path, tmp_path: Path, capfd: Any) -> None:
    from megatron_dlm.evaluation.during_training import check_questions

    tasks = [{"name": "hellaswag", "path": str(data), "masks": 8}, {"name": "mmlu", "path": str(data), "limit": 3}]
    tasks.append({"name": "lambada", "path": str(data / "lambada.jsonl")})
    ranks, other = {
        "masked_diffusion": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        "autoregressive": (2, {"pipeline_model_parallel_size": 2}),
    }[objective]

    def case(name: str, layout: dict[str, Any], tasks: list[dict[str, Any]]) -> Config:
        return config(
            tiny_data,
            tmp_path / name,
            objective,
            parallel=layout,
            train={"steps": 4, "log_interval": 2, "global_batch_size": 8},
            optimizer={"warmup_steps": 1, "decay_steps": 1},
            evaluate={"interval": 2, "sequences": 4, "tasks": tasks},
        )

    cases = {"one": case("one", {}, tasks), "other": case("other", other, tasks)}
    check_questions(cases["one"], ByteTokenizer())
    run_ranks(train_all, 1, tmp_path, [cases["one"], case("quiet", {}, [])])
    run_ranks(train_all, ranks, tmp_path, [cases["other"]])
    evaluations = {name: [r for r in read(tmp_path / name) if "valid_nelbo" in r] for name in cases}
    for name, records in evaluations.items():
        assert [record["step"] for record in records] == [2, 4]
        for record, expected in zip(records, evaluations["one"], strict=True):
            found = {key: value for key, value in record.items() if key.startswith("task/")}
            assert {
                f"task/{task}/acc{end}" for task in ("hellaswag", "mmlu", "lambada") for end in ("", "_stderr")
            } <= set(found)
            assert found == pytest.approx({key: expected[key] for key in found}, rel=1e-3), name
    perplexities = [record["task/lambada/perplexity"] for record in evaluations["one"]]
    assert perplexities[0] != perplexities[1], "the model as it is"
    losses = [[r["loss"] for r in read(tmp_path / name) if "loss" in r] for name in ("one", "quiet")]
    assert losses[0] == losses[1], "the training does not notice"
    board = EventAccumulator(str(tmp_path / "one" / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("task/hellaswag/acc")] == [2, 4]
    assert f" | hellaswag acc {evaluations['one'][0]['task/hellaswag/acc']:.4f} +- " in capfd.readouterr().out


def test_tasks_are_checked_before_training(tiny_data: Path, data: Path, tmp_path: Path) -> None:
    from megatron_dlm.commands import train

    def check(*tasks: dict[str, Any], **sections: Any) -> None:
        train.check(config(tiny_data, tmp_path, "masked_diffusion", evaluate={"tasks": list(tasks)}, **sections), 1)

    task = {"name": "hellaswag", "path": str(data)}
    check(task)
    with pytest.raises(ConfigError, match=r"evaluate.tasks\[0\]: .*/nowhere does not exist; give the file"):
        check({**task, "path": str(data / "nowhere")})
    with pytest.raises(ConfigError, match=r"evaluate.tasks\[0\].name must be one of hellaswag, .*mean hellaswag\?"):
        check({**task, "name": "helaswag"})
    with pytest.raises(ConfigError, match=r"evaluate.tasks\[1\] has no path; add it"):
        check(task, {"name": "mmlu"})
    with pytest.raises(ConfigError, match=r"evaluate.tasks\[0\].limit is 0"):
        check({**task, "limit": 0})
    with pytest.raises(ConfigError, match=r"evaluate.tasks\[0\].path is empty"):
        check({**task, "path": " "})
    with pytest.raises(ConfigError, match="evaluate.tasks names hellaswag twice"):
        check(task, task)
    with pytest.raises(ConfigError, match="data.valid must name a corpus"):
        check(task, data={"train": [{"path": str(tiny_data / "train")}], "valid": [], "tokenizer": "byte"})
    long = write(tmp_path / "long.jsonl", [{**hellaswag(1)[0], "endings": ["a", "b" * 40]}])
    with pytest.raises(
        ConfigError, match=r"evaluate.tasks\[0\]: .*long.jsonl line 1: ' b.* has 41 tokens, more than the 32"
    ):
        check({**task, "path": str(long)})
