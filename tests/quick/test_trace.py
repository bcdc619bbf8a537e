"""Recording a denoising: which step filled in what, whole characters, and text that a page can hold."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_dlm.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_dlm.errors import DataError
from megatron_dlm.generation.trace import Cell, Fill, Recorder, Speller, Trace, TraceRow, visible
from megatron_dlm.generation.trace_page import render, write
from megatron_dlm.shipped.sampler import Step, sample
from megatron_dlm.shipped.sampler_plan import SamplerOptions, Vocabulary

BYTES = ByteTokenizer()
MASK, END = BYTES.mask_token_id, BYTES.end_of_document_id
TEXT = 'def f(x):\n    return "caf\u00e9 \u4e16\u754c \U0001f642"  # two  spaces\n'


def step(number: int, rows: list[list[int]], filled: dict[tuple[int, int], float] | None = None) -> Step:
    """A step of padded rows; `filled` maps (row, position) to a confidence."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [MASK] * (width - len(row)) for row in rows])
    confidence = torch.zeros(tokens.shape)
    for place, value in (filled or {}).items():
        confidence[place] = value
    return Step(number, tokens, [len(row) for row in rows], confidence > 0, confidence)


def record(*steps: Step, end: int | None = None) -> Trace:
    recorder = Recorder(BYTES.decode, Vocabulary(MASK, end))
    for one in steps:
        recorder(one)
    return recorder.trace("title", {"steps": "2"})


def test_every_position_has_the_step_that_filled_it() -> None:
    a, b, c = b"abc"
    (row,) = record(
        step(0, [[a, MASK, MASK, MASK]]),
        step(1, [[a, MASK, c, MASK]], {(0, 2): 0.5}),
        step(2, [[a, b, c, MASK]], {(0, 1): 0.25}),
    ).rows
    assert row.cells == (
        Cell("a", False, (Fill(a, 0, 0.0),)),
        Cell("b", False, (Fill(b, 2, 0.25),)),
        Cell("c", False, (Fill(c, 1, 0.5),)),
        Cell("", False, (Fill(MASK, None, 0.0),)),
    )
    assert row.forwards == 2


def test_a_position_that_is_masked_again_counts_with_its_last_token() -> None:
    a, b = b"ab"
    steps = [
        step(0, [[MASK, MASK]]),
        step(1, [[a, b]], {(0, 0): 0.1, (0, 1): 0.9}),
        step(2, [[MASK, MASK]]),
        step(3, [[b, MASK]], {(0, 0): 0.7}),
    ]
    (row,) = record(*steps).rows
    assert [fill for cell in row.cells for fill in cell.fills] == [Fill(b, 3, pytest.approx(0.7)), Fill(MASK, None, 0)]


def test_rows_end_at_their_lengths_and_batches_follow_each_other() -> None:
    a, b = b"ab"
    start, done = [[a], [a, MASK, b]], [[a], [a, b, b]]
    trace = record(step(0, start), step(1, done, {(1, 1): 0.5}), step(0, [[b, b]]))
    assert [[cell.text for cell in row.cells] for row in trace.rows] == [["a"], ["a", "b", "b"], ["b", "b"]]
    assert [row.forwards for row in trace.rows] == [0, 1, 0]


def test_what_is_behind_a_new_end_is_set_apart() -> None:
    a = ord("a")
    start = [a, END, a, MASK, MASK, MASK]
    trace = record(step(0, [start]), step(1, [[a, END, a, END, a, MASK]], {(0, 3): 0.9, (0, 4): 0.9}), end=END)
    (row,) = trace.rows
    assert [cell.control for cell in row.cells] == [False, True, False, True, False, False]
    assert row.end == 4, "the prompt's own end-of-document is no end, and the new one belongs to the text"
    (row,) = record(step(0, [start]), step(1, [[a, END, a, END, a, MASK]], {(0, 3): 0.9, (0, 4): 0.9})).rows
    assert row.end == 6


