"""Numbers and texts for people."""

from __future__ import annotations

import json


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


def shown(text: str) -> str:
    """In quotes on one line, with escapes for what a terminal would obey."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in quoted)
