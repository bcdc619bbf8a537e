"""The NELBO of a model on any text: nats per token, bits per byte and perplexity, each with a 95 % interval.

The text is a file, JSON lines, or what `megatron-dlm prepare` has written. As in training, documents follow one
another with an end-of-document behind each, and the tokens are cut into windows of the model's length. Of an
autoregressive model the figure is the exact negative log-likelihood of the same windows, not a bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_dlm.data.token_file import TokenFile
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.evaluation.likelihood import LogLikelihood
from megatron_dlm.evaluation.likelihood_masks import TOKENS_PER_BATCH, LikelihoodOptions
from megatron_dlm.evaluation.progress import Finished
from megatron_dlm.evaluation.rolling import total, windows_of
from megatron_dlm.evaluation.scoring import loglikelihoods_of
from megatron_dlm.generation.text_model import TextModel
from megatron_dlm.preparation.documents import Document, find_inputs, read_documents
from megatron_dlm.preparation.selection import utf8
from megatron_dlm.shipped.sampler_plan import Vocabulary

WINDOW_MASKS = 16
"""Masks of a window by default: a text has many."""

_PARTS = (".bin", ".idx", ".json")


class TextNelbo(NamedTuple):
    """The NELBO of a text, exact for an autoregressive model.

    ``*_ci95`` are half-widths of 95 % intervals (Student's t, windows as units): they say how far the figure for other
    text of the same kind may be from this one. A window's estimate has the noise of its masks in it, so their spread
    over the windows has it too, and nothing is to be added. Windows of one document resemble each other: where there
    are few documents, the figure for other documents varies more than this says. Infinite with one window.
    """

    nats_per_token: float
    nats_per_token_ci95: float
    bits_per_byte: float
    """Of UTF-8 text."""
    bits_per_byte_ci95: float
    perplexity: float
    """Per token; an upper bound, but for an autoregressive model."""
    perplexity_ci95: float
    """Half the width of the interval between the exponentials of the ends for nats."""
    masks_ci95: float
    """Nats per token: the part of the masks that were drawn, for this very text. It is what another seed changes, and
    the least that two models must differ by on one text. 0: exact; infinite: not known, from a single mask."""
    tokens: int
    """End-of-documents included."""
    bytes: int
    """Of the text of these tokens; where ``limit_tokens`` cuts, in proportion to the tokens."""
    windows: int
    masks: int
    """Masks of every window; 0 for an autoregressive model."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: None in its place."""
        return {name: value if math.isfinite(value) else None for name, value in self._asdict().items()}


@dataclass(frozen=True)
class TextWindows:
    """A text as tokens, to be cut into windows."""

    tokens: np.ndarray
    """[tokens] integers: documents one after the other, each with its end-of-document."""
    length: int
    """Tokens of a window; the last one may be shorter."""
    bytes: float
    """UTF-8 bytes of the text; of a part of a document in proportion to its tokens."""

    @property
    def lengths(self) -> np.ndarray:
        """[windows] int64: tokens of each."""
        starts = np.arange(0, len(self.tokens), self.length)
        return np.minimum(len(self.tokens) - starts, self.length)


def text_nelbo(
    model: TextModel,
    source: str,
    *,
    masks: int = WINDOW_MASKS,
    seed: int = 0,
    limit_tokens: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Iterator[Finished[TextNelbo]]:
    """The NELBO of ``model`` on a text, which comes last, as number 0.

    Every rank of the model's layout must call it with the same arguments.

    Every window is a text of its own, all of its tokens noised together, by ``masks`` masks of exactly k tokens with
    k spread evenly over the window (see ``loglikelihoods``). The masks are a function of (seed, index of the window,
    its length), whatever the model, the batches and the other windows.

    Args:
        source: see ``read_windows``.
        masks: of every window; an autoregressive model needs none.
        seed: 64 bits.
        limit_tokens: take only the first ones of the text; None: all.
        tokens_per_batch: of one forward; but at least one window.

    Raises:
        ConfigError: an argument is out of range, or the model gives NaN; one line.
        DataError: the text cannot be read, or was prepared with another tokenizer; one line.
    """
    try:
        options = LikelihoodOptions(masks=masks, seed=seed, tokens_per_batch=tokens_per_batch)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    text = read_windows(source, model.tokenizer, model.max_length, limit_tokens=limit_tokens)
    check_ids(text.tokens, source, model.vocabulary)
    # One text, so one list of windows; every window is a request of its own.
    (windows,) = windows_of([text.tokens], max_length=text.length)
    found: dict[int, LogLikelihood] = {}
    try:
        for part in loglikelihoods_of(model, windows, options):
            found |= part.results
            yield Finished({}, part.share)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    scored = [found[index] for index in range(len(windows))]
    yield Finished({0: _summarize(text, scored, masks=0 if model.kind.causal else masks)}, 1.0)


def read_windows(source: str, tokenizer: Tokenizer, length: int, *, limit_tokens: int | None = None) -> TextWindows:
    """The tokens of a text.

    Args:
        source: a prefix that `megatron-dlm prepare` has written (its tokens are not read into memory), JSON lines with
            "text", a UTF-8 text file, which is one document, or whatever else ``read_documents`` reads.
        tokenizer: of the model; a prepared text must be its work.
        length: tokens of a window.
        limit_tokens: take only the first ones; None: all.

    Raises:
        ConfigError: ``length`` or ``limit_tokens`` is below 1.
        DataError: the text is missing, empty or damaged, or was prepared with another tokenizer; one line.
    """
    for name, value in (("length", length), ("limit_tokens", limit_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    path = Path(source)
    if path.suffix in _PARTS and _is_prepared(path.with_suffix("")):
        raise DataError(f"{source} is a part of a prepared text: give {path.with_suffix('')}")
    if not path.is_file() and _is_prepared(path):
        return _open_prepared(path, tokenizer, length, limit_tokens)
    if path.is_dir() and (inside := sorted(found.with_suffix("") for found in path.glob("*.idx"))):
        raise DataError(f"{source} holds prepared texts ({', '.join(p.name for p in inside)}): give {inside[-1]}")
    if not path.exists():
        raise DataError(f"the text {source} does not exist: give a file, or a prefix that `megatron-dlm prepare` wrote")
    try:
        return _tokenize(source, read_documents(find_inputs([path])), tokenizer, length, limit_tokens)
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror or error}; check the path") from None


def check_ids(tokens: np.ndarray, source: str, vocabulary: Vocabulary) -> None:
    """Raises DataError, in one line, for ids ([...] integers) that no text has, which only a damaged file holds."""
    too_large = vocabulary.size is not None and tokens.max() >= vocabulary.size
    if too_large or tokens.min() < 0 or (tokens == vocabulary.mask_token_id).any():
        raise DataError(f"{source} has ids that no text has, so it is damaged: prepare the data again")


def _is_prepared(prefix: Path) -> bool:
    """Whether a token file or its index is there; what else it needs, opening it says."""
    return any(Path(f"{prefix}{suffix}").is_file() for suffix in (".bin", ".idx"))


def _open_prepared(prefix: Path, tokenizer: Tokenizer, length: int, limit_tokens: int | None) -> TextWindows:
    file = TokenFile(prefix)
    made, ours = file.metadata.tokenizer_fingerprint, tokenizer.fingerprint
    if made != ours:
        raise DataError(
            f"{prefix} was prepared with another tokenizer ({made[:12]}) than the model's ({ours[:12]}): "
            f"prepare it again with {tokenizer.source}, or give the text itself"
        )
    tokens = file.tokens[:limit_tokens]
    return TextWindows(tokens, length, file.metadata.bytes_per_token * len(tokens))


def _tokenize(
    source: str, documents: Iterable[Document], tokenizer: Tokenizer, length: int, limit_tokens: int | None
) -> TextWindows:
    """As `prepare` does it: documents without text are left out. Reads no further than the limit."""
    parts: list[np.ndarray] = []
    tokens, size = 0, 0.0
    for document in documents:
        content = utf8(document)
        if not content:
            continue
        ids = np.array([*tokenizer.encode(document.text), tokenizer.end_of_document_id], dtype=np.int64)
        # Bytes are counted in proportion where the limit cuts a document.
        kept = ids if limit_tokens is None else ids[: limit_tokens - tokens]
        parts.append(kept)
        tokens += len(kept)
        size += len(content) * len(kept) / len(ids)
        if tokens == limit_tokens:
            break
    if not parts:
        raise DataError(f"{source} has no text: give another one")
    return TextWindows(np.concatenate(parts), length, size)


def _summarize(windows: TextWindows, scored: list[LogLikelihood], *, masks: int) -> TextNelbo:
    tokens, whole = len(windows.tokens), total(scored)
    nats = -whole.value / tokens
    # Windows are the units: their spread has the noise of the masks in it already.
    ci95 = _half_width(np.array([-window.value for window in scored]), windows.lengths)
    interval = whole.interval95()
    # From nats per token to bits per byte.
    bits = tokens / windows.bytes / math.log(2)
    with np.errstate(over="ignore"):  # a model that gives a token no chance, or nearly none
        perplexity, spread = float(np.exp(nats)), float(np.sinh(ci95))
    return TextNelbo(
        nats_per_token=nats,
        nats_per_token_ci95=ci95,
        bits_per_byte=nats * bits,
        bits_per_byte_ci95=ci95 * bits,
        perplexity=perplexity,
        perplexity_ci95=perplexity * spread if spread else 0.0,
        masks_ci95=math.inf if interval is None else (interval[1] - interval[0]) / 2 / tokens,
        tokens=tokens,
        bytes=round(windows.bytes),
        windows=len(scored),
        masks=masks,
    )


def _half_width(totals: np.ndarray, lengths: np.ndarray) -> float:
    """Of the 95 % interval of sum(totals) / sum(lengths), which are [windows], as a ratio of two means.

    Cochran, "Sampling techniques", 6.4: the units' residuals about the ratio. Infinite where there is no telling.
    """
    count = len(totals)
    if count < 2 or not np.isfinite(totals).all():
        return math.inf
    residuals = totals - totals.sum() / lengths.sum() * lengths
    error = math.sqrt(count / (count - 1) * float((residuals**2).sum())) / float(lengths.sum())
    interval = LogLikelihood(0.0, error, None, degrees_of_freedom=count - 1).interval95()
    assert interval is not None
    return interval[1]
