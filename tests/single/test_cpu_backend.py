"""Other libraries work beside the CPU backend."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import megatron_dlm.parallel, torch
with torch.device("meta"):
    made = [torch.arange(3), torch.empty(3), torch.ones(2), torch.empty(3, device="cpu")]
assert [tensor.device.type for tensor in made] == ["meta", "meta", "meta", "cpu"], made
assert torch.empty(3, device="cuda").device.type == "cpu"
import warnings
for what in ("sequence parallelism", "async grad allreduce"):
    warnings.warn(f"When using {what} it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS")
"""


def test_device_contexts_still_have_their_effect() -> None:
    """In a process of its own: nothing may have used one before the backend is installed."""
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "recommended" not in result.stderr, "it is about GPUs"
