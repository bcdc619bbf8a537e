"""Loss by noise level: how well a masked diffusion model predicts masked tokens, by how many of them are masked.

With CE(k) the mean cross-entropy of a masked token when exactly k of a window's L tokens are masked, any k of them
equally likely, the bound of the likelihood is

    NELBO per token = mean over k = 1..L of CE(k)

(the weight L/k of a mask, the sum of its k cross-entropies and the division by L tokens make CE(k)). So the plain
average of the curve over the mask ratio is the NELBO: the curve shows which noise levels it comes from.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from dlm_kernels.philox import MASK32, TOKEN_POSITION_BITS, Stream, random_bits, token_counter
from megatron_dlm.errors import ConfigError
from megatron_dlm.evaluation.likelihood_masks import TOKENS_PER_BATCH
from megatron_dlm.evaluation.progress import Finished
from megatron_dlm.evaluation.text_nelbo import check_ids, read_windows
from megatron_dlm.generation.text_model import TextModel

# Of Stream.SAMPLING; the masks of likelihoods draw below 2**31.
_DRAW = MASK32
# Logits that are held in fp64 at a time.
_CHUNK = 1 << 24


class Estimate(NamedTuple):
    """A mean over windows."""

    value: float
    standard_error: float
    """Infinite with one window."""


class Row(NamedTuple):
    """One noise level, of one model or of the difference of two."""

    mask_ratio: float
    masked: int
    """Tokens of every window."""
    cross_entropy: Estimate
    """Nats per masked token."""
    accuracy: Estimate
    """Share of the masked tokens whose logit is the largest of all columns, [MASK]'s included, as in training."""


