"""What differs between two configurations, key by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from megatron_dlm.config.load import to_dict
from megatron_dlm.config.tree import Config


class Difference(NamedTuple):
    """One key with two values, which are plain: those of YAML."""

    key: str
    """Of the tree: ``optimizer.lr``."""
    before: Any
    after: Any


def differences(before: Config, after: Config) -> list[Difference]:
    """The keys that differ, in the order of the tree; a list is one value."""
    return list(_differences(to_dict(before), to_dict(after), ""))


def _differences(before: Any, after: Any, key: str) -> Iterator[Difference]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        prefix = f"{key}." if key else ""
        for name in {**before, **after}:  # what is passed through to megatron-core may be there on one side only
            yield from _differences(before.get(name), after.get(name), f"{prefix}{name}")
    elif before != after:
        yield Difference(key, before, after)
