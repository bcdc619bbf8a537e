"""Denoising on a terminal: the text of one row, drawn again in place after every step."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import unicodedata
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple, TextIO

from megatron_dlm.generation.trace import CONTROL_SYMBOL, Speller, end_of_row, visible
from megatron_dlm.shipped.sampler import Step
from megatron_dlm.shipped.sampler_plan import Vocabulary

_FRAME_SECONDS = 0.05
_SHARE = 0.1  # of the time, at most, goes into drawing
_TAB = 4
# Select graphic rendition: what is shown how.
_PLAIN, _DIM, _FRESH, _FRESH_WITHOUT_COLOUR = "", "2", "1;32", "1"
_HIDE_CURSOR, _SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
# A character that the terminal takes for wider than we do is cut off, and does not move the lines below it.
_WRAP_OFF, _WRAP_ON = "\x1b[?7l", "\x1b[?7h"
_CLEAR_LINE, _CLEAR_BELOW = "\x1b[K", "\x1b[J"


class _Styled(NamedTuple):
    text: str
    style: str


class LiveView:
    """A callback of the sampler that shows one row while it is denoised; use it in a ``with`` statement.

    On a terminal, masks are dim blocks and new tokens are bright, at most 20 frames a second. A text that is longer
    than the screen is shown from its last lines. Behind the last step the drawing gives way to the plain text; after
    an error or an interrupt it goes without a trace. On anything but a terminal only the text is written, unchanged.

    Args:
        decode: text of ids; a broken character is U+FFFD, a control token is nothing.
        vocabulary: a new end-of-document ends the text.
        stream: where to write.
        row: of the batch.
        text_at_end: write the text; False leaves that to the caller, for whom the drawing just goes.
        clock: seconds, for the rate of frames.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        vocabulary: Vocabulary,
        stream: TextIO,
        *,
        row: int = 0,
        text_at_end: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._decode = decode
        self._speller = Speller(decode, vocabulary.mask_token_id)
        self._mask_token_id = vocabulary.mask_token_id
        self._end_of_document_id = vocabulary.end_of_document_id
        self._stream = stream
        self._row = row
        self._text_at_end = text_at_end
        self._clock = clock
        self._is_terminal = stream.isatty()
        self._draws = self._is_terminal and os.environ.get("TERM") != "dumb"
        self._fresh_style = _FRESH_WITHOUT_COLOUR if os.environ.get("NO_COLOR") else _FRESH
        self._mask = "\u2591" if self._can_write("\u2591") else "_"
        self._control = CONTROL_SYMBOL if self._can_write(CONTROL_SYMBOL) else "."
        self._ids: list[int] = []
        self._given: list[bool] = []
        self._fresh: list[bool] = []
        self._drawn: list[int] = []  # columns of each line of the frame that is on the screen
        self._next_frame = -float("inf")
        self._touched = False  # the terminal is not as it was
        self._closed = False

    def __enter__(self) -> LiveView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._closed = True
            self._write(self._erase())

    def __call__(self, step: Step) -> None:
        length = step.lengths[self._row]
        self._ids = step.tokens[self._row, :length].tolist()
        revealed = step.revealed[self._row, :length].tolist()
        if step.number == 0 or not self._given:
            self._given = [i != self._mask_token_id and not new for i, new in zip(self._ids, revealed, strict=True)]
            self._fresh = [False] * length
        # A frame shows what is new since the one before it, whether or not there was one for every step.
        self._fresh = [old or new for old, new in zip(self._fresh, revealed, strict=True)]
        if self._draws and not self._closed and self._clock() >= self._next_frame:
            started = self._clock()
            self._draw(step.number)
            self._fresh = [False] * length
            ended = self._clock()
            self._next_frame = ended + max(_FRAME_SECONDS, (ended - started) / _SHARE)

    def close(self) -> None:
        """Replace the drawing by the text, without what is behind its end; once, however often this is called."""
        if self._closed:
            return
        self._closed = True
        text = ""
        try:
            text = self._text() if self._text_at_end else ""
        finally:
            self._write(self._erase() + text)

    def _text(self) -> str:
        text = self._decode(self._ids[: end_of_row(self._ids, self._given, self._end_of_document_id)])
        text += "\n" if self._ids and not text.endswith("\n") else ""
        return visible(text, keep="\n\t") if self._is_terminal else text

    def _draw(self, number: int) -> None:
        width, height = self._size()
        columns = max(width - 1, 1)  # the last column is left free: terminals differ in what a full line does
        rows = max(height - 1, 1)  # so many lines never make the screen scroll once they are there
        lines = _wrap(self._parts(), columns)
        done = sum(i != self._mask_token_id for i in self._ids) - sum(self._given)
        wanted = len(self._ids) - sum(self._given)
        status = f"step {number} | {done} of {wanted} tokens"[:columns]
        frame = [*lines[max(len(lines) - rows + 1, 0) :], [_Styled(status, _DIM)]]
        output = [_HIDE_CURSOR, _WRAP_OFF, self._to_the_start()]
        for i, line in enumerate(frame):
            output += ["\r\n" if i else "", *map(_render, line), _CLEAR_LINE]
        self._touched = True
        self._write("".join([*output, _CLEAR_BELOW, _WRAP_ON]))
        self._drawn = [min(sum(_columns(part.text) for part in line), columns) for line in frame]

    def _parts(self) -> list[_Styled]:
        """The row's text with the style of each part of it."""
        parts: list[_Styled] = []
        position = 0
        for spelled in self._speller(self._ids):
            here = slice(position, position + spelled.size)
            position += spelled.size
            style = self._fresh_style if any(self._fresh[here]) else _PLAIN
            if self._ids[here.start] == self._mask_token_id:
                parts.append(_Styled(self._mask, _DIM))
            elif spelled.control:
                parts.append(_Styled(self._control, style or _DIM))
            else:
                parts.append(_Styled(visible(spelled.text, keep="\n\t"), style))
        return parts

    def _to_the_start(self) -> str:
        """Move to the first line of the frame; a terminal that has become narrower has wrapped its lines."""
        width = max(self._size().columns, 1)
        above = sum(max(-(-columns // width), 1) for columns in self._drawn) - 1
        return f"\r\x1b[{above}A" if above > 0 else "\r"

    def _size(self) -> os.terminal_size:
        """Of the stream's own terminal where the standard output is another; COLUMNS and LINES come first."""
        fallback = (80, 24)
        with contextlib.suppress(OSError, ValueError):
            fallback = os.get_terminal_size(self._stream.fileno())
        return shutil.get_terminal_size(fallback)

    def _erase(self) -> str:
        if not self._touched:
            return ""
        start, self._drawn = self._to_the_start(), []
        self._touched = False
        return f"{start}{_CLEAR_BELOW}{_WRAP_ON}{_SHOW_CURSOR}"

    def _can_write(self, text: str) -> bool:
        try:
            text.encode(self._stream.encoding or "utf-8")
        except UnicodeEncodeError:
            return False
        return True

    def _write(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()


def _wrap(parts: Sequence[_Styled], columns: int) -> list[list[_Styled]]:
    """Lines of at most so many columns."""
    lines: list[list[_Styled]] = [[]]
    column = 0
    for text, style in parts:
        for character in text:
            shown = " " * (_TAB - column % _TAB) if character == "\t" else character
            if character != "\n" and column + _columns(shown) > columns:
                lines.append([])
                column = 0
            if character == "\n":
                lines.append([])
                column = 0
                continue
            column += _columns(shown)
            line = lines[-1]
            if line and line[-1].style == style:
                line[-1] = _Styled(line[-1].text + shown, style)
            else:
                line.append(_Styled(shown, style))
    return lines


def _render(part: _Styled) -> str:
    return f"\x1b[{part.style}m{part.text}\x1b[0m" if part.style else part.text


def _columns(text: str) -> int:
    """Columns that a terminal takes for a text without control characters."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me") else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text
    )
