"""One table of noise levels, or two and their difference: measured, printed, and for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_dlm.errors import ConfigError
from megatron_dlm.evaluation.noise_level_table import (
    Estimate,
    NoiseLevelTable,
    check_model,
    compare,
    noise_level_table,
)
from megatron_dlm.evaluation.progress import collect, with_bar
from megatron_dlm.evaluation.text_nelbo import read_windows
from megatron_dlm.formatting import format_table
from megatron_dlm.generation.text_model import TextModel


def measure(models: Sequence[TextModel], source: str, **options: Any) -> list[NoiseLevelTable]:
    """The tables of all models, under the same masks on the same windows; there is a bar for each.

    Every rank of the models' layout must call it with the same arguments.

    Args:
        models: one or two; windows have the length of the shorter one's sequences.
        source: see ``read_windows``.
        options: those of ``noise_level_table`` but for the length.

    Raises:
        ConfigError: a model has no noise levels, the tokenizers differ, or as ``noise_level_table``; one line.
        DataError: as ``read_windows``.
    """
    for model in models:
        check_model(model)
    length = min(model.max_length for model in models)
    if len({model.tokenizer.fingerprint for model in models}) > 1:
        limit = options.get("limit_tokens")
        first, second = (
            read_windows(source, model.tokenizer, length, limit_tokens=limit).tokens.tolist() for model in models
        )
        if first != second:
            raise ConfigError("the two models have different tokenizers; compare models of one tokenizer")
    tables = []
    for model in models:
        tables += collect(with_bar(noise_level_table(model, source, length=length, **options), model.name))
    return tables


def for_json(tables: Sequence[NoiseLevelTable]) -> dict[str, Any]:
    """The table; or those of the first and the second model, and the difference."""
    if len(tables) == 1:
        return tables[0].as_dict()
    names = ("first", "second", "difference")
    return {name: table.as_dict() for name, table in zip(names, _with_difference(tables), strict=True)}


def format_tables(tables: Sequence[NoiseLevelTable]) -> str:
    """One table, or two of the same levels and their difference, aligned. Raises ConfigError as ``compare``."""
    shown = _with_difference(tables)
    several = len(shown) > 1
    losses, hits = ["nats/masked token"], ["accuracy"]
    if several:
        losses, hits = ([f"{what} {name}" for name in ("A", "B", "B - A")] for what in ("loss", "accuracy"))
    rows = [["mask ratio", "masked", *losses, *hits]]
    for levels in zip(*(table.rows for table in shown), strict=True):
        # The third table is the difference, whose signs matter.
        losses = [_format(level.cross_entropy, signed=i == 2) for i, level in enumerate(levels)]
        hits = [_format(level.accuracy, percent=True, signed=i == 2) for i, level in enumerate(levels)]
        rows.append([f"{levels[0].mask_ratio:.3f}", f"{levels[0].masked}/{tables[0].length}", *losses, *hits])
    nelbo = [_format(table.nelbo, signed=i == 2) for i, table in enumerate(shown)]
    rows.append(["average", "= NELBO", *nelbo, *[""] * len(shown)])
    *lines, average = format_table(rows, right=range(len(rows[0])))
    note = "Behind +- are standard errors, with windows as units."
    if several:
        note = f"{note}\nLosses are nats per masked token; differences are of pairs under the same masks."
    return "\n".join([*lines, "-" * max(map(len, [*lines, average])), average, "", note])


def _with_difference(tables: Sequence[NoiseLevelTable]) -> list[NoiseLevelTable]:
    return [*tables, compare(*tables)] if len(tables) == 2 else list(tables)


def _format(estimate: Estimate, *, percent: bool = False, signed: bool = False) -> str:
    scale, digits, unit = (100, 1, " %") if percent else (1, 3, "")
    error = f"{scale * estimate.standard_error:.{digits}f}"
    return f"{scale * estimate.value:{'+' if signed else ''}.{digits}f} +- {error}{unit}"