@dataclass(frozen=True)
class NoiseLevelTable:
    """Cross-entropy and accuracy by mask ratio; of a difference, those of the second model less those of the first."""

    name: str
    """Of the model, for people."""
    source: str
    length: int
    """Tokens of a window."""
    masked: np.ndarray
    """[levels] int64, ascending: tokens that are masked in every window."""
    cross_entropies: np.ndarray
    """[levels, windows] fp64: mean over the masked tokens, nats."""
    accuracies: np.ndarray
    """[levels, windows] fp64."""
    masks: str
    """Digest of the windows and their masks: only tables that agree in it can be compared."""

    @property
    def windows(self) -> int:
        return self.cross_entropies.shape[1]

    @property
    def rows(self) -> list[Row]:
        """The levels, the least noise first."""
        columns = zip(self.masked.tolist(), self.cross_entropies, self.accuracies, strict=True)
        return [Row(k / self.length, k, _mean(losses), _mean(hits)) for k, losses, hits in columns]

    @property
    def nelbo(self) -> Estimate:
        """Average of the cross-entropy over the mask ratio, nats per token.

        Every count 1..L takes the value of the nearest level. With all of them it is the NELBO, else close to it; the
        error is that of the levels that were measured, windows being the units. For the figure alone ``text_nelbo``
        has the smaller error.
        """
        return _mean(self._shares @ self.cross_entropies)

    @property
    def _shares(self) -> np.ndarray:
        """[levels]: of the noise; count k stands for the ratios from (k - 1)/L to k/L."""
        # Each level takes the counts that are nearer to it than to its neighbours: up to the middle between two.
        centres = (self.masked - 0.5) / self.length
        return np.diff(np.concatenate([[0.0], (centres[1:] + centres[:-1]) / 2, [1.0]]))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what is not known or not finite is None."""

        def finite(estimate: Estimate) -> list[float | None]:
            return [float(value) if math.isfinite(value) else None for value in estimate]

        levels = []
        for row in self.rows:
            (loss, loss_error), (accuracy, accuracy_error) = finite(row.cross_entropy), finite(row.accuracy)
            levels.append(
                {
                    "mask_ratio": row.mask_ratio,
                    "masked": row.masked,
                    "cross_entropy": loss,
                    "cross_entropy_standard_error": loss_error,
                    "accuracy": accuracy,
                    "accuracy_standard_error": accuracy_error,
                }
            )
        nelbo, nelbo_error = finite(self.nelbo)
        return {
            "model": self.name,
            "data": self.source,
            "window_tokens": self.length,
            "windows": self.windows,
            "nelbo": nelbo,
            "nelbo_standard_error": nelbo_error,
            "levels": levels,
        }


def noise_level_table(
    model: TextModel,
    source: str,
    *,
    levels: int | Sequence[float] = 10,
    windows: int = 64,
    length: int | None = None,
    seed: int = 0,
    limit_tokens: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Iterator[Finished[NoiseLevelTable]]:
    """Measure a masked diffusion model; the table comes last, as number 0.

    Every rank of the model's layout must call it with the same arguments.

    A level of ratio r masks k = ceil(r L) of the L tokens of every window, those with the k smallest keys. A key is a
    function of (seed, window, position), so that the masks of one window are nested, and the same for every model.

    Args:
        source: see ``read_windows``; of its full windows (or the only one) so many are taken, evenly spread.
        levels: mask ratios above 0, at most 1; or so many in the middles of equal parts, 0.05, 0.15, ... for 10. Levels
            that mask as many tokens are one.
        windows: at most; fewer where the text is short.
        length: tokens of a window, at most the model's; None: as many.
        seed: 64 bits.
        limit_tokens: read only the first ones of the text; None: all.
        tokens_per_batch: of one forward; but at least one window. It changes the result by rounding only.

    Raises:
        ConfigError: the model is autoregressive, an argument is out of range, or the model gives NaN; one line.
        DataError: as ``read_windows``.
    """
    check_model(model)
    ratios = _ratios(levels)
    length = model.max_length if length is None else length
    for name, value in (("windows", windows), ("tokens_per_batch", tokens_per_batch)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if not 1 <= length <= model.max_length:
        raise ConfigError(f"length is {length}; it must be from 1 to {model.max_length}, as {model.name} has it")
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed is {seed}; it must be at least 0 and below 2**64")
    text = read_windows(source, model.tokenizer, length, limit_tokens=limit_tokens)
    length = min(length, len(text.tokens))
    # Window i of n is the one in the middle of the i-th of n equal parts of the text.
    full = len(text.tokens) // length
    chosen = (2 * np.arange(min(windows, full)) + 1) * full // (2 * min(windows, full))
    tokens = np.stack([text.tokens[at : at + length] for at in (chosen * length).tolist()]).astype(np.int64)
    check_ids(tokens, source, model.vocabulary)
    # Ratios such as 0.55 * 20 come out just above the whole number that they are.
    masked = np.unique(np.ceil(np.array(ratios) * length - 1e-6).astype(np.int64).clip(1, length))
    # A token's rank among the keys of its window: ranks below k are masked. Positions decide between equal keys.
    keys = random_bits(seed, Stream.SAMPLING, token_counter(chosen[:, None], np.arange(length)), _DRAW)
    ranks = (keys << TOKEN_POSITION_BITS | np.arange(length)).argsort(1).argsort(1)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in (tokens, ranks, masked))).hexdigest()
    found: dict[int, tuple[float, float]] = {}
    for part in _measure(model, tokens, ranks, masked, tokens_per_batch):
        found |= part.results
        yield Finished({}, part.share)
    # [windows * levels, 2] becomes two of [levels, windows].
    by_row = np.array([found[number] for number in range(len(found))])
    losses, correct = (column.reshape(-1, len(masked)).T for column in np.ascontiguousarray(by_row.T))
    yield Finished({0: NoiseLevelTable(model.name, source, length, masked, losses, correct, digest)}, 1.0)


def check_model(model: TextModel) -> None:
    """Raises ConfigError, in one line, for a model that has no noise levels."""
    if model.kind.causal:
        raise ConfigError(f"{model.name} is autoregressive and has no noise levels; give a masked diffusion model")


def compare(first: NoiseLevelTable, second: NoiseLevelTable) -> NoiseLevelTable:
    """``second`` less ``first``, window by window: the errors are those of paired differences.

    Raises:
        ConfigError: they are not of the same tokens under the same masks.
    """
    if first.masks != second.masks:
        raise ConfigError(
            f"{first.name} and {second.name} were not measured on the same tokens under the same masks; measure both "
            "on one text with one tokenizer, and with the same seed, window length, windows and levels"
        )
    return NoiseLevelTable(
        f"{second.name} less {first.name}",
        first.source,
        first.length,
        first.masked,
        second.cross_entropies - first.cross_entropies,
        second.accuracies - first.accuracies,
        first.masks,
    )


def _ratios(levels: int | Sequence[float]) -> list[float]:
    if isinstance(levels, int):
        if levels < 1:
            raise ConfigError(f"levels is {levels}; it must be at least 1, or a list of mask ratios")
        return [(i + 0.5) / levels for i in range(levels)]
    ratios = list(levels)
    wrong = [ratio for ratio in ratios if not 0 < ratio <= 1]
    if wrong or not ratios:
        raise ConfigError(f"levels has {wrong[0] if wrong else 'no mask ratio'}; give ratios above 0, at most 1")
    return ratios


def _measure(
    model: TextModel, tokens: np.ndarray, ranks: np.ndarray, masked: np.ndarray, tokens_per_batch: int
) -> Iterator[Finished[tuple[float, float]]]:
    """Mean cross-entropy (nats) and accuracy of the masked tokens of every row.

    Row i is window i // levels at level i % levels; as many rows as fit go through the model together.

    Args:
        tokens: [windows, length] int64.
        ranks: [windows, length] int64: the tokens with the smallest are masked.
        masked: [levels] int64.
    """
    total, length = len(tokens) * len(masked), tokens.shape[1]
    step = max(tokens_per_batch // length, 1)
    for start in range(0, total, step):
        numbers = np.arange(start, min(start + step, total))
        window, level = np.divmod(numbers, len(masked))
        # [rows, length]: of a window's levels each masks what the one before does, and more.
        hidden = ranks[window] < masked[level, None]
        rows = np.flatnonzero(hidden)  # of [batch * length]
        inputs = np.where(hidden, model.vocabulary.mask_token_id, tokens[window])
        losses, best = _score(model, inputs, rows, tokens[window].reshape(-1)[rows])
        # Sums over the masked tokens of each row of the batch, whose number is that of the flat index by the length.
        owner = rows // length
        means = (np.bincount(owner, values, len(numbers)) / masked[level] for values in (losses, best))
        found = dict(zip(numbers.tolist(), zip(*(mean.tolist() for mean in means), strict=True), strict=True))
        if any(math.isnan(loss) for loss, _ in found.values()):
            raise ConfigError(f"{model.name} gives NaN; check its weights, or use a wider number format")
        yield Finished(found, (start + len(numbers)) / total)


@torch.no_grad()
def _score(model: TextModel, inputs: np.ndarray, rows: np.ndarray, targets: np.ndarray) -> tuple[Any, Any]:
    """Cross-entropies [n] fp64 of ``targets`` at the flat positions ``rows``, and which have the largest logit."""
    logits = model.denoise(torch.from_numpy(inputs).to(model.device), None, torch.from_numpy(rows).to(model.device))
    wanted = torch.from_numpy(targets).to(logits.device)
    losses, best = [], []
    for start in range(0, len(rows), step := max(_CHUNK // logits.shape[1], 1)):
        chunk, ids = logits[start : start + step].double(), wanted[start : start + step]
        losses.append((chunk.logsumexp(1) - chunk.gather(1, ids[:, None])[:, 0]).cpu().numpy())
        best.append((chunk.argmax(1) == ids).cpu().numpy())
    return np.concatenate(losses), np.concatenate(best)


def _mean(values: np.ndarray) -> Estimate:
    """Of [windows] values."""
    with np.errstate(invalid="ignore"):  # a model that gives a token no chance has no error
        error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Estimate(float(values.mean()), error)
