"""Runs unforked megatron-core on the CPU with gloo.

megatron-core hard-codes CUDA: ``device="cuda"`` in the schedules, ``torch.cuda.current_device()`` in
every constructor, streams in the data-parallel wrapper, type names such as ``torch.cuda.FloatTensor``
in the optimizers. Where there is no GPU, ``install_without_gpu`` replaces those calls by their CPU
meaning. With a GPU it does nothing at all.

The replacements are plain functions, not a ``TorchFunctionMode``: torch switches such a mode off inside
``backward()``, so recomputed layers would escape it. "GPU" randomness has a generator of its own, so
megatron's RNG tracker sees a device stream beside the host stream, as on a real GPU.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._device import _device_constructors

# Tensor constructors to which megatron-core passes device="cuda" or torch.cuda.current_device().
_FACTORIES = (
    "arange as_tensor empty empty_like eye full full_like linspace ones ones_like rand randint randn tensor "
    "zeros zeros_like"
).split()


class _Stream:
    """Stands in for a CUDA stream: every method does nothing, since the CPU runs in order.

    A class and not a function, because libraries name ``torch.cuda.Stream`` in type annotations.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class _Event(_Stream):
    """Stands in for a CUDA event."""


def is_installed() -> bool:
    """Whether megatron-core runs on the CPU backend in this process."""
    return hasattr(torch.cuda, "megatron_dlm_generator")


def install_without_gpu() -> bool:
    """Install the CPU backend unless this machine has a GPU; safe to call again.

    Returns whether the backend is active. Raises ``RuntimeError`` where megatron-core was imported
    first, because it would keep the CUDA functions that it has already bound.
    """
    if is_installed():
        return True
    if torch.cuda.is_available():
        return False
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before megatron_dlm.parallel; import megatron_dlm.parallel first"
        )
    # They can be imported without a GPU, and megatron would then take their fused Adam and fail.
    sys.modules["transformer_engine"] = sys.modules["apex"] = None  # type: ignore[assignment]
    # It would say that there is no CUDA runtime, on a machine with a CUDA toolkit.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    generator = torch.Generator()
    _replace_cuda_namespace(generator)
    # megatron binds these when it is imported, and they call the C extension directly.
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = torch.cuda.get_rng_state
    megatron_random._set_cuda_rng_state = torch.cuda.set_rng_state
    _replace_tensor_functions(generator)
    return True


def _replace_cuda_namespace(generator: torch.Generator) -> None:
    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    replacements = {
        "current_device": lambda: torch.device("cpu"),
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda *args, **kwargs: _Stream(),
        "default_stream": lambda *args, **kwargs: _Stream(),
        "manual_seed": lambda seed: generator.manual_seed(int(seed)),
        "get_rng_state": lambda *args, **kwargs: generator.get_state(),
        "set_rng_state": lambda state, *args, **kwargs: generator.set_state(state),
        # torch.compile wants a distinct object behind every torch.cuda name.
        "synchronize": lambda *args, **kwargs: None,
        "set_device": lambda *args, **kwargs: None,
        "empty_cache": lambda: None,
    }
    for name, function in replacements.items():
        setattr(torch.cuda, name, function)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = nothing
    torch.cuda.megatron_dlm_generator = generator  # type: ignore[attr-defined]


def _replace_tensor_functions(generator: torch.Generator) -> None:
    # `with torch.device(...)` looks functions up in a set that is made when it is first asked for: while the
    # constructors have their names. transformers builds models on the meta device that way.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.to = _on_cpu(torch.Tensor.to)  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    type_of = torch.Tensor.type

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The optimizers compare this string with "torch.cuda.FloatTensor" and the like."""
        if args or kwargs:
            return type_of(self, *args, **kwargs)
        return "torch.cuda." + type_of(self).rsplit(".", 1)[1]

    torch.Tensor.type = cuda_type  # type: ignore[assignment, method-assign]

    def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        """``F.dropout`` that draws from the device stream."""
        if not training or p == 0.0:
            return input
        keep = torch.empty_like(input, dtype=torch.float32, memory_format=torch.contiguous_format)
        keep.bernoulli_(1.0 - p, generator=generator)
        return input * (keep / (1.0 - p)).to(input.dtype)

    F.dropout = dropout


def _on_cpu(function: Any) -> Any:
    """Wrap a torch function so that ``device="cuda..."`` means the CPU."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        return function(*args, **kwargs)

    return wrapped
