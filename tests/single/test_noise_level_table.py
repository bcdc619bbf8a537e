"""Loss by noise level: against enumeration, its masks, pairwise differences, the figure and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dlm import cli
from megatron_dlm.config.kinds import AUTOREGRESSIVE
from megatron_dlm.data.tokenizer import ByteTokenizer
from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.evaluation.noise_level_report import format_tables
from megatron_dlm.evaluation.noise_level_table import NoiseLevelTable, compare, noise_level_table
from megatron_dlm.evaluation.progress import collect
from megatron_dlm.figures.noise_levels import draw
from megatron_dlm.generation.text_model import TextModel, open_text_model
from tests.exports import make_checkpoint
from tests.single.test_text_nelbo import SEQ, VOCAB, Letters, Tiny, random_texts, tiny_model, write_documents

MASK = 257


def measured(*arguments: Any, **options: Any) -> NoiseLevelTable:
    (table,) = collect(noise_level_table(*arguments, **options))
    return table


class Bytes:
    """Random logits of every position from the sum over what is visible; it keeps what it is given."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(258, 16, generator=generator, dtype=torch.float64)
        self.head = torch.randn(16, 258, generator=generator, dtype=torch.float64)
        self.seen: list[list[int]] = []

    def __call__(self, tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        self.seen += tokens.tolist()
        assert lengths is None and set(tokens.flatten()[rows].tolist()) == {MASK}
        hidden = torch.tanh(self.embedding[tokens].cumsum(1) / 3)
        return (hidden @ self.head).flatten(0, 1)[rows]


def bytes_model(seed: int = 0, max_length: int = 20) -> tuple[TextModel, Bytes]:
    denoise = Bytes(seed)
    return tiny_model(denoise, tokenizer=ByteTokenizer(), max_length=max_length, name=f"bytes {seed}"), denoise


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """47 full windows of 20 tokens, and a shorter one."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"line {number} of the text\n" for number in range(60))[:950])
    return str(file)


def table_of(cross_entropies: np.ndarray, masked: list[int], length: int) -> NoiseLevelTable:
    """A table of given numbers; all tokens are predicted."""
    ones = np.ones_like(cross_entropies)
    return NoiseLevelTable("model", "text", length, np.array(masked), cross_entropies, ones, "masks")


def test_the_average_over_all_counts_is_the_enumerated_bound(tmp_path: Path) -> None:
    """CE(k) is what k masked tokens cost on average, so that NELBO per token = mean over k of CE(k)."""
    texts, model = random_texts(5, 1500), Tiny()
    source = write_documents(tmp_path / "a.jsonl", texts)
    bounds = {text: model.bound([*Letters().encode(text), 3]) / SEQ for text in set(texts)}
    levels = [k / SEQ for k in range(1, SEQ + 1)]
    table = measured(tiny_model(model), source, levels=levels, windows=1500)
    assert table.windows == 1500 and table.masked.tolist() == [1, 2, 3, 4, 5]
    per_window = table.cross_entropies.mean(0)
    assert table.nelbo.value == pytest.approx(per_window.mean(), rel=1e-12)
    errors = per_window - [bounds[text] for text in texts]
    error = errors.std(ddof=1) / math.sqrt(1500)
    assert abs(errors.mean()) < 3 * error < 0.02 * table.nelbo.value
    # With all five masked there is one mask.
    exact = [F.cross_entropy(all_masked(model), torch.tensor([*Letters().encode(text), 3])) for text in texts]
    assert table.cross_entropies[4] == pytest.approx(np.array(exact), rel=1e-12)


def all_masked(model: Tiny) -> Tensor:
    return model(torch.full((1, SEQ), VOCAB - 1), None, torch.arange(SEQ))


def test_a_model_that_counts_has_the_bound_without_error(tmp_path: Path) -> None:
    """Where the cross-entropy depends on the number of masks alone, the mean over the counts is the bound itself."""

    class Counting(Tiny):
        def __call__(self, tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
            logits = torch.zeros(*tokens.shape, VOCAB, dtype=torch.float64)
            logits[..., 3:] = (tokens == VOCAB - 1).sum(1).double()[:, None, None]
            return logits.flatten(0, 1)[rows]

    model, source = Counting(), write_documents(tmp_path / "a.jsonl", ["abcabc"])
    bound = model.bound([0, 1, 2, 0, 1]) / SEQ
    assert bound == pytest.approx(sum(math.log(3 + 2 * math.exp(k)) for k in range(1, SEQ + 1)) / SEQ, rel=1e-12)
    for levels in (5, [k / SEQ for k in range(1, SEQ + 1)]):
        table = measured(tiny_model(model), source, levels=levels)
        assert table.masked.tolist() == [1, 2, 3, 4, 5] and table.windows == 1
        assert table.nelbo.value == pytest.approx(bound, rel=1e-12) and table.nelbo.standard_error == math.inf


def test_levels_stand_for_the_noise_around_them() -> None:
    """The mean over noise levels of a straight line comes out of any number of evenly spread levels."""
    line = np.arange(1, 129) - 0.5
    for masked in (list(range(1, 129)), [7, 20, 32, 45, 58, 71, 84, 96, 109, 122], [64], [3, 126]):
        table = table_of(line[np.array(masked) - 1][:, None] + np.array([[-1.0, 1.0]]), masked, 128)
        assert table.nelbo.value == pytest.approx(64, rel=0.01)
        assert table.nelbo.standard_error == pytest.approx(1.0)
    uneven = table_of(np.array([[0.0], [8.0]]), [1, 2], 8)
    assert uneven.nelbo.value == 8 * 7 / 8, "count 1 stands for an eighth, count 2 for the rest"


def test_masks_are_nested_and_the_same_for_every_model(text: str) -> None:
    (first, seen), (second, others) = bytes_model(0), bytes_model(1)
    table = measured(first, text, windows=12)
    again = measured(second, text, windows=12, tokens_per_batch=60)
    assert seen.seen == others.seen and table.masks == again.masks
    assert table.masked.tolist() == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]
    rows = np.array(seen.seen).reshape(12, 10, 20)
    hidden = rows == MASK
    assert (hidden.sum(2) == table.masked).all()
    assert (hidden[:, 1:] >= hidden[:, :-1]).all(), "what is masked at a ratio is masked at a larger one"
    assert len({mask.tobytes() for mask in hidden[:, 5]}) == 12, "windows have masks of their own"
    assert abs(hidden[:, 4].mean(0) - 0.45).max() < 0.45, "no position is always masked"
    # The windows are full ones, spread over the text.
    tokens = [*Path(text).read_bytes()]
    assert len(tokens) == 950
    found = [min(start for start in range(0, 940, 20) if fits(row, tokens[start : start + 20])) for row in rows[:, 0]]
    assert found == [(2 * i + 1) * 47 // 24 * 20 for i in range(12)]
    assert measured(first, text, windows=12, seed=1).masks != table.masks
    assert measured(first, text, windows=100).windows == 47


def fits(row: np.ndarray, tokens: list[int]) -> bool:
    return bool(((row == MASK) | (row == tokens)).all())


def test_equals_the_direct_means_whatever_the_batches(text: str) -> None:
    model, denoise = bytes_model()
    table = measured(model, text, windows=5, levels=[0.3, 1.0])
    assert table.masked.tolist() == [6, 20]
    tokens = torch.tensor(list(Path(text).read_bytes()))
    rows = torch.tensor(denoise.seen)
    for index, row in enumerate(rows):
        window, level = divmod(index, 2)
        at = (2 * window + 1) * 47 // 10 * 20
        mask = row == MASK
        logits = denoise(row[None], None, mask.nonzero()[:, 0])
        wanted = tokens[at : at + 20][mask]
        assert table.cross_entropies[level, window] == pytest.approx(float(F.cross_entropy(logits, wanted)), rel=1e-12)
        assert table.accuracies[level, window] == float((logits.argmax(1) == wanted).double().mean())
    for tokens_per_batch in (1, 70):
        again = measured(model, text, windows=5, levels=[1.0, 0.3, 0.3], tokens_per_batch=tokens_per_batch)
        assert again.cross_entropies == pytest.approx(table.cross_entropies, rel=1e-12)
        assert (again.accuracies == table.accuracies).all() and again.masks == table.masks
    (low, high) = table.rows
    assert (low.mask_ratio, high.mask_ratio) == (0.3, 1.0)
    assert low.cross_entropy.value == pytest.approx(table.cross_entropies[0].mean())
    assert low.cross_entropy.standard_error == pytest.approx(table.cross_entropies[0].std(ddof=1) / math.sqrt(5))


def test_differences_are_of_pairs(text: str) -> None:
    model, _ = bytes_model()
    first = measured(model, text, windows=30)
    nearly, denoise = bytes_model()
    denoise.head = denoise.head * 0.95
    second = measured(nearly, text, windows=30)
    difference = compare(first, second)
    assert difference.nelbo.value == pytest.approx(second.nelbo.value - first.nelbo.value)
    assert difference.nelbo.standard_error < 0.3 * first.nelbo.standard_error, "common noise cancels"
    for low, high, row in zip(first.rows, second.rows, difference.rows, strict=True):
        assert row.cross_entropy.value == pytest.approx(high.cross_entropy.value - low.cross_entropy.value)
        assert row.accuracy.value == pytest.approx(high.accuracy.value - low.accuracy.value)
    same = compare(first, first)
    assert same.nelbo == (0.0, 0.0) and not same.accuracies.any()
    for other in ({"seed": 1}, {"windows": 29}, {"levels": 9}, {"length": 19}):
        with pytest.raises(ConfigError, match="not measured on the same tokens under the same masks"):
            compare(first, measured(model, text, **({"windows": 30} | other)))


def test_a_text_of_less_than_one_window(tmp_path: Path) -> None:
    model, _ = bytes_model()
    (tmp_path / "short.txt").write_text("short")
    table = measured(model, str(tmp_path / "short.txt"))
    assert (table.length, table.windows, table.masked.tolist()) == (6, 1, [1, 2, 3, 4, 5, 6])
    content = json.loads(json.dumps(table.as_dict(), allow_nan=False))
    assert content["levels"][0]["cross_entropy_standard_error"] is None and content["levels"][5]["mask_ratio"] == 1
    draw([table], tmp_path / "figure.svg")
    assert "inf" in format_tables([table])


def test_the_printed_table() -> None:
    losses = np.array([[1.0, 2.0], [3.0, 5.0]])
    first = table_of(losses, [2, 7], 8)
    second = replace(first, cross_entropies=losses - [[0.5, 0.5], [1.0, 0.0]], accuracies=first.accuracies / 2)
    lines = format_tables([first]).splitlines()
    assert lines[0].split() == ["mask", "ratio", "masked", "nats/masked", "token", "accuracy"]
    assert lines[1].split() == "0.250 2/8 1.500 +- 0.500 100.0 +- 0.0 %".split()
    assert lines[4].split() == "average = NELBO 2.750 +- 0.750".split()
    assert len({line.index("+-") for line in lines[1:3]}) == 1, "aligned"
    both = format_tables([first, second]).splitlines()
    assert both[2].split() == "0.875 7/8 4.000 +- 1.000 3.500 +- 1.500 -0.500 +- 0.500".split() + (
        "100.0 +- 0.0 % 50.0 +- 0.0 % -50.0 +- 0.0 %".split()
    )


def test_bad_arguments_are_refused_in_one_line(text: str) -> None:
    model, denoise = bytes_model()
    for arguments, said in (
        ({"levels": 0}, "levels is 0"),
        ({"levels": []}, "levels has no mask ratio"),
        ({"levels": [0.5, 0.0]}, "levels has 0.0; give ratios above 0"),
        ({"levels": [math.nan]}, "levels has nan"),
        ({"windows": 0}, "windows is 0; it must be at least 1"),
        ({"length": 21}, "length is 21; it must be from 1 to 20"),
        ({"seed": 2**64}, "seed is"),
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0"),
    ):
        with pytest.raises(ConfigError) as refused:
            measured(model, text, **arguments)
        assert said in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="bytes 0 is autoregressive and has no noise levels; give a masked"):
        measured(model._replace(kind=AUTOREGRESSIVE), text)
    denoise.head *= math.nan
    with pytest.raises(ConfigError, match="gives NaN"):
        measured(model, text)


def test_a_figure_that_cannot_be_written_leaves_the_old_one(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = measured(bytes_model()[0], text, windows=4)
    output = tmp_path / "figure.png"
    draw([table], output)
    before = output.read_bytes()
    assert before.startswith(b"\x89PNG")

    def full(self: Any, path: Path, **kwargs: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", full)
    with pytest.raises(DataError, match="No space left on device; choose another file"):
        draw([table], output)
    assert output.read_bytes() == before and list(tmp_path.iterdir()) == [output]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    kinds: dict[str, Any] = {
        "first": {},
        "shorter": {"sequence_length": 32, "num_layers": 1},
        "ar": {"objective": "autoregressive"},
    }
    return {name: str(make_checkpoint(folder / name, **keys)) for name, keys in kinds.items()}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return lambda *arguments: cli.main(["noise-levels", *arguments])


def test_the_command_compares_two_models(
    checkpoints: dict[str, str], text: str, command: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pair = ["--checkpoint", checkpoints["first"], "--checkpoint", checkpoints["shorter"], "--data", text]
    assert command(*pair, "--windows", "6", "--levels", "0.2,0.9", "--json", "t.json", "--output", "f.png") == 0
    printed = capsys.readouterr().out
    assert f"model A   {checkpoints['first']}\n" in printed and f"model B   {checkpoints['shorter']}\n" in printed
    assert "6 windows of 32 tokens" in printed, "of the shorter model"
    content = json.loads((tmp_path / "t.json").read_text())
    assert set(content) == {"first", "second", "difference"} and len(content["second"]["levels"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.png", "t.json"]
    # A second model beside it changes nothing.
    alone = measured(open_text_model(checkpoints["first"]), text, windows=6, levels=[0.2, 0.9], length=32)
    assert content["first"]["nelbo"] == alone.nelbo.value
    assert content["difference"]["nelbo"] == pytest.approx(content["second"]["nelbo"] - content["first"]["nelbo"])
    assert f"{alone.rows[1].cross_entropy.value:.3f} +- " in printed
    assert command("--checkpoint", checkpoints["shorter"], "--data", text, "--windows", "6", "--levels", "2") == 0
    assert "model     " in (printed := capsys.readouterr().out) and "8/32" in printed and "24/32" in printed


def test_the_command_refuses_in_one_line(
    checkpoints: dict[str, str], text: str, command: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, ar = ["--checkpoint", checkpoints["first"]], ["--checkpoint", checkpoints["ar"]]
    data = ["--data", text]
    (tmp_path / "folder").mkdir()
    for arguments, said in (
        ([*ar, *data], "is autoregressive and has no noise levels"),
        ([*model, *ar, *data], "is autoregressive and has no noise levels"),
        ([*model, *model, *model, *data], "--checkpoint is given 3 times"),
        ([*model, "--data", "nothing"], "the text nothing does not exist"),
        (["--checkpoint", "nothing", *data], "nothing is no directory"),
        ([*model, *data, "--levels", "some"], "--levels is 'some'; give a number of levels"),
        ([*model, *data, "--levels", "-3"], "levels is -3"),
        ([*model, *data, "--output", "figure.txt"], "--output figure.txt is no figure"),
        ([*model, *data, "--json", "no/t.json"], "no is no directory; make it first"),
        ([*model, *data, "--json", "folder"], "it is a directory"),
        ([*model, *data, "--json", "x.png", "--output", "x.png"], "--json and --output are both x.png"),
    ):
        assert command(*arguments) == 2
        printed = capsys.readouterr()
        assert said in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
