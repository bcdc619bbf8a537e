"""The NELBO of a text: against enumeration, its intervals, the trainer's figure, and the sources it reads."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dlm.config.kinds import KINDS, MASKED_DIFFUSION
from megatron_dlm.data.tokenizer import ByteTokenizer, Tokenizer
from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.evaluation.progress import collect
from megatron_dlm.evaluation.text_nelbo import TextNelbo, read_windows, text_nelbo
from megatron_dlm.generation.denoiser import Denoiser
from megatron_dlm.generation.text_model import TextModel, open_text_model
from megatron_dlm.hf.export import export
from megatron_dlm.parallel import topology as parallel
from megatron_dlm.preparation.prepare import PrepareOptions, prepare
from megatron_dlm.training.held_out import held_out_nelbo
from megatron_dlm.training.setup import build
from tests.exports import make_checkpoint
from tests.runs import tiny_config

SEQ, VOCAB = 5, 5
REPEATS = 160


def nelbo(*arguments: Any, **options: Any) -> TextNelbo:
    (found,) = collect(text_nelbo(*arguments, **options))
    return found


class Letters(Tokenizer):
    """a, b, c, end-of-document and [MASK]: so few that every mask of every window can be enumerated."""

    def __init__(self) -> None:
        self.source, self.content = "letters", b"abc"
        self._set_control_ids(3, None, None)

    def encode(self, text: str) -> list[int]:
        return ["abc".index(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join("abc"[i] for i in ids if i < 3)

    def save(self, directory: str | Path) -> str:
        raise NotImplementedError


class Tiny:
    """Random logits for every noised window of 5 tokens; windows with many an "a" are easy."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(VOCAB**SEQ, SEQ, VOCAB, generator=generator, dtype=torch.float64)
        self.logits[..., 0] += 1.5

    def __call__(self, tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        index = (tokens * VOCAB ** torch.arange(tokens.shape[1])).sum(1)
        return self.logits[index][:, : tokens.shape[1]].flatten(0, 1)[rows]

    def bound(self, window: Sequence[int]) -> float:
        """The NELBO of a window by its definition: the mean over k of L/k times the mean over all subsets of size k."""
        size, total = len(window), 0.0
        clean = torch.tensor(window)
        for k in range(1, size + 1):
            subsets = torch.tensor(list(itertools.combinations(range(size), k)))
            masks = torch.zeros(len(subsets), size, dtype=torch.bool).scatter_(1, subsets, True)
            noised = clean.expand(len(subsets), size).masked_fill(masks, VOCAB - 1)
            logits = self(noised, None, torch.arange(masks.numel()))
            losses = F.cross_entropy(logits, clean.repeat(len(subsets)), reduction="none").view(masks.shape)
            total += float((losses * masks).sum(1).mean()) / k
        return total


def tiny_model(denoise: Any = None, **fields: Any) -> TextModel:
    known: dict[str, Any] = {"tokenizer": Letters(), "kind": MASKED_DIFFUSION, "max_length": SEQ, "name": "tiny"}
    return TextModel(denoise=denoise or Tiny(), device=torch.device("cpu"), **(known | fields))


def write_documents(file: Path, texts: Sequence[str]) -> str:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def random_texts(seed: int, count: int) -> list[str]:
    """Of 4 letters: with its end-of-document each is one window."""
    return ["".join(text) for text in np.random.default_rng(seed).choice(list("abc"), (count, SEQ - 1))]


ALL_WINDOWS = ["".join(text) for text in itertools.product("abc", repeat=SEQ - 1)]


@pytest.fixture(scope="module")
def bounds() -> dict[str, float]:
    """The enumerated NELBO of every window, nats."""
    model = Tiny()
    return {text: model.bound([*Letters().encode(text), 3]) for text in ALL_WINDOWS}


def test_equals_the_enumerated_bound(tmp_path: Path) -> None:
    """With as many draws as there are masks; the last window is shorter, and one document spans three windows."""
    source = write_documents(tmp_path / "a.jsonl", ["abca", "", "ccbabacbbcab", "b"])
    ids = [0, 1, 2, 0, 3, 2, 2, 1, 0, 1, 0, 2, 1, 1, 2, 0, 1, 3, 1, 3]
    windows = [ids[:5], ids[5:10], ids[10:15], ids[15:]]
    totals = [Tiny().bound(window) for window in windows]
    found = nelbo(tiny_model(), source, masks=31)
    assert found.nats_per_token == pytest.approx(sum(totals) / 20, rel=1e-12)
    assert (found.tokens, found.bytes, found.windows, found.masks_ci95) == (20, 17, 4, 0.0)
    assert found.bits_per_byte == pytest.approx(sum(totals) / math.log(2) / 17, rel=1e-12)
    assert found.perplexity == pytest.approx(math.exp(found.nats_per_token), rel=1e-12)
    # Equal lengths: the interval is that of a mean. Student's t of 3 degrees of freedom is 3.1824.
    half = 3.1824 * np.std(np.array(totals) / 5, ddof=1) / 2
    assert found.nats_per_token_ci95 == pytest.approx(half, rel=1e-4)
    assert found.bits_per_byte_ci95 == pytest.approx(half / math.log(2) * 20 / 17, rel=1e-4)
    ends = [math.exp(found.nats_per_token + sign * half) for sign in (-1, 1)]
    assert found.perplexity_ci95 == pytest.approx((ends[1] - ends[0]) / 2, rel=1e-4)


def test_a_shorter_window_counts_less(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "a.jsonl", ["abcacba", "c" * 5, "a"])
    windows = read_windows(source, Letters(), SEQ)
    assert windows.lengths.tolist() == [5, 5, 5, 1]
    totals = np.array([Tiny().bound(windows.tokens[at : at + 5].tolist()) for at in (0, 5, 10, 15)])
    found = nelbo(tiny_model(), source, masks=31)
    ratio = totals.sum() / 16
    residuals = totals - ratio * windows.lengths
    assert found.nats_per_token == pytest.approx(ratio, rel=1e-12)
    assert found.nats_per_token_ci95 == pytest.approx(3.1824 * math.sqrt(4 / 3 * (residuals**2).sum()) / 16, rel=1e-4)


def test_intervals_of_other_text_hold_what_they_say(tmp_path: Path, bounds: dict[str, float]) -> None:
    """Over texts that are drawn anew, with new masks, the figure of all text is inside 95 times in 100."""
    truth, model = np.mean(list(bounds.values())) / SEQ, tiny_model()
    covered = []
    for repeat in range(REPEATS):
        source = write_documents(tmp_path / "a.jsonl", random_texts(repeat, 16))
        found = nelbo(model, source, masks=8, seed=repeat)
        covered.append(abs(found.nats_per_token - truth) <= found.nats_per_token_ci95)
    assert 0.90 <= np.mean(covered) <= 0.99


def test_intervals_of_the_masks_hold_what_they_say(tmp_path: Path, bounds: dict[str, float]) -> None:
    """Over seeds on one text, whose own bound is inside 95 times in 100."""
    texts, model = random_texts(3, 12), tiny_model()
    source, truth = write_documents(tmp_path / "a.jsonl", texts), sum(map(bounds.__getitem__, texts)) / 12 / SEQ
    found = [nelbo(model, source, masks=16, seed=seed) for seed in range(REPEATS)]
    errors = np.array([result.nats_per_token - truth for result in found])
    assert 0.90 <= np.mean(np.abs(errors) <= [result.masks_ci95 for result in found]) <= 0.99
    assert abs(errors.mean()) < 3 * errors.std(ddof=1) / math.sqrt(REPEATS)


def test_masks_depend_on_seed_and_window_alone(tmp_path: Path) -> None:
    texts, model = random_texts(1, 9), tiny_model()
    source = write_documents(tmp_path / "a.jsonl", texts)
    whole = nelbo(model, source, masks=4)
    for tokens_per_batch in (1, 5, 35):
        again = nelbo(model, source, masks=4, tokens_per_batch=tokens_per_batch)
        assert again == pytest.approx(whole, rel=1e-12)
    assert nelbo(model, source, masks=4, seed=1).nats_per_token != whole.nats_per_token
    # The first four windows have the same masks whatever follows them.
    alone = nelbo(model, source, masks=4, limit_tokens=20)
    other = write_documents(tmp_path / "b.jsonl", texts[:4])
    assert alone == pytest.approx(nelbo(model, other, masks=4), rel=1e-12)
    swapped = write_documents(tmp_path / "c.jsonl", [texts[0], texts[2], texts[1], texts[3]])
    assert nelbo(model, swapped, masks=4).nats_per_token != pytest.approx(alone.nats_per_token, rel=1e-9)


@pytest.fixture
def trained(tiny_data: Path) -> Any:
    """Builds an untrained run: its model, and the trainer's figure over all full windows."""

    def open_run(objective: str) -> tuple[TextModel, Any]:
        config = tiny_config(tiny_data, model={"objective": objective, "init_std": 0.3})
        topology = parallel.initialize(config.parallel)
        training = build(config, topology)
        assert training.valid_stream is not None
        count = training.valid_stream.dataset.samples_per_epoch
        theirs = held_out_nelbo(training.chunks, training.valid_stream, topology, num_sequences=count)
        model = TextModel(
            Denoiser(training.chunks, topology), ByteTokenizer(), KINDS[objective], 32, topology.device, "run"
        )
        return model, theirs

    return open_run


def test_agrees_with_the_trainer(tiny_data: Path, trained: Any) -> None:
    model, theirs = trained("masked_diffusion")
    ours = nelbo(model, str(tiny_data / "valid"), masks=4, limit_tokens=32 * theirs.sequences)
    assert ours.windows == theirs.sequences > 200
    difference = abs(ours.nats_per_token - theirs.nelbo)
    assert difference < math.hypot(ours.nats_per_token_ci95, theirs.ci95)
    assert 0 < ours.masks_ci95 < ours.nats_per_token_ci95 < 0.03 * ours.nats_per_token


def test_autoregressive_models_have_the_trainer_s_figure(tiny_data: Path, trained: Any) -> None:
    model, theirs = trained("autoregressive")
    ours = nelbo(model, str(tiny_data / "valid"), limit_tokens=32 * theirs.sequences)
    assert ours.nats_per_token == pytest.approx(theirs.nelbo, rel=1e-6)
    assert (ours.masks, ours.masks_ci95, ours.windows) == (0, 0.0, theirs.sequences)
    longer = nelbo(model, str(tiny_data / "valid"))
    assert longer.windows == ours.windows + 1 and 0 < longer.tokens - ours.tokens < 32


def test_an_export_has_the_figure_of_its_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    for objective in ("masked_diffusion", "autoregressive"):
        run = make_checkpoint(tmp_path / objective, objective=objective, init_std=0.3)
        export(run, tmp_path / f"{objective}-export")
        models = [open_text_model(str(path)) for path in (run, tmp_path / f"{objective}-export")]
        document = str(next((tiny_data / "chapters").glob("*.txt")))
        ours, theirs = (nelbo(model, document, masks=2, limit_tokens=300) for model in models)
        assert ours.nats_per_token == pytest.approx(theirs.nats_per_token, rel=1e-5)
        assert ours.windows == 5 and ours.tokens == 300


def test_every_source_has_the_same_tokens(tmp_path: Path) -> None:
    text, tokenizer = "Zw\u00f6lf Boxk\u00e4mpfer\n\njagen Viktor.", ByteTokenizer()
    plain = tmp_path / "plain.txt"
    plain.write_text(text, encoding="utf-8")
    prepare(PrepareOptions(output=tmp_path / "data", inputs=[plain], tokenizer="byte"))
    sources = [str(plain), write_documents(tmp_path / "x.jsonl", [text]), str(tmp_path / "data/train")]
    for source in sources:
        windows = read_windows(source, tokenizer, 8)
        assert windows.tokens.tolist() == [*text.encode(), 256] and windows.bytes == len(text.encode()) == 33
        assert windows.lengths.tolist() == [8, 8, 8, 8, 2]
        part = read_windows(source, tokenizer, 8, limit_tokens=14)
        assert part.tokens.tolist() == windows.tokens.tolist()[:14] and part.bytes == pytest.approx(14 * 33 / 34)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("b.txt", "a.txt"):
        (folder / name).write_text(name)
    assert read_windows(str(folder), tokenizer, 8).tokens.tolist() == [*b"a.txt", 256, *b"b.txt", 256]


def test_progress_and_what_is_not_known(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "a.jsonl", random_texts(0, 3))
    *shares, (result, last) = text_nelbo(tiny_model(), source, masks=1)
    assert [part.share for part in shares] == [1 / 3, 2 / 3, 1] and last == 1 and not any(p.results for p in shares)
    several = result[0]
    assert several.masks_ci95 == math.inf and several.nats_per_token_ci95 < math.inf
    one = nelbo(tiny_model(), source, masks=8, limit_tokens=5)
    assert one.nats_per_token_ci95 == one.perplexity_ci95 == math.inf and one.masks_ci95 < math.inf
    content = json.loads(json.dumps(one.as_dict(), allow_nan=False))
    assert content["nats_per_token_ci95"] is None and content["nats_per_token"] == one.nats_per_token
    assert set(content) == set(TextNelbo._fields)


def test_a_token_without_a_chance_makes_it_infinite(tmp_path: Path) -> None:
    model = Tiny()
    model.logits[..., 2] = -math.inf
    source = write_documents(tmp_path / "a.jsonl", ["abab", "cccc"])
    found = nelbo(tiny_model(model), source, masks=8)
    assert found.nats_per_token == found.perplexity == found.nats_per_token_ci95 == math.inf
    assert nelbo(tiny_model(model), source, masks=8, limit_tokens=5).nats_per_token < math.inf


def test_bad_sources_are_refused_in_one_line(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"ab\xff")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    prepare(
        PrepareOptions(
            output=tmp_path / "damaged", inputs=[write_documents(tmp_path / "a.jsonl", ["abc"])], tokenizer="byte"
        )
    )
    (tmp_path / "damaged/train.bin").write_bytes(np.array([97, 257, 97, 256], dtype=np.uint16).tobytes())
    (tmp_path / "cut").mkdir()
    for part in ("idx", "json"):
        (tmp_path / f"cut/valid.{part}").write_bytes((tiny_data / f"valid.{part}").read_bytes())
    model = tiny_model(tokenizer=ByteTokenizer())
    for source, said in (
        (tmp_path / "nothing", "does not exist: give a file, or a prefix"),
        (tmp_path / "empty.txt", "has no text"),
        (tmp_path / "binary.txt", "is not UTF-8 at byte 2"),
        (tmp_path / "broken.jsonl", "line 2 is not JSON"),
        (tmp_path / "damaged/train", "damaged: prepare the data again"),
        (tmp_path / "cut/valid", "valid.bin is missing"),
        (tiny_data, "holds prepared texts (train, valid): give"),
        (tiny_data / "valid.bin", f"is a part of a prepared text: give {tiny_data / 'valid'}"),
        (tiny_data / "valid.json", f"is a part of a prepared text: give {tiny_data / 'valid'}"),
    ):
        with pytest.raises(DataError) as refused:
            nelbo(model, str(source))
        assert said in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(
        DataError, match="was prepared with another tokenizer .* prepare it again with letters, or give"
    ):
        nelbo(tiny_model(), str(tiny_data / "valid"))


def test_bad_arguments_and_models_are_refused_in_one_line(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "a.jsonl", ["abca"])
    broken = Tiny()
    broken.logits[:] = math.nan
    for model, arguments, said in (
        (tiny_model(), {"masks": 0}, "masks is 0; it must be at least 1"),
        (tiny_model(), {"seed": -1}, "seed is -1"),
        (tiny_model(), {"tokens_per_batch": 0}, "tokens_per_batch is 0"),
        (tiny_model(), {"limit_tokens": 0}, "limit_tokens is 0; it must be at least 1"),
        (tiny_model(broken), {}, "gives NaN"),
    ):
        with pytest.raises(ConfigError) as refused:
            nelbo(model, source, **arguments)
        assert said in str(refused.value) and "\n" not in str(refused.value)