def test_the_recorder_keeps_no_tensor_of_the_sampler() -> None:
    recorder = Recorder(BYTES.decode, Vocabulary(MASK))
    one = step(1, [[ord("a"), MASK]], {(0, 0): 0.5})
    recorder(one)
    for tensor in (one.tokens, one.revealed, one.confidence):
        tensor.zero_()
    assert [cell.fills[0] for cell in recorder.trace("", {}).rows[0].cells] == [Fill(97, 1, 0.5), Fill(MASK, None, 0.0)]


def test_confidence_is_a_probability() -> None:
    trace = record(
        Step(1, torch.tensor([[97, 98]]), [2], torch.tensor([[True, True]]), torch.tensor([[2.0, torch.nan]]))
    )
    assert [cell.fills[0].confidence for cell in trace.rows[0].cells] == [1.0, 0.0]


def test_bytes_of_one_character_are_one_cell() -> None:
    ids = BYTES.encode("\u4e16")
    (row,) = record(
        step(0, [[97, MASK, MASK, MASK]]),
        step(1, [[97, ids[0], MASK, ids[2]]], {(0, 1): 0.5, (0, 3): 0.25}),
        step(2, [[97, *ids]], {(0, 2): 0.75}),
    ).rows
    assert [(cell.text, [fill.step for fill in cell.fills]) for cell in row.cells] == [
        ("a", [0]),
        ("\u4e16", [1, 2, 1]),
    ]


def test_masks_and_control_tokens_part_the_bytes_of_a_character() -> None:
    spell = Speller(BYTES.decode, MASK)
    first, second = "\u00e9".encode()
    assert [(s.text, s.size, s.control) for s in spell([first, second])] == [("\u00e9", 2, False)]
    for between in (MASK, END):
        texts = [(s.text, s.size, s.control) for s in spell([first, between, second])]
        assert texts == [("\ufffd", 1, False), ("", 1, between == END), ("\ufffd", 1, False)]


def test_broken_bytes_hold_nothing_up() -> None:
    spell = Speller(BYTES.decode, MASK)
    assert [s.text for s in spell([0xE2, 0x82, *b"ok", 0xFF, *"\u20ac".encode()])] == [
        *("\ufffd", "\ufffd", "o", "k", "\ufffd", "\u20ac")
    ]


def sentencepiece(folder: Path) -> Tokenizer:
    from megatron_dlm.preparation.sentencepiece_training import train_sentencepiece

    train_sentencepiece([TEXT.replace("\u4e16\u754c", "")] * 20, 300, folder / "tokenizer.model")
    return SentencePieceTokenizer(folder / "tokenizer.model")


def byte_level(folder: Path) -> Tokenizer:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    model.save(str(folder / "tokenizer.json"))
    return HuggingFaceTokenizer(folder)


