"""Denoising on a terminal: the text of one row, drawn again in place after every step."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import accumulate
from types import TracebackType
from typing import TextIO

from rich.cells import chop_cells
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from megatron_dlm.generation.trace import CONTROL_SYMBOL, Speller, end_of_row, printable, visible
from megatron_dlm.shipped.sampler import Step
from megatron_dlm.shipped.sampler_plan import Vocabulary

_FRAME_SECONDS = 0.05
_SHARE = 0.1  # of the time, at most, goes into drawing
_TAB = 4
_MASK = "\u2591"
# What is shown how; the colour goes where NO_COLOR is set.
_PLAIN, _DIM, _FRESH = "", "dim", "bold green"


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
        self._vocabulary = vocabulary
        self._stream = stream
        self._row = row
        self._text_at_end = text_at_end
        self._clock = clock
        # What the environment says of the terminal's abilities counts, but the stream alone says whether there is one.
        console = Console(file=stream, force_terminal=True, force_interactive=True, force_jupyter=False)
        self._draws = stream.isatty() and not console.is_dumb_terminal
        # Frames come with the steps and not from a thread; nothing else is printed while the model works.
        self._live = Live(
            console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._mask = _MASK if self._writable(_MASK) == _MASK else "_"
        self._control = CONTROL_SYMBOL if self._writable(CONTROL_SYMBOL) == CONTROL_SYMBOL else "."
        self._ids: list[int] = []
        self._given: list[bool] = []
        self._fresh: list[bool] = []
        self._next_frame = -float("inf")
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
            self._live.stop()

    def __call__(self, step: Step) -> None:
        length = step.lengths[self._row]
        self._ids = step.tokens[self._row, :length].tolist()
        revealed = step.revealed[self._row, :length].tolist()
        if step.number == 0 or not self._given:
            mask = self._vocabulary.mask_token_id
            self._given = [i != mask and not new for i, new in zip(self._ids, revealed, strict=True)]
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
            self._live.stop()
            self._stream.write(printable(text, self._stream))
            self._stream.flush()

    def _text(self) -> str:
        text = self._decode(self._ids[: end_of_row(self._ids, self._given, self._vocabulary.end_of_document_id)])
        return text + ("\n" if self._ids and not text.endswith("\n") else "")

    def _draw(self, number: int) -> None:
        # Prompts do not count, on either side.
        written = sum(i != self._vocabulary.mask_token_id for i in self._ids) - sum(self._given)
        wanted = len(self._ids) - sum(self._given)
        frame = _Frame(self._styled(), Text(f"step {number} | {written} of {wanted} tokens", _DIM))
        self._live.start()  # once; the cursor hides
        self._live.update(frame, refresh=True)

    def _styled(self) -> Text:
        """The row's text with the style of each part of it."""
        text = Text()
        position = 0
        for spelled in self._speller(self._ids):
            here = slice(position, position + spelled.size)
            position += spelled.size
            style = _FRESH if any(self._fresh[here]) else _PLAIN
            if self._ids[here.start] == self._vocabulary.mask_token_id:
                text.append(self._mask, _DIM)
            elif spelled.control:
                text.append(self._control, style or _DIM)
            else:
                # rich would let escape sequences through, so that a text could command the terminal.
                text.append(self._writable(visible(spelled.text, keep="\n\t")), style)
        return text

    def _writable(self, text: str) -> str:
        """The text with question marks for what the stream's encoding has not."""
        encoding = self._stream.encoding or "utf-8"
        return text.encode(encoding, "replace").decode(encoding)


class _Frame:
    """The last lines of a text and one of status below; together one less than the screen has, so it never scrolls."""

    def __init__(self, text: Text, status: Text) -> None:
        self.text, self.status = text, status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.size
        # As many lines as fit above the cursor's: the newest of the text, and the status last.
        lines = [*_wrapped(self.text, width), self.status]
        for line in lines[max(len(lines) - height + 1, 0) :]:
            line.truncate(width)
            yield line


def _wrapped(text: Text, width: int) -> list[Text]:
    """Lines of at most so many columns, broken anywhere: at words, they would jump while masks become words."""
    lines: list[Text] = []
    for line in text.split("\n", allow_blank=True):
        line.expand_tabs(_TAB)
        # By columns of the screen: some characters take two.
        ends = list(accumulate(map(len, chop_cells(line.plain, width))))
        lines += line.divide(ends[:-1])
    return lines
