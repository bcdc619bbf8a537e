"""One self-contained HTML page that plays how a text was denoised.

The page needs no network and no server. Its content security policy allows its own style and script, by their hashes,
and nothing else, so no generated text can become code.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_dlm.errors import DataError
from megatron_dlm.files import check_file_output, write_text
from megatron_dlm.generation.trace import CONTROL_SYMBOL, Trace, TraceRow

_SLOT = re.compile(r"@(TITLE|STYLE_HASH|SCRIPT_HASH|TRACE)@")


def render(trace: Trace) -> str:
    """The page, ASCII only; the same trace gives the same page."""
    template = resources.files("megatron_dlm.generation").joinpath("trace_page.html").read_text(encoding="ascii")
    content = {
        "title": trace.title,
        "details": trace.details,
        "control": CONTROL_SYMBOL,
        "rows": [_row(row) for row in trace.rows],
    }
    slots = {
        "TITLE": html.escape(trace.title).encode("ascii", "xmlcharrefreplace").decode(),
        "STYLE_HASH": _hash(template, "style"),
        "SCRIPT_HASH": _hash(template, "script"),
        "TRACE": _json(content),
    }
    return _SLOT.sub(lambda slot: slots[slot[1]], template)


def check_output(path: Path) -> None:
    """Find what would keep a page from being written, before there is one.

    Raises:
        DataError: another suffix than .html or .htm, or as ``check_file_output``; one line.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise DataError(f"cannot write a page to {path}; give --trace a file name that ends in .html")
    check_file_output(path, "--trace")


def write(trace: Trace, path: str | Path) -> None:
    """Write the page to ``path``: beside it first, then renamed, so that no half of a page is ever there.

    Raises DataError, with the cause, where that is not possible; then what was there before is unchanged.
    """
    path = Path(path)
    page = render(trace)
    try:
        write_text(path, page)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; choose another file") from error


def _row(row: TraceRow) -> dict[str, Any]:
    """A row for the script: cells are [text, control, [step or null, confidence, token id] of each position]."""
    cells = [
        [cell.text, int(cell.control), [[fill.step, round(fill.confidence, 4), fill.token_id] for fill in cell.fills]]
        for cell in row.cells
    ]
    return {"forwards": row.forwards, "end": row.end, "cells": cells}


def _json(content: Any) -> str:
    """JSON that is ASCII and cannot end the element it stands in."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(template: str, element: str) -> str:
    """Source expression of the policy for the one inline ``element`` without attributes."""
    (inner,) = re.findall(f"<{element}>(.*?)</{element}>", template, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
