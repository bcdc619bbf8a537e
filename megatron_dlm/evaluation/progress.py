"""Long computations as generators: whoever asks loops over what is finished, keeps it, and shows how much that is."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, NamedTuple, TypeVar

from tqdm import tqdm

from megatron_dlm.launch.place import is_first_rank

T = TypeVar("T")


class Finished(NamedTuple, Generic[T]):
    """What a computation has found since it last said something."""

    results: Mapping[int, T]
    """By the number of what was asked, each once over all; often none, where only the share has grown."""
    share: float
    """Of the whole work, so far."""


def collect(parts: Iterable[Finished[T]]) -> list[T]:
    """All results, in the order of their numbers, which must be 0, 1, 2 and so on."""
    found: dict[int, T] = {}
    for part in parts:
        found |= part.results
    return [found[number] for number in range(len(found))]


def with_bar(parts: Iterable[Finished[T]], name: str, *, hidden: bool = False) -> Iterator[Finished[T]]:
    """The same parts, and while they pass a bar with the time that is left: on rank 0, on a terminal."""
    hidden = hidden or not is_first_rank() or not sys.stderr.isatty()
    form = "{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    with tqdm(total=1.0, desc=name, bar_format=form, disable=hidden, leave=False, dynamic_ncols=True) as bar:
        for part in parts:
            bar.update(part.share - bar.n)
            yield part
