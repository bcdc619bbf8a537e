"""The command line from outside: what is printed, exit codes, and what is not imported."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_dlm import cli
from megatron_dlm.commands import doctor
from megatron_dlm.config.load import build_parser
from megatron_dlm.config.tree import Config
from megatron_dlm.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "examples/configs/tiny.yaml")


@pytest.fixture(autouse=True)
def not_under_torchrun(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def keys(section: type, prefix: str = "") -> list[str]:
    config = section()
    return [f"{name.name}.{key.name}" for name in fields(config) for key in fields(getattr(config, name.name))]


def test_help_explains_every_key_with_its_default():
    actions = {action.dest: action for action in build_parser()._actions}
    for key in keys(Config):
        assert len(actions[key].help or "") > 12, key
    text = " ".join(build_parser().format_help().split())
    assert "Tokens of one sequence. (type: int, default: 256)" in text
    assert "Share of the samples" in " ".join(help_of("--data.train.help").split())


def help_of(option: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "megatron_dlm", "train", option], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "--config", TINY, "--print_config"]])
def test_help_imports_neither_torch_nor_megatron(arguments):
    code = (
        "import sys; from megatron_dlm.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules), 'slow imports'"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_doctor_does_not_import_megatron(capsys):
    code = (
        "import sys; from megatron_dlm.cli import main\n"
        "assert main(['doctor', '--json']) == 0\n"
        "assert not {'megatron', 'transformers'} & set(sys.modules), 'slow imports'"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    findings = json.loads(run.stdout)
    assert "supported" in findings["megatron-core"] and findings["layers"]
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in findings)


def test_doctor_says_what_is_missing_and_what_follows(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    findings = doctor.examine()
    assert findings["backend"].startswith("gloo") and "no GPU" in findings["layers"]
    assert findings["sentencepiece"] == "absent (SentencePiece tokenizers)"
    assert "psutil is absent" in findings["memory"]
    assert doctor._in_range("0.20.1", doctor.MEGATRON_SUPPORTED).startswith("0.20.1 (NOT supported")
    assert doctor._in_range("0.16.0", doctor.MEGATRON_SUPPORTED).startswith("0.16.0 (NOT supported")
    assert doctor._in_range("0.19.2", doctor.MEGATRON_SUPPORTED).startswith("0.19.2 (supported")
    assert doctor._in_range("absent", doctor.MEGATRON_SUPPORTED).startswith("absent (needed")


def test_doctor_names_gpus_and_transformer_engine(monkeypatch):
    class Properties:
        name, total_memory = "H200", 139 * 2**30

    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: Properties)
    monkeypatch.setattr(doctor, "find_spec", lambda name: True)
    monkeypatch.setattr(doctor, "installed_version", lambda name: "2.11.0")
    findings = doctor.examine()
    assert findings["device"] == ["H200, 139 GiB"] and findings["backend"] == "nccl"
    assert findings["layers"] == "Transformer Engine's"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.layers", "3"], "did you mean num_layers?"),
        (["--model.num_attention_heads", "3"], "is not a multiple of model.num_attention_heads (3)"),
        (["--train.epochs", "1"], "exactly one of train.steps and train.epochs"),
    ],
)
def test_configuration_errors_are_one_line_and_exit_2(capsys, options, message):
    assert cli.main(["train", "--config", TINY, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron-dlm: error: ") and message in error
    assert error.count("\n") == 1


def test_contradictions_leave_nothing_behind(tmp_path):
    assert cli.main(["train", "--config", TINY, "--train.epochs", "1"]) == 2
    assert not (tmp_path / "runs").exists()


def test_only_rank_0_prints_what_every_rank_finds(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    slept: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    assert cli.main(["train", "--config", TINY, "--model.layers", "3"]) == 2
    assert sum(slept) >= 1, "torchrun kills rank 0 when another rank ends before it has printed"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("error", "code"), [(ConfigError("x"), 2), (DataError("x"), 2), (KeyboardInterrupt(), 130)])
def test_errors_of_commands(monkeypatch, error, code):
    def fail(args):
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    assert cli.main(["doctor"]) == code


def test_a_bug_is_not_taken_for_a_user_error(monkeypatch):
    monkeypatch.setattr(doctor, "run", lambda args: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["doctor"])


def test_usage_errors_exit_2(capsys):
    for argv, named in ((["nosuch"], "nosuch"), (["prepare", "--workers", "x"], "workers"), (["train"], "--config")):
        assert cli.main(argv) == 2
        error = capsys.readouterr().err
        assert named in error and error.count("\n") == 1


def test_print_config_shows_the_result(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--config", TINY, "--train.steps", "7", "--print_config"])
    assert not end.value.code
    assert "steps: 7" in capsys.readouterr().out


def test_every_command_has_a_module():
    modules = {path.stem.rstrip("_").replace("_", "-") for path in Path(doctor.__file__).parent.glob("[a-z]*.py")}
    assert set(cli.COMMANDS) == modules - {"common"} | {"crossover"}
