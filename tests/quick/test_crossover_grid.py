"""A crossover's file: the arms it makes, every refusal, and folders that hold something else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dlm.cli import main
from megatron_dlm.config.load import dump_yaml, to_dict
from megatron_dlm.crossover.grid import Crossover, check_recorded, first_difference, folder_of, load_crossover
from megatron_dlm.errors import ConfigError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("crossover*.yaml"))
FILE: dict[str, Any] = {
    "base": {
        "run": {"directory": "runs/x"},
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 48},
        "data": {"train": [{"path": "t"}], "valid": [{"path": "v"}], "tokenizer": "byte", "sequence_length": 32},
        "train": {"steps": 100},
    },
    "grid": {
        "unique_tokens": [4000, 1000],
        "models": {"small": {}, "wide": {"hidden_size": 64, "init_std": 1}},
        "seeds": [3, 4],
        "autoregressive": {"input_mask_ratio": [0.0, 0.3], "dropout": [0.0, 0.1]},
    },
    "arms_at_once": 2,
}


def load(folder: Path, tree: dict[str, Any] | str = FILE, **options: Any) -> Crossover:
    path = folder / "grid.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return load_crossover(str(path), **options)


def changed(key: str, value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(FILE)
    *parents, last = key.split(".")
    place = tree
    for name in parents:
        place = place.setdefault(name, {})
    place[last] = value
    return tree


def test_every_pair_differs_in_the_objective_alone(tmp_path: Path) -> None:
    crossover = load(tmp_path)
    assert crossover.directory == Path("runs/x") and crossover.arms_at_once == 2
    assert len(crossover.arms) == 2 * 2 * 2 * (1 + 4)
    by_name = {arm.name: config for arm, config in crossover.arms.items()}
    dlm, ar = by_name["wide-1000tokens-dlm-seed3"], by_name["wide-1000tokens-ar-seed3"]
    assert ar.run.directory == "runs/x/wide-1000tokens-ar-seed3"
    trees = [to_dict(config) for config in (dlm, ar)]
    assert [tree["model"].pop("objective") for tree in trees] == ["masked_diffusion", "autoregressive"]
    assert [tree["run"].pop("directory") for tree in trees] == [dlm.run.directory, ar.run.directory]
    assert trees[0] == trees[1]
    assert dlm.model.hidden_size == 64 and dlm.model.init_std == 1.0 and dlm.model.num_layers == 2
    assert dlm.data.unique_tokens == 1000 and dlm.run.seed == 3
    variant = by_name["small-4000tokens-ar-mask0.3-drop0.1-seed4"]
    assert variant.autoregressive.input_mask_ratio == 0.3
    assert variant.model.attention_dropout == variant.model.hidden_dropout == 0.1
    assert by_name["small-4000tokens-dlm-seed4"].model.hidden_dropout == 0.0
    first = [arm.name for arm in crossover.arms][:2]
    assert first == ["small-1000tokens-dlm-seed3", "small-1000tokens-ar-seed3"], "a pair comes early"


def test_a_grid_of_one_and_what_the_command_line_overrides(tmp_path: Path) -> None:
    tree = changed("grid", {"unique_tokens": [1000], "seeds": [1]})
    tree["base"]["model"]["hidden_dropout"] = 0.2
    crossover = load(tmp_path, tree, output=str(tmp_path / "out"), arms_at_once=1)
    names = [arm.name for arm in crossover.arms]
    assert names == ["base-1000tokens-dlm-seed1", "base-1000tokens-ar-seed1"]
    assert crossover.directory == tmp_path / "out" and crossover.arms_at_once == 1
    assert crossover.base.run.directory == str(tmp_path / "out")
    assert {config.model.hidden_dropout for config in crossover.arms.values()} == {0.2}, "both have the base's"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("grids", {}, "unknown key grids (did you mean grid?)"),
        ("grid.seed", [1], "unknown key grid.seed (did you mean seeds?)"),
        ("grid.autoregressive.dropouts", [0.1], "unknown key grid.autoregressive.dropouts (did you mean dropout?)"),
        ("grid.models", {"a": {"layers": 3}}, "unknown key grid.models.a.layers"),
        ("grid.models", {"a": {"num_layers": "x"}}, "grid.models.a.num_layers must be an integer"),
        ("grid.models", {"a": 3}, "grid.models.a must be a mapping"),
        ("grid.models", {"a/b": {}}, "grid.models has the name 'a/b'"),
        ("grid.models", {"a": {"objective": "autoregressive"}}, "both objectives are trained"),
        ("grid.models", {}, "grid.models is empty"),
        ("grid.seeds", [], "grid.seeds is empty"),
        ("grid.seeds", [1, 1], "two arms of the grid are small-1000tokens-dlm-seed1"),
        ("grid.unique_tokens", [1e4], "grid.unique_tokens[0] must be an integer"),
        ("grid.autoregressive.dropout", [], "grid.autoregressive.dropout is empty"),
        ("grid.autoregressive.input_mask_ratio", [1.5], "ar-mask1.5-seed3: autoregressive.input_mask_ratio is 1.5"),
        ("grid.autoregressive.input_mask_ratio", [0.1, 0.1000000001], "two differ too little"),
        ("base.optimiser", {}, "unknown key base.optimiser (did you mean optimizer?)"),
        ("base.run.seed", 3, "base.run.seed is decided by the grid"),
        ("base.model.objective", "autoregressive", "base.model.objective is decided by the grid"),
        ("base.data.unique_tokens", 3, "it belongs in grid.unique_tokens"),
        ("base.autoregressive.input_mask_ratio", 0.1, "base.autoregressive.input_mask_ratio is decided by the grid"),
        ("base.data.valid", [], "base.data.valid is empty"),
        ("base.checkpoint.resume", "never", "would keep a stopped arm from going on"),
        ("base.diffusion.complementary", True, "half the sequences"),
        ("base.train.epochs", 3, "small-1000tokens-dlm-seed3: give exactly one of"),
        ("grid.models", {"small": {"num_attention_heads": 3}}, "small-1000tokens-dlm-seed3: model.hidden_size"),
        ("grid.unique_tokens", [7], "small-7tokens-dlm-seed3: data.unique_tokens (7)"),
        ("base", None, "base must be a mapping"),
        ("base.run", None, "base.run must be a mapping"),
        ("arms_at_once", 0, "arms_at_once is 0"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any, message: str
) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(changed(key, value)))
    assert main(["crossover", "--config", str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron-dlm: error: ") and message in error and error.count("\n") == 1
    assert [child.name for child in tmp_path.iterdir()] == ["grid.yaml"], "nothing is left behind"


def test_other_files_and_usages_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [("{base: {}}", "has no grid"), ("grid: {}\ngrid: {}", "stands twice"), ("- 1", "must be a mapping")]
    for text, message in cases:
        with pytest.raises(ConfigError, match=message):
            load(tmp_path, text)
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump(FILE))
    out = ["--config", str(grid), "--output", str(tmp_path / "out")]
    assert main(["crossover", *out, "--report"]) == 2
    assert "no arm in" in capsys.readouterr().err
    assert main(["crossover", *out, "--report", "--plan"]) == 2
    assert main(["crossover", *out]) == 2
    assert "small-1000tokens-dlm-seed3: " in capsys.readouterr().err, "its data are not there"
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "a", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert main(["crossover", *out]) == 2
    assert "use --plan" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def trained(folder: Path, crossover: Crossover) -> Path:
    """The folder of the first arm as a run leaves it."""
    config = next(iter(crossover.arms.values()))
    directory = Path(config.run.directory)
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_yaml(config))
    (directory / "arm.json").write_text("{}")
    (directory / "status.json").write_text(json.dumps({"exit_code": 0, "reason": "done"}))
    assert folder_of(config).is_finished
    return directory


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("base.train.steps", 200, "was trained with train.steps 100, not 200"),
        ("base.optimizer", {"lr": 5e-3}, "was trained with optimizer.lr 0.001, not 0.005"),
        ("grid.models", {"small": {"num_layers": 4}}, "was trained with model.num_layers 2, not 4"),
        ("base.evaluate", {"sequences": 8}, "was trained with evaluate.sequences 64, not 8"),
        ("base.data.sequence_length", 16, "was trained with data.sequence_length 32, not 16"),
    ],
)
def test_results_of_another_configuration_are_not_mixed_in(tmp_path: Path, key: str, value: Any, message: str) -> None:
    out = str(tmp_path / "out")
    trained(tmp_path, load(tmp_path, output=out))
    with pytest.raises(ConfigError) as raised:
        check_recorded(load(tmp_path, changed(key, value), output=out))
    assert message in str(raised.value) and "small-1000tokens-dlm-seed3" in str(raised.value)


def test_what_changes_no_result_may_change(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    trained(tmp_path, load(tmp_path, output=out))
    tree = changed("grid.seeds", [3, 4, 5])  # more arms
    tree["base"]["train"] |= {"micro_batch_size": 2, "log_interval": 5}
    tree["base"]["checkpoint"] = {"interval": 7}
    tree["base"]["parallel"] = {"data_parallel_size": 2}
    check_recorded(load(tmp_path, tree, output=out))


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    crossover = load(tmp_path, output=str(tmp_path / "out"))
    directory = trained(tmp_path, crossover)
    (directory / "arm.json").unlink()
    with pytest.raises(ConfigError, match="not of a crossover"):
        check_recorded(crossover)
    (directory / "arm.json").write_text("{}")
    (directory / "config.yaml").write_text("model: {layers: 3}")
    with pytest.raises(ConfigError, match="another version"):
        check_recorded(crossover)
    other = Path(list(crossover.arms.values())[1].run.directory)
    other.write_text("")
    (directory / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="is a file"):
        check_recorded(crossover)


@pytest.mark.parametrize("text", ["", "{", "3", '{"exit_code": 75}', '{"exit_code": 1}'])
def test_only_a_run_that_ended_well_is_finished(tmp_path: Path, text: str) -> None:
    crossover = load(tmp_path, output=str(tmp_path / "out"))
    directory = trained(tmp_path, crossover)
    (directory / "status.json").write_text(text)
    assert not folder_of(next(iter(crossover.arms.values()))).is_finished


def test_the_first_difference_has_a_path() -> None:
    assert first_difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ("a.c", 2, 3)
    assert first_difference({"a": 1}, {"a": 1, "b": 2}) == ("b", None, 2)
    assert first_difference({"a": [1]}, {"a": [1]}) is None


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid(path: Path) -> None:
    crossover = load_crossover(str(path))
    assert {arm.objective for arm in crossover.arms} == {"masked_diffusion", "autoregressive"}


def test_examples_are_there() -> None:
    assert [path.stem for path in EXAMPLES] == ["crossover_cpu", "crossover_gpu", "crossover_paper_1b"]
