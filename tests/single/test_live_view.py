"""The live view on a pseudo-terminal: in place, within the screen, clean behind itself."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pyte
import pytest
import torch

from megatron_dlm.data.tokenizer import ByteTokenizer
from megatron_dlm.generation.live_view import LiveView
from megatron_dlm.shipped.sampler import Step
from megatron_dlm.shipped.sampler_plan import Vocabulary

TOKENIZER = ByteTokenizer()
MASK, END = TOKENIZER.mask_token_id, TOKENIZER.end_of_document_id
IDS = Vocabulary(MASK)
BLOCK = "\u2591"
# Up, erase a line, the cursor, colours: all that the view may tell a terminal.
COMMANDS = re.compile(r"\x1b\[(\d*A|2K|\?25[lh]|[\d;]*m)|\r\n?")


class Terminal:
    """A real one for the view, whose output is read here and shown on a screen."""

    def __init__(self, width: int = 20, height: int = 6, encoding: str = "utf-8") -> None:
        self._master, slave = pty.openpty()
        os.set_blocking(self._master, False)
        self.stream = open(slave, "w", encoding=encoding)
        self.screen = pyte.HistoryScreen(width, height, history=100)
        self.encoding = encoding
        self.raw = ""
        self.stream.write("$\n")

    def read(self) -> str:
        """What has been written since the last look."""
        self.stream.flush()
        found = b""
        while True:
            try:
                found += os.read(self._master, 1 << 16)
            except BlockingIOError:
                break
        text = found.decode(self.encoding)
        rest = COMMANDS.sub("", text)
        assert all(c.isprintable() or c == "\t" for c in rest), f"{rest!r} reaches the terminal"
        pyte.Stream(self.screen).feed(text)
        self.raw += text
        return text

    @property
    def text(self) -> list[str]:
        """The lines of the screen."""
        self.read()
        return [line.rstrip() for line in self.screen.display]

    @property
    def everything(self) -> list[str]:
        """What was scrolled out and what is there, without the empty lines at the end."""
        lines = self.text
        out = ["".join(line[i].data for i in range(self.screen.columns)).rstrip() for line in self.screen.history.top]
        return "\n".join(out + lines).rstrip().split("\n")

    def style(self, row: int, column: int) -> tuple[str, bool]:
        """Colour, and whether it is bold."""
        character = self.screen.buffer[row][column]
        return character.fg, character.bold

    def is_clean(self) -> bool:
        self.read()
        shown = self.raw.rfind("\x1b[?25h") >= self.raw.rfind("\x1b[?25l")
        return shown and self.screen.cursor.attrs.fg == "default" and not self.screen.cursor.attrs.bold

    def close(self) -> None:
        self.stream.close()
        os.close(self._master)


class Clock:
    """Seconds that pass as told: at each look."""

    now, pace = 0.0, 0.0

    def __call__(self) -> float:
        self.now += self.pace
        return self.now


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes terminals of a size."""
    for name in ("NO_COLOR", "COLORTERM", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    made = []

    def terminal(width: int = 20, height: int = 6, **options: Any) -> Terminal:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("LINES", str(height))
        made.append(Terminal(width, height, **options))
        return made[-1]

    yield terminal
    for one in made:
        one.close()


@pytest.fixture
def terminal(make: Any) -> Terminal:
    return make()


class SlowView(LiveView):
    """Of a sampler that takes a second for every step."""

    def __call__(self, step: Step) -> None:
        self._clock.now += 1.0
        super().__call__(step)


def view(stream: Any, vocabulary: Vocabulary = IDS, **options: Any) -> LiveView:
    return SlowView(TOKENIZER.decode, vocabulary, stream, clock=Clock(), **options)


def step(number: int, text: str | list[int], filled: tuple[int, ...] = ()) -> Step:
    """A step of one row; "_" in the text stands for a mask."""
    ids = text if isinstance(text, list) else [MASK if byte == ord("_") else byte for byte in text.encode()]
    revealed = torch.zeros(1, len(ids), dtype=torch.bool)
    revealed[0, list(filled)] = True
    return Step(number, torch.tensor([ids]), [len(ids)], revealed, revealed.float())


def test_frames_replace_each_other_and_then_give_way_to_the_text(terminal: Terminal) -> None:
    with view(terminal.stream) as live:
        live(step(0, "def f(_):\n    ___"))
        assert terminal.text[:4] == ["$", f"def f({BLOCK}):", f"    {BLOCK * 3}", "step 0 | 0 of 4 toke"]
        live(step(1, "def f(x):\n    _a_", (6, 15)))
        assert terminal.text[:4] == ["$", "def f(x):", f"    {BLOCK}a{BLOCK}", "step 1 | 2 of 4 toke"]
        assert terminal.style(1, 6) == terminal.style(2, 5) == ("green", True)
        assert terminal.style(2, 4) == terminal.style(1, 0) == ("default", False)
        assert f"\x1b[2m{BLOCK}" in terminal.raw, "masks are dim"
        assert not terminal.is_clean(), "the cursor hides"
        live(step(2, "def f(x):\n    bac", (14, 16)))
        terminal.read()
        assert terminal.style(1, 6) == ("default", False), "what was new is new no more"
    assert terminal.everything == ["$", "def f(x):", "    bac"]
    assert terminal.is_clean() and (terminal.screen.cursor.y, terminal.screen.cursor.x) == (3, 0)


def test_long_lines_are_broken_and_long_texts_show_their_end(terminal: Terminal) -> None:
    text = "".join(f"{i:03}," for i in range(60))
    with view(terminal.stream) as live:
        for number in range(3):
            live(step(number, text[:-6] + "_" * 6))
            lines = [text[at : at + 20] for at in range(0, len(text), 20)]
            lines[-1] = lines[-1][:-6] + BLOCK * 6
            assert terminal.text[:5] == ["$", *lines[-4:]] and terminal.text[5].startswith(f"step {number}")
        assert not terminal.screen.history.top, "frames stay where they are"
    assert "".join(terminal.everything[1:]) == text[:-6], "the text itself may scroll"


def test_wide_characters_and_tabs_are_counted(terminal: Terminal) -> None:
    with view(terminal.stream) as live:
        live(step(0, "a" + "\u4e16" * 12 + "\n\tb\tc"))
        assert terminal.text[1:4] == ["a" + "\u4e16" * 9, "\u4e16" * 3, "    b   c"]


@pytest.mark.parametrize(("width", "height"), [(20, 1), (20, 2), (2, 6), (1, 3)])
def test_tiny_windows(make: Any, width: int, height: int) -> None:
    tiny = make(width, height)
    with view(tiny.stream, text_at_end=False) as live:
        for number in range(3):
            live(step(number, "hello\nworld_\u4e16", (0,)))
    assert tiny.is_clean() and tiny.everything == ["$"]


def test_what_is_printed_behind_the_text_stays(terminal: Terminal) -> None:
    with pytest.raises(ValueError), view(terminal.stream) as live:
        live(step(0, "ab_"))
        live.close()
        terminal.stream.write("more")
        raise ValueError
    assert terminal.everything == ["$", "ab", "more"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_or_an_interrupt_leaves_nothing(terminal: Terminal, error: type[BaseException]) -> None:
    with pytest.raises(error), view(terminal.stream) as live:
        live(step(0, "one\ntwo___"))
        live(step(1, "one\ntwoab_", (7, 8)))
        raise error
    assert terminal.everything == ["$"] and terminal.is_clean()
    assert (terminal.screen.cursor.y, terminal.screen.cursor.x) == (1, 0)


def test_an_interrupt_while_the_text_is_made_leaves_the_terminal_clean(terminal: Terminal) -> None:
    def decode(ids: list[int]) -> str:
        if len(ids) == 7:
            raise KeyboardInterrupt
        return TOKENIZER.decode(ids)

    with pytest.raises(KeyboardInterrupt), LiveView(decode, IDS, terminal.stream) as live:
        live(step(0, "one_two"))
    assert terminal.everything == ["$"] and terminal.is_clean()


PROGRAM = """
import sys, time, torch
from tests.single.test_live_view import IDS, TOKENIZER, step
from megatron_dlm.generation.live_view import LiveView
with LiveView(TOKENIZER.decode, IDS, sys.stdout) as live:
    for number in range(10**9):
        live(step(number, "one\\ntwo___"))
"""


def test_ctrl_c_leaves_the_terminal_of_a_program_clean(make: Any) -> None:
    terminal = make(40, 12)
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=terminal.stream, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while "step" not in terminal.raw and time.monotonic() < deadline:
            time.sleep(0.05)
            terminal.read()
        assert f"two{BLOCK * 3}" in terminal.text
        program.send_signal(signal.SIGINT)
        assert program.wait(30) != 0
    finally:
        program.kill()
        program.wait()
    assert terminal.everything == ["$"] and terminal.is_clean()


def test_control_characters_do_not_reach_the_terminal(terminal: Terminal) -> None:
    text = "a\x1b[2J\rb\x08\x07\x9b1m\u202ec\u2028\td\x00"
    with view(terminal.stream) as live:
        live(step(0, text))
        shown = "a\u241b[2J\u240db\u2408\u2407\ufffd1m\ufffdc\ufffd d\u2400"
        assert terminal.text[1:3] == [shown, "step 0 | 0 of 0 toke"]
    assert terminal.read().endswith(shown.replace(" d", "\td") + "\r\n")


def test_at_most_twenty_frames_a_second_and_nothing_new_is_missed(terminal: Terminal) -> None:
    clock = Clock()
    with LiveView(TOKENIZER.decode, IDS, terminal.stream, clock=clock) as live:
        live(step(0, "____"))
        terminal.read()
        for number in range(1, 5):
            clock.now += 0.012
            live(step(number, "abcd"[:number] + "_" * (4 - number), (number - 1,)))
        assert terminal.read() == ""
        clock.now += 0.012
        live(step(5, "abcd"))
        assert terminal.text[1] == "abcd"
        assert [terminal.style(1, column) for column in range(4)] == [("green", True)] * 4


def test_drawing_takes_a_tenth_of_the_time_at_most(terminal: Terminal) -> None:
    clock = Clock()
    with LiveView(TOKENIZER.decode, IDS, terminal.stream, clock=clock) as live:
        clock.pace = 0.5  # between looks, and so for a frame
        live(step(0, "__"))
        clock.pace = 0.0
        terminal.read()
        for seconds, drawn in ((4.9, False), (0.2, True)):
            clock.now += seconds
            live(step(1, "__"))
            assert bool(terminal.read()) == drawn


def test_control_tokens_and_the_end_of_the_text(terminal: Terminal) -> None:
    with view(terminal.stream, TOKENIZER.vocabulary) as live:
        live(step(0, [END, 97, MASK, MASK, MASK]))
        live(step(1, [END, 97, 98, END, MASK], (2, 3)))
        assert terminal.text[1] == f"\u25caab\u25ca{BLOCK}"
    assert terminal.everything == ["$", "ab"]


def test_the_row_that_is_asked_for(terminal: Terminal) -> None:
    tokens = torch.tensor([[97, 98, 99], [100, MASK, MASK]])
    with view(terminal.stream, row=1) as live:
        live(Step(0, tokens, [3, 2], torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3)))
        assert terminal.text[1] == f"d{BLOCK}"


def test_no_colour_where_none_is_wanted(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with view(terminal.stream) as live:
        live(step(1, "ab", (0,)))
        assert terminal.text[1] == "ab" and terminal.style(1, 0) == ("default", True)


def test_a_terminal_without_blocks(make: Any) -> None:
    terminal = make(encoding="ascii")
    with view(terminal.stream) as live:
        live(step(0, "caf\u00e9_"))
        assert terminal.text[1] == "caf?_"
    assert terminal.everything == ["$", "caf\\xe9"]


def test_only_the_text_goes_to_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.setenv(name, "1")
    stream = io.StringIO()
    live = view(stream)
    live(step(0, "a\x1b\r__"))
    live(step(1, "a\x1b\rbc", (3, 4)))
    assert stream.getvalue() == ""
    live.close()
    live.close()
    assert stream.getvalue() == "a\x1b\rbc\n", "a file gets the text as it is"
    view(empty := io.StringIO()).close()
    assert empty.getvalue() == "", "without a step there is no text"


def test_the_text_can_be_left_to_the_caller(terminal: Terminal) -> None:
    with view(terminal.stream, text_at_end=False) as live:
        live(step(0, "ab_"))
    assert terminal.everything == ["$"] and terminal.is_clean()


def test_a_dumb_terminal_gets_the_text_made_visible(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with view(terminal.stream) as live:
        live(step(0, "a\x1bb_"))
        assert terminal.everything == ["$"]
    assert terminal.everything == ["$", "a\u241bb"] and "\x1b" not in terminal.raw
