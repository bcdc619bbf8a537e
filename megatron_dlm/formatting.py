"""Numbers and texts for people."""

from __future__ import annotations

import json
from collections.abc import Sequence

_SI = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def format_duration(seconds: float) -> str:
    """``5h12m``, ``3m07s`` or ``42s``."""
    whole = int(round(seconds))
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def format_count(value: float) -> str:
    """Three digits with a unit: 950, 61.2k, 1.07M, 8.19B."""
    for bound, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= bound:
            return f"{value / bound:#.3g}".rstrip(".") + unit
    return f"{value:.3g}"


def format_flops(value: float) -> str:
    """Three digits with a unit of SI, as FLOPs have them: 34.8G, 557G, 49.2P; E stands for 10**18."""
    power = 0
    while value >= 999.5 and power < len(_SI) - 1:
        value, power = value / 1000, power + 1
    return f"{value:#.3g}".rstrip(".") + _SI[power]


def format_ratio(value: float) -> str:
    """``16.0x``, ``0.87x``, ``4,708x``."""
    if value >= 999.5:
        return f"{value:,.0f}x"
    return f"{value:.1f}x" if value >= 9.95 else f"{value:.2f}x"


def shown(text: str) -> str:
    """In quotes on one line, with escapes for what a terminal would obey."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in quoted)


def format_table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), gap: str = "  ") -> list[str]:
    """Lines with aligned columns; ``right`` has the numbers of those that end flush, the others begin so."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        gap.join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, aligned for readers of its source; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
