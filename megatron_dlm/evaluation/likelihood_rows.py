"""Sums of cross-entropies of masked targets: the rows of many requests go through a model together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_dlm.evaluation.likelihood_masks import Plan
from megatron_dlm.shipped.sampler import Denoise
from megatron_dlm.shipped.sampler_plan import Vocabulary

Tokens = Sequence[int] | np.ndarray
"""[length] token ids."""

# Logits that are held in fp64 at a time.
_CHUNK = 1 << 24


class Unit:
    """Requests with one context, and targets of one length, under the same masks.

    What shows the model the same tokens is one row: a target that is masked throughout, above all, which the one-token
    answers to a question have in common.
    """

    def __init__(self, indices: list[int], context: Tokens, targets: np.ndarray, plan: Plan, hidden_id: int) -> None:
        """
        Args:
            indices: of the requests.
            context: token ids before every target.
            targets: [requests, target] int64.
            plan: the masks.
            hidden_id: stands where a mask hides a token; in no target.
        """
        size = targets.shape[1]
        self.indices, self.context, self.targets, self.plan = indices, context, targets, plan
        self.length = len(context) + size
        # [requests * masks, target]: what the model sees for each pair. Equal ones are one row of the forward.
        shown = np.where(plan.masks, hidden_id, targets[:, None]).reshape(-1, size)
        self.rows, first, row = np.unique(shown, axis=0, return_index=True, return_inverse=True)
        # What is asked for depends on the mask alone, and equal rows have equal masks (no target has [MASK], and causal
        # plans have a single one), so that any of a row's pairs tells.
        self.asked = plan.asked[first % max(len(plan.masks), 1)]
        # Pairs (request, mask), numbered request * masks + mask, in the order of their rows.
        self.pairs = np.argsort(row.reshape(-1), kind="stable")
        self.row_of_pair = row.reshape(-1)[self.pairs]
        self._sums = np.zeros(len(shown))
        self._best = np.ones(len(shown), dtype=bool)

    @property
    def sums(self) -> np.ndarray:
        """[requests, masks] fp64: sums of the cross-entropies of the tokens that are asked for, nats."""
        return self._sums.reshape(len(self.indices), len(self.plan.masks))

    @property
    def best(self) -> np.ndarray:
        """[requests, masks] bool: whether all those tokens have the largest logit."""
        return self._best.reshape(len(self.indices), len(self.plan.masks))

    def put(self, pairs: np.ndarray, sums: np.ndarray, best: np.ndarray) -> None:
        """Set the values of some pairs."""
        self._sums[pairs], self._best[pairs] = sums, best


class Part(NamedTuple):
    """Some rows of a unit."""

    unit: Unit
    start: int
    stop: int


class RowScorer:
    """Sends units through ``denoise``."""

    def __init__(
        self,
        denoise: Denoise,
        *,
        tokens_per_batch: int,
        device: torch.device | str,
        vocabulary: Vocabulary,
        guidance: float = 0.0,
        finds_best: bool = False,
    ) -> None:
        """
        Args:
            denoise: see ``Denoise``.
            tokens_per_batch: of one forward, padding included; but at least one row.
            device: of the tensors that ``denoise`` is given.
            vocabulary: of the model, which may have fewer ids.
            guidance: see ``LikelihoodOptions``; the context is left out by masking it.
            finds_best: find the largest logit of the ids that may be written; else all are ``best``.
        """
        self.denoise = denoise
        self.tokens_per_batch = tokens_per_batch
        self.device = device
        self.guidance = guidance
        self.vocabulary = vocabulary
        self.finds_best = finds_best

    def rows_per_batch(self, length: int) -> int:
        """How many rows of so many tokens go together."""
        return max(self.tokens_per_batch // (length * (2 if self.guidance else 1)), 1)

    def finish(self, units: Iterable[Unit]) -> Iterator[Unit]:
        """Fill in the sums of the units, and yield each when it is done, in their order.

        Give the longest first: a forward then pads little, and memory that does not suffice shows at once.
        """
        # Parts are gathered until a batch is full at the width of its longest row; a unit may be divided between two.
        parts: list[Part] = []
        width = rows = 0
        for unit in units:
            start = 0
            while start < len(unit.rows):
                width = max(width, unit.length)
                # A wider unit makes the rows that already wait wider too: what is left may then be less than nothing.
                room = self.rows_per_batch(width) - rows
                if room < 1:
                    yield from self._run(parts)
                    parts, width, rows = [], 0, 0
                    continue
                stop = min(start + room, len(unit.rows))
                parts.append(Part(unit, start, stop))
                rows += stop - start
                start = stop
            if len(unit.rows) == 0:  # nothing is masked, so nothing is asked; it is done when its turn comes
                parts.append(Part(unit, 0, 0))
        yield from self._run(parts)

    def _run(self, parts: list[Part]) -> Iterator[Unit]:
        """Score the parts in one forward; yield the units that end with them."""
        self._score(parts)
        yield from (part.unit for part in parts if part.stop == len(part.unit.rows))

    def _score(self, parts: list[Part]) -> None:
        """Score the rows of all parts as one batch, and put the sums where they belong."""
        parts = [part for part in parts if part.stop > part.start]
        if not parts:
            return
        # The rows of all parts, under one another and filled up to the right: what the model is fed.
        size, width = sum(part.stop - part.start for part in parts), max(part.unit.length for part in parts)
        tokens = np.zeros((size, width), dtype=np.int64)
        given, asked = np.zeros((2, size, width), dtype=bool)
        lengths = np.zeros(size, dtype=np.int64)
        begin = 0
        for unit, start, stop in parts:
            here, first = slice(begin, begin + stop - start), len(unit.context)
            tokens[here, :first], given[here, :first] = unit.context, True
            tokens[here, first : unit.length], asked[here, first : unit.length] = (
                unit.rows[start:stop],
                unit.asked[start:stop],
            )
            lengths[here] = unit.length
            begin += stop - start
        # The model gives logits only of the positions asked for, numbered here in row-major order. Every pair of a
        # part then looks up its own tokens: several pairs of one row want different targets at the same positions.
        number = (asked.cumsum() - 1).reshape(asked.shape)
        index, wanted, owners = [], [], []
        begin = 0
        for unit, start, stop in parts:
            low, high = np.searchsorted(unit.row_of_pair, [start, stop])
            pairs, row = unit.pairs[low:high], unit.row_of_pair[low:high]
            picked = unit.asked[row]
            index.append(number[begin + row - start, len(unit.context) : unit.length][picked])
            wanted.append(unit.targets[pairs // len(unit.plan.masks)][picked])
            owners.append((unit, pairs, picked.sum(1)))
            begin += stop - start
        losses, best = self._cross_entropies(
            tokens, lengths, given, np.flatnonzero(asked), np.concatenate(index), np.concatenate(wanted)
        )
        # The losses lie one pair after the other; add up each pair's.
        begin = 0
        for unit, pairs, counts in owners:
            owner, here = np.repeat(np.arange(len(pairs)), counts), slice(begin, begin + int(counts.sum()))
            sums = np.bincount(owner, weights=losses[here], minlength=len(pairs))
            misses = np.bincount(owner, weights=~best[here], minlength=len(pairs))
            unit.put(pairs, sums, misses == 0)
            begin += int(counts.sum())

    def _cross_entropies(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        given: np.ndarray,
        rows: np.ndarray,
        index: np.ndarray,
        wanted: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """One forward, and -log softmax(logits[index])[wanted].

        Args:
            tokens: [batch, seq] int64.
            lengths: [batch] int64.
            given: [batch, seq] bool, the context.
            rows: [n] int64, flat indices of the positions asked for.
            index: [m] int64, into ``rows``; several tokens may be wanted at one position.
            wanted: [m] int64, token ids.

        Returns:
            [m] fp64, nats, and [m] bool: whether the token has the largest logit.
        """
        inputs, asked = torch.from_numpy(tokens), torch.from_numpy(rows)
        sizes = None if (lengths == tokens.shape[1]).all() else torch.from_numpy(lengths)
        guided = self.guidance != 0 and bool(given.any())
        if guided:
            # The same rows once more without their context; their logits are the second half of what comes back.
            without = inputs.masked_fill(torch.from_numpy(given), self.vocabulary.mask_token_id)
            asked = torch.cat((asked, asked + inputs.numel()))
            inputs = torch.cat((inputs, without))
            sizes = None if sizes is None else sizes.repeat(2)
        with torch.no_grad():
            logits = self.denoise(inputs.to(self.device), sizes, asked.to(self.device))
            # In chunks of logits, because [n, vocab] in fp64 may not fit: those that want a chunk are found by order.
            order = np.argsort(index, kind="stable")
            losses, best = np.empty(len(index)), np.ones(len(index), dtype=bool)
            step = max(_CHUNK // logits.shape[1], 1)
            for start in range(0, len(rows), step):
                chunk = logits[start : min(start + step, len(rows))].double()
                if guided:
                    chunk = self._guide(chunk, logits[len(rows) + start :][: len(chunk)].double())
                low, high = np.searchsorted(index, [start, start + step], sorter=order)
                here = order[low:high]
                at, ids = (torch.from_numpy(v[here]).to(chunk.device) for v in (index - start, wanted))
                # -log softmax at the wanted ids only; no second [n, vocab] is made.
                losses[here] = (chunk.logsumexp(1)[at] - chunk[at, ids]).cpu().numpy()
                if self.finds_best:
                    # A tokenizer can have more ids than an imported model has logits.
                    ids_there = [i for i in self.vocabulary.unwritten if i < chunk.shape[1]]
                    forbidden = torch.tensor(ids_there, dtype=torch.int64, device=chunk.device)
                    candidates = chunk.index_fill(1, forbidden, float("-inf")).argmax(1)
                    best[here] = (candidates[at] == ids).cpu().numpy()
        if np.isnan(losses).any():
            raise ValueError("the model gives NaN for a likelihood; check its weights, or use a wider number format")
        return losses, best

    def _guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """[n, vocab] fp64; a token that is impossible without the context stays so, where the formula has no value."""
        guided = unconditional + (self.guidance + 1) * (conditional - unconditional)
        return guided.masked_fill_(unconditional == float("-inf"), float("-inf"))
