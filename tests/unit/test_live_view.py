"""The live view on a small model of a terminal: in place, within the screen, clean behind itself."""

from __future__ import annotations

import io
import os
import re
import unicodedata
from collections.abc import Iterator

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


class Screen(io.StringIO):
    """Interprets what a terminal of this size would; anything but the sequences known here is an error."""

    encoding = "utf-8"

    def __init__(self, width: int = 20, height: int = 6, above: str = "$ ") -> None:
        super().__init__()
        self.width, self.height = width, height
        self.lines = [[" "] * width for _ in range(height)]
        self.scrolled: list[str] = []
        self.row = self.column = 0
        self.wraps = self.cursor = True
        self.wide = ""  # characters that take two columns here, but not by the standard
        self.style = ""
        self.styles: dict[tuple[int, int], str] = {}
        self.frames = 0
        if above:
            self.write(above + "\r\n")

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.frames += 1
        for code, character in re.findall(r"\x1b\[([?\d;]*[A-Za-z])|(.)", text, re.DOTALL):
            if code:
                self._control(code)
            else:
                self._character(character)
        return len(text)

    def _control(self, code: str) -> None:
        if code[-1] == "m":
            self.style = code[:-1].removesuffix("0")
        elif code[-1] == "A":
            assert int(code[:-1]) <= self.row, "moves above the screen"
            self.row -= int(code[:-1])
        elif code == "K":
            self._clear(self.row, self.column)
        elif code == "J":
            self._clear(self.row, self.column)
            for row in range(self.row + 1, self.height):
                self._clear(row, 0)
        elif code in ("?7l", "?7h"):
            self.wraps = code == "?7h"
        elif code in ("?25l", "?25h"):
            self.cursor = code == "?25h"
        else:
            raise AssertionError(f"unknown sequence {code!r}")

    def _clear(self, row: int, column: int) -> None:
        self.lines[row][column:] = [" "] * (self.width - column)

    def _character(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":  # as a terminal shows it, where a new line also returns
            self.column, self.row = 0, self.row + 1
            if self.row == self.height:
                self.scrolled.append("".join(self.lines.pop(0)).rstrip())
                self.lines.append([" "] * self.width)
                self.row -= 1
        else:
            assert character.isprintable() or character == "\t", f"{character!r} reaches the terminal"
            size = 1 + (unicodedata.east_asian_width(character) in "WF" or character in self.wide)
            if self.column + size > self.width:
                if not self.wraps:
                    return
                self._character("\n")
            self.lines[self.row][self.column : self.column + size] = [character, ""][:size]
            self.styles[self.row, self.column] = self.style
            self.column += size

    @property
    def text(self) -> list[str]:
        return ["".join(line).rstrip() for line in self.lines]

    @property
    def everything(self) -> list[str]:
        """What was scrolled out and what is there, without the empty lines at the end."""
        return "\n".join(self.scrolled + self.text).rstrip().split("\n")

    def narrow(self, width: int) -> None:
        """Make the window narrower; as most terminals do, wrap the lines that are too long now."""
        before = [
            line[at : at + width] for line in self.text[: self.row + 1] for at in range(0, max(len(line), 1), width)
        ]
        self.lines = [list(line.ljust(width)) for line in before[-self.height :]]
        self.row = len(self.lines) - 1
        self.lines += [[" "] * width for _ in range(self.height - len(self.lines))]
        self.width, self.column = width, len(before[-1])

    def is_clean(self) -> bool:
        return self.wraps and self.cursor and not self.style


class Clock:
    """Seconds that pass as told: at each look."""

    now, pace = 0.0, 0.0

    def __call__(self) -> float:
        self.now += self.pace
        return self.now


class SlowSampler(LiveView):
    """A view that is called once a second."""

    def __call__(self, step: Step) -> None:
        self._clock.now += 1.0
        super().__call__(step)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    monkeypatch.setattr("shutil.get_terminal_size", lambda fallback: os.terminal_size((screen.width, screen.height)))
    yield screen


def view(stream: io.StringIO, vocabulary: Vocabulary = IDS, **options: int) -> LiveView:
    return SlowSampler(TOKENIZER.decode, vocabulary, stream, clock=Clock(), **options)


def step(number: int, text: str | list[int], filled: tuple[int, ...] = ()) -> Step:
    """A step of one row; "_" in the text stands for a mask."""
    ids = text if isinstance(text, list) else [MASK if byte == ord("_") else byte for byte in text.encode()]
    revealed = torch.zeros(1, len(ids), dtype=torch.bool)
    revealed[0, list(filled)] = True
    return Step(number, torch.tensor([ids]), [len(ids)], revealed, revealed.float())


def test_frames_replace_each_other_and_then_give_way_to_the_text(screen: Screen) -> None:
    with view(screen) as live:
        live(step(0, "def f(_):\n    ___"))
        assert screen.text[:4] == ["$", f"def f({BLOCK}):", f"    {BLOCK * 3}", "step 0 | 0 of 4 toke"[:19]]
        live(step(1, "def f(x):\n    _a_", (6, 15)))
        assert screen.text[:4] == ["$", "def f(x):", f"    {BLOCK}a{BLOCK}", "step 1 | 2 of 4 tok"]
        assert screen.styles[1, 6] == screen.styles[2, 5] == "1;32"
        assert (screen.styles[2, 4], screen.styles[1, 0]) == ("2", "")
        assert not screen.cursor
        live(step(2, "def f(x):\n    bac", (14, 16)))
        assert screen.styles[1, 6] == "", "what was new is new no more"
    assert screen.everything == ["$", "def f(x):", "    bac"]
    assert screen.is_clean() and (screen.row, screen.column) == (3, 0)


def test_long_lines_are_wrapped_and_long_texts_show_their_end(screen: Screen) -> None:
    text = "".join(f"{i:03}," for i in range(60))
    with view(screen) as live:
        for number in range(3):
            live(step(number, text[:-6] + "_" * 6))
            lines = [text[at : at + 19] for at in range(0, len(text), 19)]
            lines[-1] = lines[-1][:-6] + BLOCK * 6
            assert screen.text[:5] == ["$", *lines[-4:]] and screen.text[5].startswith(f"step {number}")
        assert not screen.scrolled, "frames stay where they are"
    assert "".join(screen.everything[1:]) == text[:-6], "the text itself may scroll"


def test_wide_characters_fill_two_columns(screen: Screen) -> None:
    with view(screen) as live:
        live(step(0, "\u4e16" * 12))
        assert screen.text[1:3] == ["\u4e16" * 9, "\u4e16" * 3]


def test_a_terminal_that_takes_a_character_for_wider_keeps_its_lines(screen: Screen) -> None:
    screen.wide = "\u25ca\u00e9"
    with view(screen) as live:
        for number in range(3):
            live(step(number, "\u00e9" * 19 + "\nabc"))
            assert screen.text[:3] == ["$", "\u00e9" * 10, "abc"]


def test_a_window_that_becomes_narrower_is_cleaned_too(screen: Screen) -> None:
    screen.height = 12
    screen.lines += [[" "] * 20 for _ in range(6)]
    with view(screen) as live:
        live(step(0, "abcdefghijklmnopqrs\nabcdefghijkl"))
        screen.narrow(8)
        live(step(1, "abcdefghijklmnopqrs\nabcdefghijkl"))
        assert screen.text[:7] == ["$", "abcdefg", "hijklmn", "opqrs", "abcdefg", "hijkl", "step 1"]
        assert not any(screen.text[7:])


@pytest.mark.parametrize(("width", "height"), [(20, 1), (20, 2), (2, 6), (1, 3)])
def test_tiny_windows(screen: Screen, width: int, height: int) -> None:
    tiny = Screen(width, height, above="")
    screen.width, screen.height = width, height
    with view(tiny) as live:
        for number in range(3):
            live(step(number, "hello\nworld_", (0,)))
        assert not tiny.scrolled
    assert tiny.is_clean()


def test_what_is_printed_behind_the_text_stays(screen: Screen) -> None:
    with pytest.raises(ValueError), view(screen) as live:
        live(step(0, "ab_"))
        live.close()
        screen.write("more")
        raise ValueError
    assert screen.everything == ["$", "ab", "more"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_or_an_interrupt_leaves_nothing(screen: Screen, error: type[BaseException]) -> None:
    with pytest.raises(error), view(screen) as live:
        live(step(0, "one\ntwo___"))
        live(step(1, "one\ntwoab_", (7, 8)))
        raise error
    assert screen.everything == ["$"] and screen.is_clean() and (screen.row, screen.column) == (1, 0)


def test_an_interrupt_while_the_text_is_made_leaves_the_terminal_clean(screen: Screen) -> None:
    def decode(ids: list[int]) -> str:
        if len(ids) == 7:
            raise KeyboardInterrupt
        return TOKENIZER.decode(ids)

    with pytest.raises(KeyboardInterrupt), LiveView(decode, Vocabulary(MASK), screen) as live:
        live(step(0, "one_two"))
    assert screen.everything == ["$"] and screen.is_clean()


def test_control_characters_do_not_reach_the_terminal(screen: Screen) -> None:
    text = "a\x1b[2J\rb\x08\x07\x9b1m\u202ec\u2028\td\x00"
    with view(screen) as live:
        live(step(0, text))
        assert screen.text[1] == "a\u241b[2J\u240db\u2408\u2407\ufffd1m\ufffdc\ufffd d\u2400"
    assert screen.everything[:2] == ["$", "a\u241b[2J\u240db\u2408\u2407\ufffd1m\ufffdc\ufffd\td\u2400"]


def test_at_most_twenty_frames_a_second_and_nothing_new_is_missed(screen: Screen) -> None:
    clock = Clock()
    with LiveView(TOKENIZER.decode, IDS, screen, clock=clock) as live:
        live(step(0, "____"))
        before = screen.frames
        for number in range(1, 5):
            clock.now += 0.012
            live(step(number, "abcd"[:number] + "_" * (4 - number), (number - 1,)))
        assert screen.frames == before
        clock.now += 0.012
        live(step(5, "abcd"))
        assert screen.frames == before + 1 and screen.text[1] == "abcd"
        assert [screen.styles[1, column] for column in range(4)] == ["1;32"] * 4


def test_drawing_takes_a_tenth_of_the_time_at_most(screen: Screen) -> None:
    clock = Clock()
    with LiveView(TOKENIZER.decode, IDS, screen, clock=clock) as live:
        clock.pace = 0.5  # between looks, and so for a frame
        live(step(0, "__"))
        clock.pace = 0.0
        frames = screen.frames
        for seconds, drawn in ((4.9, 0), (0.2, 1)):
            clock.now += seconds
            live(step(1, "__"))
            assert screen.frames == frames + drawn


def test_control_tokens_and_the_end_of_the_text(screen: Screen) -> None:
    start = [END, 97, MASK, MASK, MASK]
    with view(screen, TOKENIZER.vocabulary) as live:
        live(step(0, start))
        live(step(1, [END, 97, 98, END, MASK], (2, 3)))
        assert screen.text[1] == f"\u25caab\u25ca{BLOCK}"
    assert screen.everything == ["$", "ab"]


def test_the_row_that_is_asked_for(screen: Screen) -> None:
    tokens = torch.tensor([[97, 98, 99], [100, MASK, MASK]])
    with view(screen, row=1) as live:
        live(Step(0, tokens, [3, 2], torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3)))
        assert screen.text[1] == f"d{BLOCK}"


def test_no_colour_where_none_is_wanted(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    live = view(screen)
    live(step(1, "ab", (0,)))
    assert screen.styles[1, 0] == "1"
    live.close()


def test_a_terminal_without_blocks(screen: Screen) -> None:
    screen.encoding = "ascii"
    with view(screen) as live:
        live(step(0, "caf\u00e9_"))
        assert screen.text[1] == "caf?_"


def test_only_the_text_goes_to_a_file() -> None:
    stream = io.StringIO()
    live = view(stream)
    live(step(0, "a\x1b\r__"))
    live(step(1, "a\x1b\rbc", (3, 4)))
    assert stream.getvalue() == ""
    live.close()
    live.close()
    assert stream.getvalue() == "a\x1b\rbc\n", "a file gets the text as it is"


def test_the_text_can_be_left_to_the_caller(screen: Screen) -> None:
    with view(screen, text_at_end=False) as live:
        live(step(0, "ab_"))
    assert screen.everything == ["$"] and screen.is_clean() and (screen.row, screen.column) == (1, 0)


def test_a_dumb_terminal_gets_the_text_made_visible(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with view(screen) as live:
        live(step(0, "a\x1bb_"))
        assert screen.everything == ["$"]
    assert screen.everything == ["$", "a\u241bb"]


def test_without_any_step_nothing_is_written() -> None:
    stream = io.StringIO()
    view(stream).close()
    assert stream.getvalue() == ""
