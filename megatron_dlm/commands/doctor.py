"""`megatron-dlm doctor`: what this machine has, and which path a run will take because of it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from importlib.util import find_spec
from typing import Any

from megatron_dlm.packages import installed_version

MEGATRON_SUPPORTED = ((0, 16, 1), (0, 20))
PYTHON_SUPPORTED = ((3, 11), (3, 13))

# Import name, distribution, and what it is for.
OPTIONAL = (
    ("triton", "triton", "GPU kernels"),
    ("psutil", "psutil", "memory, worker processes (required)"),
    ("sentencepiece", "sentencepiece", "SentencePiece tokenizers"),
    ("tokenizers", "tokenizers", "Hugging Face tokenizers"),
    ("transformers", "transformers", "Hugging Face models"),
    ("datasets", "datasets", "Hugging Face data sets"),
    ("pyarrow", "pyarrow", "parquet files"),
    ("lm_eval", "lm-eval", "lm-eval tasks"),
    ("tensorboard", "tensorboard", "TensorBoard events"),
    ("matplotlib", "matplotlib", "figures"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the findings; always 0."""
    findings = examine()
    if args.json:
        print(json.dumps(findings, indent=2))
        return 0
    width = max(len(name) for name in findings)
    for name, finding in findings.items():
        lines = finding if isinstance(finding, list) else [finding]
        for index, line in enumerate(lines):
            print(f"{name if index == 0 else '':<{width}}  {line}")
    return 0


def examine() -> dict[str, Any]:
    """What is there, by name; megatron-core itself is not imported."""
    import torch

    from dlm_kernels.implementation import resolve

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    engine = _version("transformer-engine") if find_spec("transformer_engine") else None
    findings: dict[str, Any] = {
        "python": _in_range(platform.python_version(), PYTHON_SUPPORTED),
        "torch": _version("torch"),
        "megatron-core": _in_range(_version("megatron-core"), MEGATRON_SUPPORTED),
        "device": [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus] or f"CPU, {_cpus()} cores",
        "memory": _memory(),
        "disk": f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free here",
        "backend": "nccl" if gpus else "gloo (megatron-core's CUDA calls are redirected to the CPU)",
        "transformer-engine": engine or "absent",
        "apex": _version("apex") if find_spec("apex") else "absent",
    }
    if gpus and engine:
        findings["layers"] = "Transformer Engine's"
    else:
        findings["layers"] = f"megatron_dlm's own ({'Transformer Engine is absent' if gpus else 'there is no GPU'})"
    if resolve("auto", torch.device("cuda" if gpus else "cpu")) == "triton":
        findings["kernels"] = f"Triton {_version('triton')}"
    else:
        findings["kernels"] = f"plain torch ({'Triton is absent' if gpus else 'there is no GPU'})"
    for module, distribution, purpose in OPTIONAL:
        found = _version(distribution) if find_spec(module) else "absent"
        findings[distribution] = f"{found} ({purpose})"
    return findings


def _version(distribution: str) -> str:
    return installed_version(distribution) or "absent"


def _in_range(found: str, supported: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    low, high = (".".join(map(str, bound)) for bound in supported)
    wanted = f">={low},<{high}"
    if found == "absent":
        return f"absent (needed: {wanted})"
    numbers = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    inside = supported[0] <= numbers < supported[1]
    return f"{found} (supported: {wanted})" if inside else f"{found} (NOT supported: {wanted})"


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    if not find_spec("psutil"):
        return "unknown (psutil is absent)"
    import psutil

    memory = psutil.virtual_memory()
    return f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
