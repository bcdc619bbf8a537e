"""How a text came out of a denoiser: each token with the step that filled it in and the confidence it had.

`Recorder` collects what the sampler reports; `trace_page` shows it. `Speller` tells which tokens make which characters.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TextIO

import torch

from megatron_dlm.shipped.sampler import Step
from megatron_dlm.shipped.sampler_plan import Vocabulary

CONTROL_SYMBOL = "\u25ca"
"""Shown for a token that has no text, such as end-of-document."""

_REPLACEMENT = "\ufffd"
_UTF8_BYTES = 4  # of one character at most
_UNDECIDED = -1
# Of Unicode: controls, format characters (they turn the direction of a line or have no width), lone surrogates, and
# separators that are line breaks to some.
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


class Spelled(NamedTuple):
    """The text of one token, or of the few that spell a character together."""

    text: str
    """Empty for a control token and for [MASK]."""
    size: int
    """Tokens."""
    control: bool
    """A token that has no text in any context; [MASK] is none of them."""


class Fill(NamedTuple):
    """How one position got its token."""

    token_id: int
    step: int | None
    """0: given in the prompt; None: still [MASK]."""
    confidence: float
    """Probability of the token when it was filled in, from 0 to 1; 0 where the model did not fill it in."""


@dataclass(frozen=True)
class Cell:
    """What is shown as one: a position, or the neighbours whose bytes make one character."""

    text: str
    """Without characters that cannot be shown; empty for a control token and for [MASK]."""
    control: bool
    fills: tuple[Fill, ...]


@dataclass(frozen=True)
class TraceRow:
    """One sequence."""

    cells: tuple[Cell, ...]
    forwards: int
    """The last step that filled in something here."""
    end: int
    """Cells that count; those behind it are behind the end of the document."""


@dataclass(frozen=True)
class Trace:
    """What a page shows."""

    title: str
    details: dict[str, str]
    """Options used, by name."""
    rows: tuple[TraceRow, ...]


class Recorder:
    """A callback of the sampler that remembers when each position was filled in.

    One recorder can be given to several batches one after the other; their rows come in that order. A position that
    is filled in more than once counts with its last token.

    Args:
        decode: text of ids; a broken character is U+FFFD, a control token is nothing.
        vocabulary: a new end-of-document ends a row.
    """

    def __init__(self, decode: Callable[[list[int]], str], vocabulary: Vocabulary) -> None:
        self._speller = Speller(decode, vocabulary.mask_token_id)
        self._mask_token_id = vocabulary.mask_token_id
        self._end_of_document_id = vocabulary.end_of_document_id
        self._batches: list[_Batch] = []

    def __call__(self, step: Step) -> None:
        if step.number == 0 or not self._batches:
            self._batches.append(_Batch(step, self._mask_token_id))
        self._batches[-1].update(step, self._mask_token_id)

    def trace(self, title: str, details: dict[str, str]) -> Trace:
        """What was recorded so far, under a title and with the options to name, all as plain text."""
        rows = tuple(self._row(batch, row) for batch in self._batches for row in range(len(batch.lengths)))
        # What came from outside must not act on a page or a terminal.
        shown = {visible(name): visible(value) for name, value in details.items()}
        return Trace(visible(title), shown, rows)

    def _row(self, batch: _Batch, row: int) -> TraceRow:
        length = batch.lengths[row]
        ids = batch.tokens[row, :length].tolist()
        steps = [None if step == _UNDECIDED else step for step in batch.steps[row, :length].tolist()]
        fills = list(map(Fill, ids, steps, batch.confidence[row, :length].tolist()))
        stop = end_of_row(ids, [step == 0 for step in steps], self._end_of_document_id)
        cells: list[Cell] = []
        end = position = 0
        for spelled in self._speller(ids):
            # Cells before the end count; one that begins before it counts as a whole.
            end += position < stop
            part = tuple(fills[position : position + spelled.size])
            cells.append(Cell(visible(spelled.text), spelled.control, part))
            position += spelled.size
        return TraceRow(tuple(cells), max((step or 0 for step in steps), default=0), end)


class _Batch:
    """State of one batch: tokens [batch, seq], the steps that filled them in, and their confidence."""

    def __init__(self, step: Step, mask_token_id: int) -> None:
        # Without a report of the start, what is there and not new was given.
        given = (step.tokens != mask_token_id) & ~step.revealed
        self.steps = torch.where(given, 0, _UNDECIDED)
        self.confidence = torch.zeros(step.tokens.shape)

    def update(self, step: Step, mask_token_id: int) -> None:
        self.lengths = list(step.lengths)
        self.tokens = step.tokens.clone()  # the sampler may go on with its tensors in place
        confidence = step.confidence.float().nan_to_num(0.0).clamp(0.0, 1.0)
        self.steps = torch.where(step.revealed, step.number, self.steps)
        self.confidence = torch.where(step.revealed, confidence, self.confidence)
        # A position may be masked again; it is then undecided, as before.
        masked = step.tokens == mask_token_id
        self.steps = self.steps.masked_fill(masked, _UNDECIDED)
        self.confidence = self.confidence.masked_fill(masked, 0.0)


class Speller:
    """Splits ids into the shortest runs that have a text of their own.

    Args:
        decode: text of ids; a broken character is U+FFFD, a control token is nothing.
        mask_token_id: id of [MASK].
    """

    def __init__(self, decode: Callable[[list[int]], str], mask_token_id: int) -> None:
        # The same few runs come again at every step.
        self._decode = functools.lru_cache(maxsize=1 << 16)(lambda ids: decode(list(ids)))
        self._mask_token_id = mask_token_id

    def __call__(self, ids: Sequence[int]) -> list[Spelled]:
        """The runs, in order, every id in one of them. Bytes that make no character are runs of one U+FFFD each."""
        found: list[Spelled] = []
        context: tuple[int, ...] = ()
        position = 0
        while position < len(ids):
            # Few tokens make one character of up to four bytes: as many are looked at.
            spelled = self._next(context, ids[position : position + _UTF8_BYTES])
            if spelled.text and _REPLACEMENT not in spelled.text:
                context = tuple(ids[position : position + spelled.size])
            found.append(spelled)
            position += spelled.size
        return found

    def _next(self, context: tuple[int, ...], ids: Sequence[int]) -> Spelled:
        if self._is_control(ids[0]):
            return Spelled("", 1, control=ids[0] != self._mask_token_id)
        # The shortest run that is whole text; bytes of a character one by one are not.
        for count in range(1, len(ids) + 1):
            if count > 1 and self._is_control(ids[count - 1]):
                break
            text = self._text(context, tuple(ids[:count]))
            if _REPLACEMENT not in text:
                return Spelled(text, count, control=False)
        return Spelled(self._text(context, tuple(ids[:1])), 1, control=False)

    def _is_control(self, token_id: int) -> bool:
        # Twice, as some tokenizers drop the space that is in front of a text.
        return token_id == self._mask_token_id or self._decode((token_id, token_id)) == ""

    def _text(self, context: tuple[int, ...], ids: tuple[int, ...]) -> str:
        """Text of ids as it is behind the last whole text: alone, a word can lose the space in front of it."""
        before, both = self._decode(context), self._decode(context + ids)
        return both[len(before) :] if both.startswith(before) else self._decode(ids)


def end_of_row(ids: Sequence[int], given: Sequence[bool], end_of_document_id: int | None) -> int:
    """Length of a row up to and with its first end-of-document that was not given; its whole length without one.

    What the sampler leaves behind that one, masks or tokens, is not part of the text.
    """
    for position, (token_id, was_given) in enumerate(zip(ids, given, strict=True)):
        if token_id == end_of_document_id and not was_given:
            return position + 1
    return len(ids)


def visible(text: str, keep: str = "\n\t\u200c\u200d") -> str:
    """The text with symbols for characters that cannot be seen or that would act on a display.

    Args:
        keep: characters to leave alone; zero-width joiners are part of ordinary words and emoji.
    """
    return "".join(c if c in keep or unicodedata.category(c) not in _INVISIBLE else _symbol(c) for c in text)


def printable(text: str, stream: TextIO) -> str:
    """The text as ``stream`` can have it: escapes for what its encoding has not, and nothing that a terminal obeys.

    A file or pipe gets control characters as they are.
    """
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = visible(text, keep="\n\t") if stream.isatty() else text
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _symbol(character: str) -> str:
    """The control picture of an ASCII control character, U+FFFD for others."""
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else _REPLACEMENT
