"""Packages that may be absent."""

from __future__ import annotations

import importlib
from types import ModuleType

from megatron_dlm.errors import DataError


def optional_module(name: str, purpose: str) -> ModuleType:
    """Import a package of the `hf` extra. Raises DataError, with the fix, where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DataError(f"{purpose} needs the package {package}: pip install 'megatron-dlm[hf]'") from error
