"""What the documents tell a reader to type is accepted, and what they point at is there."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_dlm import cli
from megatron_dlm.config.load import load_config

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/**/*.md"))]
# Where a path in a document may begin.
BASES = [ROOT, ROOT / "megatron_dlm", ROOT / "kernels"]
# What the reader of the worked examples makes.
TO_BE_MADE = {"commands/tokens.py", "tests/quick/test_any_order.py", "tests/quick/test_tokens_command.py"}
OUTPUTS = ("runs/", "checkpoints/")


class Command(NamedTuple):
    """A line of a document's `sh` block."""

    document: str
    line: str

    @property
    def arguments(self) -> list[str]:
        """What comes behind `megatron-dlm`, or behind `-m megatron_dlm`."""
        words = shlex.split(self.line)
        if words[0] == "megatron-dlm":
            return words[1:]
        return words[words.index("megatron_dlm") + 1 :] if "megatron_dlm" in words else []


def name(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def commands_of(document: Path) -> Iterator[Command]:
    for block in re.findall(r"```sh\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.split(r"\s+#\s", f" {line}")[0].strip()
            if line:
                yield Command(name(document), line)


def prose(document: Path) -> str:
    """Without blocks of code, which hold what is to be written."""
    return re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)


COMMANDS = [command for document in DOCUMENTS for command in commands_of(document)]
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
OURS = [command for command in COMMANDS if command.arguments]


@pytest.mark.parametrize("command", [c for c in OURS if c.arguments[0] == "train"], ids=lambda c: c.line)
def test_training_commands_are_valid(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(command.arguments[1:])
    assert config.data.train[0].path == "runs/data/train", "the tour prepares runs/data"


@pytest.mark.parametrize("command", [c for c in OURS if c.arguments[0] != "train"], ids=lambda c: c.line)
def test_other_commands_are_valid(command: Command) -> None:
    command_name, *arguments = command.arguments
    assert command_name in cli.COMMANDS
    parser = argparse.ArgumentParser()
    cli.module_of(command_name).add_arguments(parser)
    args = parser.parse_args(arguments)
    if command_name == "prepare":
        assert str(args.output) in ("runs/data", "runs/crossover-cpu-data")
    if getattr(args, "config", None):
        assert (ROOT / args.config).exists(), args.config


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.arguments], ids=lambda c: c.line)
def test_commands_of_other_programs_have_what_they_name(command: Command) -> None:
    words = [word for word in shlex.split(command.line) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[0] == "make":
        assert words[1] in (*TARGETS, ".venv/.installed"), command
    elif words[:2] == ["python", "-m"]:
        assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").is_file(), command
    else:
        assert words[0] == "python" and (ROOT / words[1]).is_file(), f"{command} is of a program that is not checked"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if not target.startswith("https:"):
            assert (document.parent / target.partition("#")[0]).exists(), f"{name(document)} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_files_and_make_targets_exist(document: Path) -> None:
    text = prose(document)
    for target in re.findall(r"`make ([a-z0-9-]+)", text):
        assert target in TARGETS, f"{name(document)}: make {target}"
    for quoted in re.findall(r"`([^`\n]+)`", text):
        for path in re.findall(r"(?:^|(?<=\s))[\w.*/-]+(?:\.py|\.yaml|/)(?=$|\s)", quoted):
            if not path.startswith(OUTPUTS) and path not in TO_BE_MADE and path != "config.yaml":
                assert list(found(path)), f"{name(document)} names {path}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_symbols_are_in_their_files(document: Path) -> None:
    """`folder/file.py` `symbol`: the file has a word like the symbol's last part."""
    for path, symbol in re.findall(r"`([\w/]+\.py)` `([\w.]+)`", prose(document)):
        if path not in TO_BE_MADE and not symbol.endswith(".py"):
            word = re.compile(rf"\b{symbol.rpartition('.')[2]}\b")
            sources = [file.read_text(encoding="utf-8") for file in found(path)]
            assert any(map(word.search, sources)), f"{name(document)}: {path} has no {symbol}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_documents_are_ascii(document: Path) -> None:
    document.read_bytes().decode("ascii")


def found(path: str) -> Iterator[Path]:
    """The files or folders that a path in a document may mean: tests, and files without a folder, by name alone."""
    for base in BASES:
        yield from (base.glob(path) if "*" in path or not path.endswith("/") else filter(Path.is_dir, [base / path]))
    if "/" not in path:
        yield from (file for base in BASES[1:] for file in base.rglob(path))
        yield from (ROOT / "tests").rglob(path)


def test_there_is_something_to_check() -> None:
    readme = [command for command in OURS if command.document == "README.md"]
    assert len([c for c in readme if c.arguments[0] == "train"]) >= 4
    assert {c.arguments[0] for c in readme} >= {
        *("doctor", "prepare", "plot", "noise-levels", "evaluate", "sample", "export", "import", "crossover")
    }
    assert {c.document for c in COMMANDS} >= {"README.md", "CONTRIBUTING.md", "docs/evaluation.md", "docs/sampling.md"}
    assert sum(len(re.findall(r"`[\w/]+\.py` `[\w.]+`", prose(document))) for document in DOCUMENTS) > 40
