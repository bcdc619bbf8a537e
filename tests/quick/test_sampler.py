"""The sampler against a plain writing-down of LLaDA's algorithm, and what it promises besides."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_dlm.shipped.sampler import Step, next_token, sample
from megatron_dlm.shipped.sampler_plan import SamplerOptions, Vocabulary, plan

VOCAB, MASK, END = 23, 22, 21
IDS, ENDING = Vocabulary(MASK), Vocabulary(MASK, END)


class Bidirectional:
    """A random function of all tokens of a row and of nothing else; it counts what it is asked."""

    def __init__(self, seed: int = 0, likes: int | None = None, causal: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(VOCAB, 16, generator=generator, dtype=torch.float64)
        self.position = torch.randn(64, 16, generator=generator, dtype=torch.float64)
        self.head = torch.randn(16, VOCAB, generator=generator, dtype=torch.float64)
        self.likes, self.causal = likes, causal
        self.calls: list[tuple[int, int]] = []

    def logits(self, tokens: Tensor) -> Tensor:
        """[seq] -> [seq, vocab]."""
        here = self.embedding[tokens] * self.position[: len(tokens)]
        context = here.cumsum(0) if self.causal else here.sum(0, keepdim=True)
        logits = torch.tanh(context + self.position[: len(tokens)]) @ self.head
        if self.likes is not None:
            logits[:, self.likes] += 30
        return logits

    def __call__(self, tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        size, seq = tokens.shape
        self.calls.append((size, seq))
        lengths = torch.full((size,), seq) if lengths is None else lengths
        full = torch.full((size, seq, VOCAB), float("nan"), dtype=torch.float64)
        for row, length in enumerate(lengths.tolist()):
            full[row, :length] = self.logits(tokens[row, :length])
        found = full.flatten(0, 1)[rows]
        assert not found.isnan().any(), "only real positions are asked for"
        return found


def fill(model: Callable, prompts: list[list[int]], /, new: int = 0, **options) -> list[list[int]]:
    return sample(model, prompts, SamplerOptions(**options), vocabulary=IDS, max_new_tokens=new).tokens


def llada(model: Bidirectional, prompt: list[int], *, steps: int, gen_length: int, block_length: int) -> list[int]:
    """Low-confidence remasking at temperature 0 as the paper has it, for one prompt; [MASK] is no candidate."""
    x = torch.tensor(prompt + [MASK] * gen_length)
    blocks = gen_length // block_length
    for block in range(blocks):
        end = len(prompt) + (block + 1) * block_length
        masks = int((x[:end] == MASK).sum())
        per_block = steps // blocks
        transfer = [masks // per_block + (1 if i < masks % per_block else 0) for i in range(per_block)]
        for count in transfer:
            masked = x == MASK
            logits = model.logits(x)
            logits[:, MASK] = -float("inf")
            x0 = logits.argmax(-1)
            confidence = logits.softmax(-1)[torch.arange(len(x)), x0]
            confidence[end:] = -float("inf")
            confidence = torch.where(masked, confidence, -float("inf"))
            chosen = confidence.topk(count).indices
            x[chosen] = x0[chosen]
    return x.tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("steps", "gen_length", "block_length"),
    [(16, 16, 16), (16, 16, 4), (8, 16, 8), (6, 12, 4), (5, 16, 16), (7, 32, 32)],
)
def test_equals_llada(seed: int, steps: int, gen_length: int, block_length: int) -> None:
    model = Bidirectional(seed)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    expected = [
        llada(model, prompt, steps=steps, gen_length=gen_length, block_length=block_length) for prompt in prompts
    ]
    assert fill(model, prompts, gen_length, steps=steps, block_length=block_length) == expected
    assert len({tuple(row[len(prompt) :]) for row, prompt in zip(expected, prompts, strict=True)}) == 2


@pytest.mark.parametrize("remasking", ["low_confidence", "margin", "entropy", "random"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_those_beside_it(remasking: str, temperature: float) -> None:
    prompts = [[1, 2, 3, 4, 5, 6], [7], [8, MASK, 9, MASK, MASK]]
    options = {"block_length": 4, "remasking": remasking, "temperature": temperature, "seed": 5}
    together = fill(Bidirectional(), prompts, 8, **options)
    assert together[0] == fill(Bidirectional(), prompts[:1], 8, **options)[0]
    assert together[:2] == fill(Bidirectional(), prompts[:2], 8, **options)
    assert all(MASK not in row for row in together)
    for row, prompt in zip(together, prompts, strict=True):
        assert all(token in (given, row[i]) for i, (token, given) in enumerate(zip(row, prompt, strict=False)))
        assert [t for t, p in zip(row, prompt, strict=False) if p != MASK] == [p for p in prompt if p != MASK]


def test_never_writes_a_mask_or_a_forbidden_token() -> None:
    for temperature in (0.0, 2.0):
        model = Bidirectional(likes=MASK)
        assert all(MASK not in row for row in fill(model, [[1], [2, 3]], 10, temperature=temperature))
    rows = sample(Bidirectional(likes=4), [[1]], vocabulary=IDS.forbidding([4]), max_new_tokens=9).tokens
    assert 4 not in rows[0] and MASK not in rows[0]


def test_stops_at_end_of_document_and_leaves_finished_rows_alone() -> None:
    model = Bidirectional(seed=3)
    model.head[:, END] = 0
    model.position[6:] = 0  # the last new token of block 1 ...
    ends = torch.zeros(VOCAB, dtype=torch.float64)
    ends[END] = 100

    def denoise(tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        logits = model(tokens, lengths, rows)
        columns, first = rows % tokens.shape[1], tokens[rows // tokens.shape[1], 0] == 1
        logits[(columns == 5) & first] += ends  # ... of the row that begins with 1 is end-of-document
        return logits

    options = SamplerOptions(block_length=4)
    result = sample(denoise, [[1, 2], [3, 4]], options, vocabulary=ENDING, max_new_tokens=16)
    assert result.tokens[0][5:] == [END] * 13 and END not in result.tokens[0][:5]
    assert result.continuations[0] == result.tokens[0][2:5] and len(result.continuations[1]) == 16
    assert result.texts[0] == result.tokens[0][:5]
    assert result.forwards == 16 and [size for size, _ in model.calls] == [2] * 4 + [1] * 12
    assert result.sequence_forwards == 20
    # An end that was given is no end.
    vocabulary = ENDING.forbidding([END])
    given = sample(Bidirectional(), [[END, MASK, 5]], vocabulary=vocabulary, max_new_tokens=3)
    assert given.forwards == 4 and len(given.texts[0]) == 6 and MASK not in given.texts[0]


def plainly(model: Bidirectional, prompt: list[int], new: int, options: SamplerOptions) -> list[int]:
    """One row by the definitions, slowly: temperature 0, every remasking but random, guidance, steps, an end."""
    row, given = prompt + [MASK] * new, [token != MASK for token in prompt] + [False] * new
    places = [i for i, known in enumerate(given) if not known]
    length = options.block_length or len(places)
    blocks = [places[i : i + length] for i in range(0, len(places), length)]
    total = min(options.steps or len(places), len(places))
    shares = [max(1, total * len(block) // len(places)) for block in blocks]
    for i, block in enumerate(blocks):
        shares[i] += sum(shares) < total and shares[i] < len(block)
    for block, steps in zip(blocks, shares, strict=True):
        for step in range(steps):
            x = torch.tensor(row)
            logits = model.logits(x)
            if options.guidance:
                without = model.logits(torch.where(torch.tensor(given), MASK, x))
                logits = without + (options.guidance + 1) * (logits - without)
            logits[:, MASK] = -float("inf")
            scores = {}
            for i in (i for i in block if row[i] == MASK):
                p = logits[i].softmax(0)
                best, second = p.sort(descending=True).values[:2].tolist()
                entropy = -sum(v * math.log(v) for v in p.tolist() if v > 0)
                measures = {"low_confidence": best, "margin": best - second, "entropy": -entropy}
                scores[i] = measures[options.remasking]
            count = len(block) // steps + (step < len(block) % steps)
            for i in sorted(scores, key=lambda i: (-scores[i], i))[:count]:
                row[i] = int(logits[i].argmax())
            ends = [i for i in range(len(prompt), len(row)) if row[i] == END]
            if ends and MASK not in row[: ends[0]]:
                return row[: ends[0]] + [END] * (len(row) - ends[0])
    return row


@pytest.mark.parametrize("remasking", ["low_confidence", "margin", "entropy"])
@pytest.mark.parametrize("seed", range(12))
def test_equals_the_definitions_row_by_row(remasking: str, seed: int) -> None:
    """Rows of other lengths, masks inside, other steps and blocks, ends at other times; each as if it were alone."""
    choose = random.Random(seed)
    model = Bidirectional(seed)
    model.head[:, END] = model.head[:, choose.randrange(20)] * 1.2  # a token that is written now and then
    prompts = [[choose.choice([MASK, *range(20)]) for _ in range(choose.randrange(1, 9))] for _ in range(4)]
    new, block_length = choose.randrange(3, 12), choose.choice([None, 1, 3, 5])
    steps = choose.choice([None, 20, 40] if block_length == 1 else [None, 7, 9, 20])
    guidance = choose.choice([0.0, 0.7, -1.0])
    options = SamplerOptions(steps=steps, block_length=block_length, remasking=remasking, guidance=guidance)
    result = sample(model, prompts, options, vocabulary=ENDING, max_new_tokens=new)
    assert result.tokens == [plainly(model, prompt, new, options) for prompt in prompts]
    sizes = [size for size, _ in model.calls[: result.forwards]]
    assert sizes == sorted(sizes, reverse=True) and sum(sizes) == result.sequence_forwards


def test_random_remasking_keeps_any_place_and_every_seed_is_its_own() -> None:
    def first(seed: int) -> tuple[int, ...]:
        steps: list[Step] = []
        options = SamplerOptions(remasking="random", seed=seed, steps=4)
        sample(Bidirectional(), [[1]], options, vocabulary=IDS, max_new_tokens=8, on_step=steps.append)
        return tuple(steps[1].revealed[0].nonzero().flatten().tolist())

    kept = [first(seed) for seed in (*range(40), *(4096 * i for i in range(1, 41)))]
    assert len(set(kept)) > 15 and {place for places in kept for place in places} == set(range(1, 9))
    draws = {tuple(fill(Bidirectional(), [[1]], 12, temperature=3.0, seed=4096 * i)[0]) for i in range(20)}
    assert len(draws) == 20


def test_steps_are_divided_by_masks() -> None:
    for masks, steps, forwards in ((33, 33, 33), (40, 40, 40), (40, 20, 20), (100, 50, 50), (33, 2, 2), (33, 99, 33)):
        options = SamplerOptions(steps=steps, block_length=32)
        model = Bidirectional()
        model.position = model.position.repeat(3, 1)
        assert sample(model, [[1]], options, vocabulary=IDS, max_new_tokens=masks).forwards == forwards
        assert len(plan(masks, steps, 32)) == forwards
    with pytest.raises(ValueError, match=r"steps \(1\) must be at least the number of blocks \(2\)"):
        plan(33, 1, 32)


@pytest.mark.parametrize("block_length", [None, 1, 5, 32])
@pytest.mark.parametrize("steps", [None, 40, 50])
def test_the_plan_is_what_the_sampler_does(steps: int | None, block_length: int | None) -> None:
    called: list[int] = []

    def denoise(tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        called.append(len(rows))
        return torch.zeros(len(rows), VOCAB)

    several = [[1, MASK, 2], [3] * 6, [4, MASK, MASK, MASK]]
    for prompts, new in itertools.product(([[1]], several), (0, 1, 7, 37)):
        called.clear()
        seen: list[Step] = []
        options = SamplerOptions(steps=steps, block_length=block_length)
        sample(denoise, prompts, options, vocabulary=IDS, max_new_tokens=new, on_step=seen.append)
        plans = [plan(prompt.count(MASK) + new, steps, block_length) for prompt in prompts]
        asked = [sum(row[i].asked for row in plans if i < len(row)) for i in range(max(map(len, plans)))]
        assert called == asked
        for row, planned in enumerate(plans):
            kept = [int(step.revealed[row].sum()) for step in seen[1 : len(planned) + 1]]
            assert kept == [step.kept for step in planned]


def test_infilling_reads_both_sides_and_changes_nothing_else() -> None:
    prompt = [1, MASK, 3, MASK, MASK, 6]
    row = fill(Bidirectional(), [prompt])[0]
    assert [row[i] for i in (0, 2, 5)] == [1, 3, 6] and MASK not in row and len(row) == 6
    assert row != fill(Bidirectional(), [[1, MASK, 3, MASK, MASK, 7]])[0][:5] + [6]
    steps: list[Step] = []
    options = SamplerOptions(block_length=1)
    sample(Bidirectional(), [prompt], options, vocabulary=IDS, on_step=steps.append)
    assert [step.revealed[0].nonzero().flatten().tolist() for step in steps] == [[], [1], [3], [4]]


def test_steps_report_what_happened() -> None:
    steps: list[Step] = []
    options = SamplerOptions(steps=5, temperature=1.0)
    result = sample(Bidirectional(), [[1, 2], [3]], options, vocabulary=IDS, max_new_tokens=7, on_step=steps.append)
    assert [step.number for step in steps] == list(range(6)) and steps[0].lengths == [9, 8]
    assert [int(step.revealed[0].sum()) for step in steps] == [0, 2, 2, 1, 1, 1]
    for before, step in zip(steps, steps[1:], strict=False):
        changed = before.tokens != step.tokens
        assert torch.equal(changed, step.revealed) and (before.tokens[changed] == MASK).all()
        assert torch.equal(step.confidence > 0, step.revealed) and (step.confidence <= 1).all()
    assert steps[-1].tokens[0].tolist() == result.tokens[0]


def test_threshold_keeps_all_that_are_sure_and_at_least_one() -> None:
    for threshold in (0.0, 0.6, 1.0):
        steps: list[Step] = []
        options = SamplerOptions(threshold=threshold)
        sample(Bidirectional(), [[1, 2, 3]], options, vocabulary=IDS, max_new_tokens=12, on_step=steps.append)
        kept = [step.confidence[0][step.revealed[0]] for step in steps[1:]]
        assert all(len(values) == 1 or (values > threshold).all() for values in kept)
        assert sum(map(len, kept)) == 12
        assert len(kept) == {0.0: 1, 1.0: 12}.get(threshold, len(kept))
    assert 1 < len(kept) <= 12


def test_draws_have_the_softmax_distribution() -> None:
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, -2.0, 9.0], dtype=torch.float64)

    def denoise(tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        return logits.expand(len(rows), -1).clone()

    def counts(**options) -> Tensor:
        settings = SamplerOptions(steps=1, seed=1, **options)
        rows = sample(denoise, [[0]], settings, vocabulary=Vocabulary(5), max_new_tokens=20000).tokens
        return torch.bincount(torch.tensor(rows[0][1:]), minlength=5) / 20000

    for temperature in (0.5, 1.0, 3.0):
        expected = (logits[:5] / temperature).softmax(0)
        assert (counts(temperature=temperature) - expected).abs().max() < 0.012
    warm = counts(temperature=3.0, top_p=0.5)  # the set is that at the temperature: 0.31 and 0.23
    assert (warm[[2, 0]] - (logits[[2, 0]] / 3).softmax(0)).abs().max() < 0.012 and warm[[1, 3, 4]].sum() == 0
    nucleus = counts(temperature=1.0, top_p=0.6)  # the best has 0.54
    expected = logits[[2, 0]].softmax(0)
    assert (nucleus[[2, 0]] - expected).abs().max() < 0.012 and nucleus[[1, 3, 4]].sum() == 0
    assert counts(temperature=1.0, top_p=1e-9)[2] == 1


def test_seeds() -> None:
    def draw(seed: int) -> list[list[int]]:
        return fill(Bidirectional(), [[1, 2], [1, 2]], 12, temperature=1.5, seed=seed)

    assert draw(1) == draw(1) != draw(2)
    assert draw(1)[0] != draw(1)[1], "rows have their own numbers"


def test_guidance() -> None:
    model = Bidirectional()
    asked = []

    def denoise(tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        asked.append(tokens.clone())
        return model(tokens, lengths, rows)

    prompts = [[1, 2, MASK], [3]]
    rows = fill(denoise, prompts, 2, guidance=1.5, steps=1)
    conditional, unconditional = (
        model.logits(torch.tensor([1, 2, MASK, MASK, MASK])),
        model.logits(torch.full((5,), MASK)),
    )
    guided = unconditional + 2.5 * (conditional - unconditional)
    guided[:, MASK] = float("-inf")
    assert rows[0] == [1, 2, *guided.argmax(-1)[2:].tolist()]
    assert [call.shape[0] for call in asked] == [4] and asked[0][2].tolist() == [MASK] * 5
    assert fill(model, prompts, 6, guidance=1e-12) == fill(model, prompts, 6)


def test_causal_models_continue_greedily() -> None:
    model = Bidirectional(causal=True)
    prompts = [[1, 2, 3], [4], []]
    options = SamplerOptions(block_length=1)
    denoise = next_token(model, END)
    result = sample(denoise, prompts, options, vocabulary=ENDING, max_new_tokens=6)
    assert result.forwards <= 6
    for prompt, row in zip(prompts, result.texts, strict=True):
        text = list(prompt)
        for _ in range(6):
            logits = model.logits(torch.tensor([END, *text]))[-1]
            logits[MASK] = float("-inf")
            if (best := int(logits.argmax())) == END:
                break
            text.append(best)
        assert row == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"block_length": 0}, "block_length is 0"),
        ({"remasking": "lowest"}, "remasking 'lowest' is unknown; choose from low_confidence"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"guidance": -2.0}, "guidance is -2.0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": 1.5}, "from 0 to 1"),
        ({"threshold": 0.5, "remasking": "entropy"}, "from -inf to 0"),
        ({"steps": 4, "threshold": 0.5}, "give one of them"),
        ({"threshold": 0.5, "remasking": "random"}, "random remasking"),
        ({"steps": 2, "block_length": 2}, r"steps \(2\) must be at least the number of blocks \(3\)"),
    ],
)
def test_contradictions_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill(Bidirectional(), [[1]], 6, **options)


def test_nothing_to_do() -> None:
    model = Bidirectional()
    assert fill(model, [[1, 2, 3]]) == [[1, 2, 3]] and not model.calls
    with pytest.raises(ValueError, match="has no tokens"):
        fill(model, [[], [1]])
    assert len(fill(model, [[]], 4)[0]) == 4
