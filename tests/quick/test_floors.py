"""The house: three rings, a floor for every folder, no circle, no arrow upward.

Read from the source with `ast`, so imports inside functions and under ``TYPE_CHECKING`` count like all others: what a
file needs to be understood is what it names.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
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

# From the ground up: the names on one line may not import one another, but each what is on the lines above it.
# A name is a folder of megatron_dlm, or a file beside those folders.
GROUND = [
    ["dlm_kernels", "shipped", "megatron_dlm"],  # shipped: what exports carry; megatron_dlm: the version
    ["errors"],
    ["files", "packages", "formatting"],
    ["run_folder", "output_folder", "config"],
]
RUN = [
    ["flops", "launch", "diffusion", "data", "parallel"],
    ["model"],
    ["checkpoint"],
    ["training"],
]
BEFORE_AND_AFTER = [
    ["preparation", "generation", "hf", "costs", "rehearsal"],
    ["evaluation"],
    ["figures"],
    ["commands"],
]
EXPERIMENT = [
    ["crossover"],
    ["cli"],
    ["__main__"],
]
FLOORS = {
    name: number for number, names in enumerate([*GROUND, *RUN, *BEFORE_AND_AFTER, *EXPERIMENT]) for name in names
}
MEGATRON = {"parallel", "model", "training", "preparation", "rehearsal"}
"""Folders that may import megatron-core: importing any of them prepares the machine for it first."""
LIGHT = {"shipped", "megatron_dlm", "errors", "files", "packages", "formatting", "run_folder"}
LIGHT |= {"config", "flops", "diffusion", "costs", "data"}
"""Those that know no process groups."""
Graph = Mapping[str, Iterable[str]]


def module_name(path: Path) -> str:
    base = ROOT / "kernels" if "kernels" in path.relative_to(ROOT).parts[:1] else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path): path for path in CODE}


def room(module: str) -> str:
    """The folder or file that has a floor."""
    parts = module.split(".")
    return parts[0] if parts[0] == "dlm_kernels" or len(parts) == 1 else parts[1]


def imports_of(source: str, package: str = "", names: Iterable[str] = frozenset(NAMES)) -> set[str]:
    """Modules that a source imports anywhere; `from package import module` is the module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"{package}.{node.module}" if node.level else node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}"
                found.add(full if full in names else module)
    return found


@cache
def imports(module: str) -> frozenset[str]:
    path = NAMES[module]
    return frozenset(imports_of(path.read_text(encoding="utf-8"), module.rpartition(".")[0]))


def starts(module: str, *prefixes: str) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def circle(graph: Graph) -> list[str]:
    """The names along a circle, the first one twice; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph.get(name, ())):
            if found := visit(target, [*trail, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_there_is_code() -> None:
    assert {"megatron_dlm.config.tree", "megatron_dlm.launch", "dlm_kernels"} <= set(NAMES)
    assert {room(module) for module in NAMES} == set(FLOORS), "every folder has a floor, and every floor is there"


@pytest.mark.parametrize("module", sorted(NAMES))
def test_imports_come_from_lower_floors(module: str) -> None:
    own = room(module)
    for target in imports(module):
        if starts(target, "megatron_dlm", "dlm_kernels") and (other := room(target)) != own:
            assert FLOORS[other] < FLOORS[own], (
                f"{module} (floor {FLOORS[own]}) imports {target} (floor {FLOORS[other]})"
            )


@pytest.mark.parametrize("module", sorted(NAMES))
def test_heavy_imports_stay_in_their_rooms(module: str) -> None:
    own, targets = room(module), imports(module)
    if own not in MEGATRON:
        assert not [target for target in targets if starts(target, "megatron")], f"{own} does not import megatron-core"
    if own in LIGHT:
        assert not [target for target in targets if starts(target, "torch.distributed")]
    third_party = {target.split(".")[0] for target in targets if target} - sys.stdlib_module_names
    if own == "dlm_kernels":
        assert third_party <= {"torch", "numpy", "triton", "dlm_kernels"}, "dlm_kernels needs torch only"
    if own == "shipped":
        assert third_party <= {"torch", "transformers", "megatron_dlm"}, "exports have no more than these"
        source = NAMES[module].read_text(encoding="utf-8")
        absolute = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and not node.level]
        assert not [node for node in absolute if starts(node.module or "", "megatron_dlm")], "use relative imports"


def test_no_circles() -> None:
    """Not of files, and so not of folders either, whose floors ascend."""
    graph = {module: {target for target in imports(module) if target in NAMES and target != module} for module in NAMES}
    assert not (found := circle(graph)), " -> ".join(found)


def test_a_circle_for_types_alone_is_found() -> None:
    sources = {
        "pair.one": "from __future__ import annotations\nfrom pair.two import two\n",
        "pair.two": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pair.one import One\n",
        "pair.three": "def late():\n    import pair.two\n",
    }
    graph = {name: imports_of(source, "pair", sources) & set(sources) for name, source in sources.items()}
    assert circle(graph) == ["pair.one", "pair.two", "pair.one"]
    assert not circle(graph | {"pair.two": set()}) and graph["pair.three"] == {"pair.two"}


@pytest.mark.parametrize("path", [path for path in EVERYTHING if path.suffix == ".py"], ids=lambda path: path.name)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: path.name)
def test_files_are_ascii(path: Path) -> None:
    path.read_bytes().decode("ascii")
