"""Text out of a masked diffusion model: masks are filled in, the most certain first, as in LLaDA.

Pure functions of ``denoise``. This file imports torch and its neighbour only, because copies of both ship inside every
export.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .sampler_plan import SamplerOptions, Vocabulary, plan

Denoise = Callable[[Tensor, "Tensor | None", Tensor], Tensor]
"""``denoise(tokens, lengths, rows) -> logits``.

tokens: [batch, seq] int64; lengths: [batch] int64 on the CPU, real tokens of every row, or None where all are full;
rows: [n] int64, flat indices into [batch * seq] of the positions that are asked for; logits: [n, vocab].
"""


class Step(NamedTuple):
    """What one forward has filled in; tensors are on the CPU."""

    number: int
    """Forwards so far; 0 for the start."""
    tokens: Tensor
    """[batch, seq] int64, [MASK] where nothing is decided; rows that are shorter are padded at the right."""
    lengths: list[int]
    """Real tokens of every row."""
    revealed: Tensor
    """[batch, seq] bool: filled in by this step."""
    confidence: Tensor
    """[batch, seq] fp32: probability of the tokens filled in by this step, 0 elsewhere."""


class Samples(NamedTuple):
    """Finished sequences."""

    tokens: list[list[int]]
    """Every row: the prompt, its masks filled in, and the new tokens; behind the first end-of-document that is new
    there is only end-of-document."""
    prompt_lengths: list[int]
    """Tokens of every row that were given."""
    end_of_document_id: int | None
    forwards: int
    """Calls of ``denoise``."""
    sequence_forwards: int
    """Sequences in all those calls together."""

    @property
    def texts(self) -> list[list[int]]:
        """Every row up to the first new end-of-document, without it."""
        end = self.end_of_document_id
        rows = zip(self.tokens, self.prompt_lengths, strict=True)
        return [row if end is None or end not in row[start:] else row[: row.index(end, start)] for row, start in rows]

    @property
    def continuations(self) -> list[list[int]]:
        """The new tokens behind every prompt, up to end-of-document."""
        return [row[start:] for row, start in zip(self.texts, self.prompt_lengths, strict=True)]


@torch.no_grad()
def sample(
    denoise: Denoise,
    prompts: Sequence[Sequence[int]],
    options: SamplerOptions | None = None,
    *,
    vocabulary: Vocabulary,
    max_new_tokens: int = 0,
    device: torch.device | str = "cpu",
    on_step: Callable[[Step], None] | None = None,
) -> Samples:
    """Fill in the masks of prompts and of ``max_new_tokens`` masks behind each.

    Rows are independent: blocks count a row's own masks from the left, rows of all lengths go through the model
    together, aligned at the left and attending within their lengths, and a finished row is not forwarded again. A row
    is finished when it has no mask, or none before the first end-of-document behind its prompt.

    The algorithm is LLaDA's (arXiv 2502.09992, algorithms 4 and 5); but [MASK] is never a candidate.

    Args:
        denoise: the model; see ``Denoise``.
        prompts: token ids, [MASK] wherever something is to be filled in.
        vocabulary: a row stops at its end-of-document, and what it forbids is never filled in.
        max_new_tokens: masks behind every prompt.
        device: of the tensors that ``denoise`` is given.
        on_step: called with the start, and after every forward.

    Raises:
        ValueError: a prompt without tokens and no new ones, or fewer ``steps`` than blocks.
    """
    options = options or SamplerOptions()
    # Everything about the rows is in `state`; what follows only asks the model and chooses.
    state = _State(prompts, options, vocabulary, max_new_tokens, device)
    forbidden = torch.tensor(vocabulary.unwritten, device=device)
    forwards = sequence_forwards = 0
    if on_step:
        on_step(state.step(0))
    # One forward a turn: ask for the masks of every row's current block, choose a token for each, keep the surest.
    while active := state.unfinished():
        tokens, lengths, rows, counts = state.inputs(active)
        if options.guidance:
            # The prompt hidden: what the model says without having read it.
            without = tokens.masked_fill(state.given[active, : tokens.shape[1]], vocabulary.mask_token_id)
            logits = _guided(denoise, tokens, without, lengths, rows, options.guidance)
        else:
            logits = denoise(tokens, lengths, rows)
        # In fp64, because the most certain of thousands of candidates are compared; [MASK] is never one.
        logits = logits.double().index_fill_(1, forbidden, float("-inf"))
        generators = [state.generators[row] for row in active]
        candidates, probability, confidence = _candidates(logits, counts, options, generators)
        forwards += 1
        sequence_forwards += len(active) * (2 if options.guidance else 1)
        state.fill(active, rows, candidates, probability, confidence)
        if on_step:
            on_step(state.step(forwards))
    return Samples(state.rows(), state.prompt_lengths, vocabulary.end_of_document_id, forwards, sequence_forwards)


def next_token(denoise: Denoise, first_token_id: int) -> Denoise:
    """A causal model as a denoiser: its inputs are the tokens shifted right behind ``first_token_id``, as in training.

    Sample from it with ``block_length=1``. Columns behind the last one that is asked for are left out.
    """

    def shifted(tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        size, seq = tokens.shape
        # What is behind the last position asked for cannot matter to a causal model.
        columns = int((rows % seq).max()) + 1
        first = tokens.new_full((size, 1), first_token_id)
        inputs = torch.cat((first, tokens[:, : columns - 1]), dim=1)
        lengths = None if lengths is None else lengths.clamp(max=columns)
        # The same positions as flat indices into the narrower [batch, columns].
        return denoise(inputs, lengths, rows // seq * columns + rows % seq)

    return shifted


class _State:
    """The rows while they are filled in."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        options: SamplerOptions,
        vocabulary: Vocabulary,
        max_new_tokens: int,
        device: torch.device | str,
    ) -> None:
        self.options = options
        self.end_of_document_id = vocabulary.end_of_document_id
        self.prompt_lengths = [len(prompt) for prompt in prompts]
        self.lengths = [length + max_new_tokens for length in self.prompt_lengths]
        if not prompts or min(self.lengths) == 0:
            raise ValueError("a prompt has no tokens, and no new ones are wanted; give max_new_tokens")
        width = max(self.lengths)
        mask = vocabulary.mask_token_id
        # [batch, seq], prompts at the left; behind a row's own length there is padding, which `inside` leaves out.
        padded = [[*prompt, *[mask] * (width - len(prompt))] for prompt in prompts]
        self.tokens = torch.tensor(padded, dtype=torch.int64, device=device)
        self.size = torch.tensor(self.lengths)
        column = torch.arange(width, device=device)
        inside = column < self.size.to(device)[:, None]
        # `new`: behind the prompt. `masked`: still to be filled in. `given`: what was there from the start.
        self.new = inside & (column >= torch.tensor(self.prompt_lengths, device=device)[:, None])
        self.masked = inside & (self.tokens == mask)
        self.given = inside & ~self.masked
        # [batch, seq]: which block a mask is in, counted over the row's masks, whatever stands between them.
        self.block = (self.masked.cumsum(1) - 1) // min(options.block_length or width, width)
        self.plans = [plan(count, options.steps, options.block_length) for count in self.masked.sum(1).tolist()]
        self.taken = [0] * len(prompts)  # steps of every row
        self.generators = [
            torch.Generator(device).manual_seed(_mixed(options.seed, row)) for row in range(len(prompts))
        ]
        self.revealed = torch.zeros_like(self.masked)
        self.confidence = torch.zeros_like(self.tokens, dtype=torch.float32)

    def unfinished(self) -> list[int]:
        """Rows with a mask, and one before the first new end-of-document."""
        relevant = self.masked  # [batch, seq]
        if self.end_of_document_id is not None:
            # From the first new end-of-document on a row is finished, whatever is still masked there.
            ended = (self.new & (self.tokens == self.end_of_document_id)).cumsum(1) > 0
            relevant = relevant & ~ended
        return relevant.any(1).nonzero().flatten().tolist()

    def inputs(self, active: list[int]) -> tuple[Tensor, Tensor | None, Tensor, list[int]]:
        """The arguments of ``denoise`` for the masks of the rows' current blocks, and how many each row has."""
        size = self.size[active]
        width = int(size.max())  # rows that are finished may have been the longest
        block, masked = self.block[active, :width], self.masked[active, :width]
        # The first block that still has a mask; positions without one count as behind all blocks.
        current = torch.where(masked, block, block.shape[1]).amin(1, keepdim=True)
        wanted = masked & (block == current)
        lengths = None if bool((size == width).all()) else size
        return self.tokens[active, :width], lengths, wanted.flatten().nonzero().flatten(), wanted.sum(1).tolist()

    def fill(
        self, active: list[int], rows: Tensor, candidates: Tensor, probability: Tensor, confidence: Tensor
    ) -> None:
        """Keep the best candidates [n], of the positions ``rows``, of the active rows; the others stay masked."""
        width = int(self.size[active].max())
        # Back from the list of positions to [active, width], to rank within rows; whatever was not asked for is last.
        scores = torch.full((len(active) * width,), float("-inf"), dtype=torch.float64, device=confidence.device)
        scores = scores.index_copy_(0, rows, confidence).view(len(active), width)
        order = scores.argsort(dim=1, descending=True, stable=True)
        if self.options.threshold is None:
            quota = torch.tensor([self.plans[row][self.taken[row]].kept for row in active], device=scores.device)
            best = torch.arange(width, device=scores.device) < quota[:, None]
            keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, best)
        else:
            keep = (scores > self.options.threshold).scatter_(1, order[:, :1], True)  # the best one in any case
        # And to the list again, from there to the places [row, column] in the whole batch.
        keep = keep.flatten()[rows]
        where, column = torch.tensor(active, device=rows.device)[rows[keep] // width], rows[keep] % width
        # Only here do the rows change. `revealed` and `confidence` are of this step alone.
        self.tokens[where, column] = candidates[keep]
        self.masked[where, column] = False
        self.revealed.zero_()[where, column] = True
        self.confidence.zero_()[where, column] = probability[keep].float()
        for row in active:
            self.taken[row] += 1

    def step(self, number: int) -> Step:
        """A copy for the callback."""
        tokens, revealed, confidence = (
            values.to("cpu", copy=True) for values in (self.tokens, self.revealed, self.confidence)
        )
        return Step(number, tokens, self.lengths, revealed, confidence)

    def rows(self) -> list[list[int]]:
        """The finished rows."""
        end = self.end_of_document_id
        # Without padding, and with nothing but the end behind the first new end-of-document.
        rows = [row[:length] for row, length in zip(self.tokens.tolist(), self.lengths, strict=True)]
        for row, start in zip(rows, self.prompt_lengths, strict=True):
            if end is not None and end in row[start:]:
                stop = row.index(end, start)
                row[stop:] = [end] * (len(row) - stop)
        return rows


def _mixed(seed: int, row: int) -> int:
    """The seed of a row's generator: torch's on a CPU keeps the low 32 bits only, so all bits must be in them."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{row}".encode(), digest_size=7).digest(), "big")


def _guided(
    denoise: Denoise, tokens: Tensor, without: Tensor, lengths: Tensor | None, rows: Tensor, guidance: float
) -> Tensor:
    """Logits [n, vocab] fp64 of classifier-free guidance (Nie et al., arXiv 2410.18514).

    The condition that is left out is the prompt: ``without`` is ``tokens`` [batch, seq] with [MASK] in its place.
    """
    both = None if lengths is None else lengths.repeat(2)
    # Both in one forward: the positions of the second half are moved by the size of the first.
    logits = denoise(torch.cat((tokens, without)), both, torch.cat((rows, rows + tokens.numel()))).double()
    conditional, unconditional = logits.chunk(2)
    # With guidance 0 this is the conditional one, with -1 the unconditional one.
    return unconditional + (guidance + 1) * (conditional - unconditional)


def _candidates(
    logits: Tensor, counts: list[int], options: SamplerOptions, generators: list[torch.Generator]
) -> tuple[Tensor, Tensor, Tensor]:
    """A token for every position, its probability, and the confidence in it.

    Args:
        logits: [n, vocab] fp64, -inf where a token is not allowed.
        counts: positions of every row; they add up to n.
        generators: of every row.

    Returns:
        [n] int64, [n] fp64, [n] fp64.
    """
    probabilities = logits.softmax(1)
    if options.temperature == 0:
        candidates = logits.argmax(1)
    else:
        allowed = _nucleus(logits, options)
        # Every row draws from its own generator, so that its text does not depend on the rows beside it.
        noise = torch.cat([_uniform((n, logits.shape[1]), g) for n, g in zip(counts, generators, strict=True)])
        # exp(logit) / (-log u)**T, LLaDA's form of the Gumbel trick, in logarithms: it cannot overflow.
        candidates = (allowed - options.temperature * noise.log_().neg_().log_()).argmax(1)
    # At temperature 1, whatever was drawn: the confidence is the model's own.
    probability = probabilities.gather(1, candidates[:, None])[:, 0]
    if options.remasking == "low_confidence":
        confidence = probability
    elif options.remasking == "margin":
        best = probabilities.topk(2, dim=1).values
        confidence = best[:, 0] - best[:, 1]
    elif options.remasking == "entropy":
        confidence = torch.xlogy(probabilities, probabilities).sum(1)
    else:
        confidence = torch.cat([_uniform((n,), g) for n, g in zip(counts, generators, strict=True)])
    return candidates, probability, confidence


def _nucleus(logits: Tensor, options: SamplerOptions) -> Tensor:
    """The logits, -inf for tokens outside the smallest set of probability ``top_p`` (at the temperature)."""
    if options.top_p == 1:
        return logits
    ordered, order = (logits / options.temperature).softmax(1).sort(dim=1, descending=True)
    # Before adding itself, so that the token that reaches top_p is still inside, and one always is.
    outside = ordered.cumsum(1) - ordered >= options.top_p
    return logits.masked_fill(torch.zeros_like(outside).scatter_(1, order, outside), float("-inf"))


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """fp64 on [0, 1)."""
    return torch.rand(shape, dtype=torch.float64, device=generator.device, generator=generator)
