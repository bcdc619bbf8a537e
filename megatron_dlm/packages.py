"""Packages that may be absent, and their versions."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from megatron_dlm.errors import DataError


def optional_module(name: str, purpose: str) -> ModuleType:
    """Import a package of the `hf` extra. Raises DataError, with the fix, where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DataError(f"{purpose} needs the package {package}: pip install 'megatron-dlm[hf]'") from error


def installed_version(name: str) -> str | None:
    """The version of a distribution ("megatron-core"); None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of those that are installed, by name as it is given, and Python's."""
    found = {name: number for name in names if (number := installed_version(name)) is not None}
    return {**found, "python": platform.python_version()}
