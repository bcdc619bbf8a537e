"""The public functions: each has a plain-torch twin and a Triton implementation, with the same arguments."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dlm_kernels import reference
from dlm_kernels.types import Masking

Implementation = Literal["auto", "triton", "torch"]
Arguments = dict[str, Any]


@functools.cache
def triton_is_installed() -> bool:
    """Asked in every step, so the search for the package is made once."""
    return importlib.util.find_spec("triton") is not None


def resolve(impl: Implementation, device: torch.device) -> Literal["triton", "torch"]:
    """What ``impl`` means for tensors on ``device``: auto takes Triton on a GPU where it is installed.

    Raises:
        ValueError: unknown, or Triton is asked for where it cannot run.
    """
    if impl not in get_args(Implementation):
        raise ValueError(f"impl is {impl!r}; choose auto, triton or torch")
    installed = triton_is_installed()
    gpu = device.type == "cuda"
    if impl == "triton":
        if not installed:
            raise ValueError("impl='triton' needs the package triton: install it, or choose auto or torch")
        if not gpu and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("impl='triton' needs a GPU (or TRITON_INTERPRET=1, to test); choose auto or torch")
        return "triton"
    return "triton" if impl == "auto" and gpu and installed else "torch"


def _public(twin: Callable[..., Any], module: str, check: Callable[[Arguments], None]) -> Callable[..., Any]:
    """``twin`` with the further argument ``impl``, which selects the function of that name in ``module`` instead.

    The Triton module is imported at its first use, so that Triton is optional. ``check`` raises for arguments with
    which a kernel would read beyond its inputs.
    """
    name, signature = twin.__name__, inspect.signature(twin)

    @functools.wraps(twin)
    def function(*args: Any, impl: Implementation = "auto", **kwargs: Any) -> Any:
        # By name, so that a check sees what was given by position too.
        arguments = signature.bind(*args, **kwargs).arguments
        check(arguments)
        device = next(iter(arguments.values())).device
        chosen = twin if resolve(impl, device) == "torch" else getattr(importlib.import_module(module), name)
        with _on(device):
            return chosen(*args, **kwargs)

    impl = inspect.Parameter(
        "impl", inspect.Parameter.KEYWORD_ONLY, default="auto", annotation='Literal["auto", "triton", "torch"]'
    )
    function.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), impl]
    )
    return function


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Launch on the tensors' device, whichever is current, and without autocast: the precision is in the arguments."""
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def _require_shape(function: str, arguments: Arguments, shape: tuple[int, ...], *names: str) -> None:
    for name in names:
        value = arguments.get(name)
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{function}: {name} has the shape {tuple(value.shape)} and must have {shape}")


def _check_mask_tokens(arguments: Arguments) -> None:
    batch = arguments["tokens"].shape[0]
    _require_shape("mask_tokens", arguments, (batch,), "sample_ids", "levels", "weights", "complement")
    _require_shape("mask_tokens", arguments, tuple(arguments["tokens"].shape), "eligible")
    masking = arguments.get("masking", "exact_count")
    if masking not in get_args(Masking):
        raise ValueError(f"mask_tokens: masking is {masking!r}; choose {' or '.join(get_args(Masking))}")
    for name in ("tokens", "levels"):
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.dtype != torch.int64:
            raise ValueError(f"mask_tokens: {name} are {value.dtype}; convert them to torch.int64")


def _check_cross_entropy(arguments: Arguments) -> None:
    _require_shape("cross_entropy", arguments, (arguments["logits"].shape[0],), "targets", "weights")


def _check_linear_cross_entropy(arguments: Arguments) -> None:
    hidden, weight, chunk_size = arguments["hidden"], arguments["weight"], arguments.get("chunk_size", 1)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"linear_cross_entropy: hidden is {hidden.dtype} and weight {weight.dtype}; pass weight.to(hidden.dtype)"
        )
    if chunk_size < 1:
        raise ValueError(f"linear_cross_entropy: chunk_size is {chunk_size}; it must be at least 1")


mask_tokens = _public(reference.mask_tokens, "dlm_kernels.triton_mask_tokens", _check_mask_tokens)
cross_entropy = _public(reference.cross_entropy, "dlm_kernels.triton_cross_entropy", _check_cross_entropy)
linear_cross_entropy = _public(
    reference.linear_cross_entropy, "dlm_kernels.triton_linear_cross_entropy", _check_linear_cross_entropy
)
