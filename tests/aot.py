"""Compile Triton kernels for sm_90 without a GPU, and read registers, spills, shared memory and instructions.

`recorded_launches` takes the launches from the host code itself, so that what is checked is what would run:

    with recorded_launches() as launches:
        some_host_function(cpu_tensors)  # nothing is executed: its results are garbage
    for launch in launches:
        used = resources(launch.compile())
        assert used.spills == 0 and used.fits()

Needs a process without TRITON_INTERPRET, which replaces every kernel when it is defined.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

REGISTERS_PER_SM = 65536
SHARED_BYTES_PER_BLOCK = 227 * 1024

_ARCH = 90
_GPU_NAME = "sm_90a"  # what Triton compiles for on Hopper


@dataclass(frozen=True)
class Resources:
    """What one program (thread block) of a compiled kernel occupies.

    Attributes:
        registers: per thread.
        spill_stores, spill_loads: bytes per thread.
        stack: bytes per thread.
        shared: bytes, static and dynamic.
        threads: per program.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    threads: int

    @property
    def spills(self) -> int:
        """Bytes per thread that go through local memory because registers ran out."""
        return self.spill_stores + self.spill_loads

    def fits(self, blocks_per_sm: int = 1) -> bool:
        """Whether the registers and the shared memory of an H100 or H200 SM hold that many programs."""
        # Registers are handed out per warp, in units of 256.
        per_warp = -(-self.registers * 32 // 256) * 256
        registers = per_warp * self.threads // 32 * blocks_per_sm
        return registers <= REGISTERS_PER_SM and self.shared * blocks_per_sm <= SHARED_BYTES_PER_BLOCK


@dataclass(frozen=True)
class Launch:
    """One recorded launch. `args` and `kwargs` are the kernel's arguments and the compile options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def key(self) -> str:
        """Launches with the same key share one compiled kernel: what Triton specialises on, and the options."""
        _, specialization, options = self._bind()
        return f"{self.name} {specialization} {sorted(options.items())}"

    def compile(self) -> Any:
        """The kernel compiled with the types, alignments, constants and options of this launch."""
        from triton import compile as triton_compile
        from triton.compiler import ASTSource

        bound, specialization, options = self._bind()
        parsed, signature, constants, attributes = self.kernel._pack_args(
            _backend(), dict(options), bound, specialization, options
        )
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        return triton_compile(source, target=_target(), options=parsed.__dict__)

    def _bind(self) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
        from triton.runtime.jit import create_function_from_signature

        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, _backend())
        return binder(*self.args, **self.kwargs)


def skip_unless_available() -> None:
    """Skip the calling test if kernels cannot be compiled and taken apart here."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 replaces the kernels by interpreted ones")
    missing = [tool for tool in ("ptxas", "cuobjdump", "nvdisasm") if not _tool(tool).exists()]
    if missing:
        pytest.skip(f"this build of Triton does not bundle {' and '.join(missing)}")


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Within the block kernels are not executed; their launches are appended to the list."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        if callable(grid):
            grid = grid(dict(zip(self.arg_names, args, strict=False)) | kwargs)
        launches.append(Launch(self, tuple(grid), args, kwargs))

    original = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = original


def compile_sm90(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], aligned: Sequence[str] = (), **options: Any
) -> Any:
    """Compile a kernel from types instead of arguments.

    Args:
        kernel: a `triton.jit` function.
        types: Triton type of each run-time argument, such as "*bf16", "i32" or "i64".
        constants: value of each `tl.constexpr` argument.
        aligned: the pointers and integers that are divisible by 16.
        options: num_warps, num_stages and so on.
    """
    from triton import compile as triton_compile
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton_compile(source, target=_target(), options=options)


def resources(compiled: Any) -> Resources:
    """What a compiled kernel occupies, as ptxas reports it: the metadata of Triton knows no spills without a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(compiled.asm["ptx"])
        command = [_tool("ptxas"), "-v", f"--gpu-name={_GPU_NAME}", source, "-o", Path(folder, "kernel.cubin")]
        result = subprocess.run(command, capture_output=True, text=True, check=True)

    def number(pattern: str) -> int:
        match = re.search(pattern, result.stderr)
        return int(match.group(1)) if match else 0

    return Resources(
        registers=number(r"Used (\d+) registers"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        stack=number(r"(\d+) bytes stack frame"),
        shared=max(compiled.metadata.shared, number(r"(\d+) bytes smem")),
        threads=32 * compiled.metadata.num_warps,
    )


def sass(compiled: Any) -> str:
    """The machine code of a compiled kernel, disassembled."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        command = [_tool("cuobjdump"), "--dump-sass", binary]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def count_instructions(code: str, *names: str) -> dict[str, int]:
    """How often each instruction occurs in the SASS: "LDG.E.128" also counts LDG.E.128.CONSTANT, "LDG" every load."""
    found = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE)
    return {name: sum(item == name or item.startswith(name + ".") for item in found) for name in names}


def _tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _target() -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", _ARCH, 32)


def _backend() -> Any:
    from triton.compiler import make_backend

    return make_backend(_target())
