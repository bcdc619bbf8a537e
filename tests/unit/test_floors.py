"""The order of the modules: each imports only from floors below it, or beside it where that makes no circle.

Read from the source with `ast`, so imports inside functions count too.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = sorted([*ROOT.glob("kernels/dlm_kernels/**/*.py"), *ROOT.glob("megatron_dlm/**/*.py")])
EVERYTHING = [
    path
    for folder in ("kernels", "megatron_dlm", "tests", "tools", "examples", ".ci", ".")
    for path in ((ROOT / folder).glob("*") if folder == "." else (ROOT / folder).glob("**/*"))
    if path.is_file()
    and path.suffix in {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".sh", ".cfg", ""}
    and "__pycache__" not in path.parts
    and path.name != "LICENSE"
]

# The longest matching prefix decides.
FLOORS = {
    "dlm_kernels": 0,
    "megatron_dlm": 0,  # the package itself holds the version only
    "megatron_dlm.errors": 0,
    "megatron_dlm.figure_style": 1,
    "megatron_dlm.files": 0,
    "megatron_dlm.config": 1,
    "megatron_dlm.config_loading": 1,
    "megatron_dlm.config_validation": 1,
    "megatron_dlm.diffusion": 1,
    "megatron_dlm.storage": 2,
    "megatron_dlm.parallel": 2,
    "megatron_dlm.model": 3,
    "megatron_dlm.data": 3,
    "megatron_dlm.training": 4,
    "megatron_dlm.inference": 5,
    "megatron_dlm.hf": 5,
    "megatron_dlm.evaluation": 5,
    "megatron_dlm.training.trainer": 6,
    "megatron_dlm.launch": 7,
    "megatron_dlm.crossover": 7,
    "megatron_dlm.crossover_grid": 7,
    "megatron_dlm.commands": 7,
    "megatron_dlm.cli": 7,
    "megatron_dlm.__main__": 7,
}
# A definition of one error, which floors above and below floor 3 may name.
PLAIN = {"megatron_dlm.data.errors"}
MEGATRON_FLOORS = range(2, 6)


def module_name(path: Path) -> str:
    base = ROOT / "kernels" if "kernels" in path.relative_to(ROOT).parts[:1] else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path): path for path in CODE}


def floor(module: str) -> int:
    parts = module.split(".")
    for length in range(len(parts), 1 if parts[0] == "megatron_dlm" and len(parts) > 1 else 0, -1):
        name = ".".join(parts[:length])
        if name in FLOORS:
            return FLOORS[name]
    raise AssertionError(f"{module} has no floor; add it to FLOORS")


@cache
def imports(path: Path) -> frozenset[str]:
    """Modules that the file imports anywhere; `from package import module` is the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: use an absolute import"
            module = node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}"
                found.add(full if full in NAMES else module)
    return frozenset(found)


def starts(module: str, *prefixes: str) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def test_there_is_code():
    assert {"megatron_dlm.config", "megatron_dlm.launch", "dlm_kernels"} <= set(NAMES)


@pytest.mark.parametrize("module", sorted(NAMES))
def test_imports_come_from_lower_floors(module):
    own = floor(module)
    for target in imports(NAMES[module]):
        if starts(target, "megatron_dlm", "dlm_kernels") and target not in PLAIN:
            other = floor(target)
            assert other <= own, f"{module} (floor {own}) imports {target} (floor {other})"


@pytest.mark.parametrize("module", sorted(NAMES))
def test_heavy_imports_stay_on_their_floors(module):
    own, targets = floor(module), imports(NAMES[module])
    if own not in MEGATRON_FLOORS:
        assert not [target for target in targets if starts(target, "megatron")], "megatron-core belongs on floors 2-5"
    if own == 1:
        assert not [target for target in targets if starts(target, "torch.distributed")]
    if own == 0:
        third_party = {target.split(".")[0] for target in targets} - sys.stdlib_module_names
        assert third_party <= {"torch", "numpy", "triton", "dlm_kernels"}, "dlm_kernels needs torch only"


def test_no_circles():
    """Modules import each other at load time without a circle."""
    graph = {
        module: {
            target
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            for target in _targets(node)
            if target in NAMES and target != module
        }
        for module, path in NAMES.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def _targets(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        names = {f"{node.module}.{alias.name}" for alias in node.names}
        return {name if name in NAMES else node.module or "" for name in names}
    return set()


@pytest.mark.parametrize("path", [path for path in EVERYTHING if path.suffix == ".py"], ids=lambda path: path.name)
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: path.name)
def test_files_are_ascii(path):
    path.read_bytes().decode("ascii")
