"""The tests of this folder stay quick: what they import starts no processes and loads no megatron-core."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = sorted(path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__))
SLOW = {"megatron", "transformers", "lm_eval", "triton", "multiprocessing", "subprocess"}
SLOW |= {"megatron_dlm.parallel"}  # which loads megatron-core without naming it


@cache
def source(module: str) -> Path | None:
    """The file of a module of this repository."""
    for base in (ROOT, ROOT / "kernels"):
        path = base.joinpath(*module.split("."))
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.exists():
                return file
    return None


def executed(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that happen when a module is imported: not those in functions, or for types alone."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            yield from executed([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from executed([*node.body, *(line for handler in node.handlers for line in handler.body)])


@cache
def imports(file: Path, package: str) -> frozenset[str]:
    """Modules that are imported with this file; of `from package import name` the name too, it may be one."""
    found = set()
    for node in executed(ast.parse(file.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        else:
            module = f"{package}.{node.module}" if node.level else node.module or ""
            found.update({module} | {f"{module}.{alias.name}" for alias in node.names})
    return frozenset(found)


@pytest.mark.parametrize("path", HERE, ids=lambda path: path.name)
def test_nothing_slow_is_imported(path: Path) -> None:
    trails = {name: (path.name, name) for name in imports(path, "tests.quick")}
    todo = list(trails)
    while todo:
        name = todo.pop()
        parts = name.split(".")
        assert not SLOW & {parts[0], name}, " -> ".join(trails[name])
        found = {".".join(parts[:length]) for length in range(1, len(parts))}  # a package comes before its modules
        if file := source(name):
            found |= imports(file, name if file.name == "__init__.py" else name.rpartition(".")[0])
        for other in found - trails.keys():
            trails[other] = (*trails[name], other)
            todo.append(other)


def test_a_detour_is_found(tmp_path: Path) -> None:
    path = tmp_path / "test_detour.py"
    path.write_text("def test():\n    import subprocess\nimport megatron_dlm.training.step\n")
    with pytest.raises(AssertionError, match=r"^test_detour.py -> megatron_dlm.training.* -> megatron"):
        test_nothing_slow_is_imported(path)