def metaspace(folder: Path) -> Tokenizer:
    """Drops the space in front of a text, as Llama's tokenizer does."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    decoders = tokenizers.decoders
    model.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    model.train_from_iterator(
        ["a few words in a line, and a few more"], tokenizers.trainers.BpeTrainer(special_tokens=pieces)
    )
    model.save(str(folder / "tokenizer.json"))
    return HuggingFaceTokenizer(folder)


@pytest.mark.parametrize(
    "make", [lambda folder: BYTES, sentencepiece, byte_level, metaspace], ids=["byte", "sp", "bl", "ms"]
)
def test_the_parts_of_a_text_are_the_text(make: Callable[[Path], Tokenizer], tmp_path: Path) -> None:
    tokenizer = make(tmp_path)
    ids = tokenizer.encode(TEXT)
    spelled = Speller(tokenizer.decode, tokenizer.mask_token_id)(ids)
    assert sum(s.size for s in spelled) == len(ids)
    assert "".join(s.text for s in spelled) == tokenizer.decode(ids)
    assert all(s.size == 1 or len(s.text) >= 1 for s in spelled)
    assert not any(s.control for s in spelled)


def test_any_bytes_are_taken() -> None:
    rng = random.Random(0)
    spell = Speller(BYTES.decode, MASK)
    for _ in range(300):
        ids = [rng.choice([rng.randrange(258), rng.randrange(0x80, 0xF5), ord("a")]) for _ in range(rng.randrange(12))]
        spelled = spell(ids)
        assert sum(s.size for s in spelled) == len(ids)
        whole = [s.text for s in spelled if s.size > 1]
        assert all(len(text) == 1 and text != "\ufffd" for text in whole)


def test_what_cannot_be_seen_becomes_a_symbol() -> None:
    text = "a\tb\nc\x00\x1b\r\x7f\x9b\u202e\u2028\ud800\u200dz"
    assert visible(text) == "a\tb\nc\u2400\u241b\u240d\u2421" + "\ufffd" * 4 + "\u200dz"
    assert visible("a\tb\n\u200d", keep="") == "a\u2409b\u240a\ufffd"


def hostile() -> Trace:
    texts = ["</script><script>alert(1)</script>", "\u2028\x00\ud800", "@TRACE@ @TITLE@", "<!--", "&amp;"]
    cells = tuple(Cell(text, False, (Fill(1, 1, 0.123456),)) for text in texts)
    return Trace("</title>\u4e16\"'", {"<b>": "</dd>"}, (TraceRow(cells, 1, len(cells)),))


def data_of(page: str) -> dict:
    (data,) = re.findall(r'<script type="application/json" id="trace">(.*?)</script>', page, re.DOTALL)
    assert not set("<>&") & set(data)
    return json.loads(data)


def test_the_page_holds_the_trace_and_nothing_gets_out_of_it() -> None:
    trace = hostile()
    page = render(trace)
    assert page.isascii() and page == render(trace)
    assert page.count("<script") == page.count("</script>") == 2
    assert "<title>&lt;/title&gt;&#19990;&quot;&#x27;</title>" in page
    data = data_of(page)
    assert [cell[0] for cell in data["rows"][0]["cells"]] == [cell.text for cell in trace.rows[0].cells]
    assert data["rows"][0]["cells"][0][2] == [[1, 0.1235, 1]]
    assert (data["title"], data["details"]) == (trace.title, trace.details)
    assert not re.search(r"https?:|url\(|@import|@[A-Z_]+@", page.partition(' id="trace">')[0]), "no network, no slot"


def test_a_page_of_the_sampler(tmp_path: Path) -> None:
    """A denoiser that is sure of the alphabet, the later the letter the surer."""
    target = torch.arange(97, 107)

    def denoise(tokens: torch.Tensor, lengths: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        column = rows % tokens.shape[1]
        logits = torch.zeros(len(rows), BYTES.vocab_size)
        logits[torch.arange(len(rows)), target[column]] = 5.0 + column.float()
        return logits

    recorder = Recorder(BYTES.decode, BYTES.vocabulary)
    options = SamplerOptions(steps=4)
    sample(denoise, [[97, 98]], options, vocabulary=Vocabulary(MASK), max_new_tokens=8, on_step=recorder)
    write(recorder.trace("t", {}), tmp_path / "page.html")
    cells = data_of((tmp_path / "page.html").read_text())["rows"][0]["cells"]
    assert "".join(cell[0] for cell in cells) == "abcdefghij"
    assert [fill[0] for cell in cells for fill in cell[2]] == [0, 0, 4, 4, 3, 3, 2, 2, 1, 1]
    confidences = [fill[1] for cell in cells for fill in cell[2]][2:]
    assert confidences == sorted(confidences) and confidences[0] > 0.5


def test_writing_replaces_the_whole_file_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def interrupted(self: Path, target: Path) -> None:
        assert self.read_text() == render(hostile())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(hostile(), path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["page.html"]
    write(hostile(), path)
    assert path.read_text() == render(hostile()) and os.listdir(tmp_path) == ["page.html"]


@pytest.mark.parametrize("place", ["missing/page.html", "."])
def test_a_place_that_cannot_be_written_is_one_line(place: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^cannot write .*: .*; choose another file$"):
        write(hostile(), tmp_path / place)
    assert not os.listdir(tmp_path)
