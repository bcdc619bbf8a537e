"""The data order: sample id -> (source, epoch, sequence) -> tokens, as a pure function with nothing to save or build.

A source is the flat token stream of one prepared corpus (or a prefix of it), N tokens read as a ring. In every epoch
floor(N / s) sequences of s tokens are cut from it, one after the other, from an offset drawn for that epoch; so each
token is seen at most once per epoch, N mod s of them not at all, and boundaries move between epochs. Their order is
a keyed permutation, fresh each epoch.

Several sources are blended in blocks of samples: each block has a fixed number of samples of each source, in an order
permuted afresh for each block (see `blend.py`). A source starts its next epoch when it is used up, at its own pace.

Validation keeps the order of the files: offset 0, no permutation within a source; a sample id is an index in the set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dlm_kernels.philox import Purpose, Stream, permute, random_words
from megatron_dlm.config.tree import SourceConfig
from megatron_dlm.data.blend import Blend
from megatron_dlm.data.token_file import TokenFile
from megatron_dlm.errors import DataError


class Location(NamedTuple):
    """Where a sample comes from."""

    source: int
    """Index of the source."""
    epoch: int
    """Pass over that source, from 0."""
    sequence: int
    """Index among that pass's sequences, in file order."""


class Dataset:
    """Training sequences of a fixed length from one or more prepared corpora.

    Args:
        sources: prefixes of prepared corpora and their weights (shares of the samples).
        sequence_length: tokens of one sequence.
        seed: 64 bits; decides the order.
        unique_tokens: use only so many tokens: of each source the first ones, in proportion to its weight, so that
            the data of a smaller number is part of that of a larger one. None uses all.
        purpose: TRAIN, or VALIDATION for a fixed order without repetition.
        vocab_size: ids must be below it; None does not check.
        tokenizer_fingerprint: of the tokenizer in use, to refuse data of another one; None does not check.

    Attributes:
        source_tokens: tokens in each source's file.
        fingerprints: one of each source's content.
        digests: SHA-256 of each source's tokens, as it was prepared; None where that is not on record.
        files: the sources.
        num_tokens: tokens in all of them.
        unique_tokens: tokens used.
        samples_per_epoch: training: sequences of one pass over every source. Validation: sequences in the set, the
            most that the blend gives before a source would repeat.
        bytes_per_token: UTF-8 bytes of text per token, mean over the blend.

    Raises:
        DataError: files are missing or do not fit together, a source is shorter than one sequence or than its share
            of `unique_tokens`, ids or tokenizer do not fit.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        *,
        sequence_length: int,
        seed: int,
        unique_tokens: int | None = None,
        purpose: Purpose = Purpose.TRAIN,
        vocab_size: int | None = None,
        tokenizer_fingerprint: str | None = None,
    ) -> None:
        if not sources:
            raise DataError("no data source is given: name at least one prepared corpus")
        self.sequence_length = sequence_length
        self.purpose = purpose
        self.vocab_size = vocab_size
        self.files = [TokenFile(source.path) for source in sources]
        for i, file in enumerate(self.files):
            _check_vocabulary(file, vocab_size, tokenizer_fingerprint)
            if file.identity in (other.identity for other in self.files[:i]):
                raise DataError(f"{file.prefix} is given twice: name it once, with the sum of the weights")
        self.blend = Blend([source.weight for source in sources], seed=seed, purpose=purpose)
        self._lengths = [self._used_length(i, unique_tokens) for i in range(len(sources))]
        self._sequences = np.array([length // sequence_length for length in self._lengths], dtype=np.int64)
        self._seeds = [_source_seed(seed, i) for i in range(len(sources))]
        self.source_tokens = [file.metadata.tokens for file in self.files]
        self.fingerprints = [file.fingerprint() for file in self.files]
        self.digests = [file.metadata.bin_sha256 for file in self.files]
        self.num_tokens = sum(self.source_tokens)
        self.unique_tokens = sum(self._lengths)
        self.bytes_per_token = float(self.blend.shares @ [file.metadata.bytes_per_token for file in self.files])
        if purpose == Purpose.TRAIN:
            self.samples_per_epoch = int(self._sequences.sum())
        else:
            self.samples_per_epoch = self.blend.samples_before(self._sequences)

    def sequences(self, sample_ids: np.ndarray) -> np.ndarray:
        """Tokens [n, seq] int64 of the samples [n] int64.

        Raises:
            DataError: an id in the file is outside the vocabulary.
            ValueError: an id is negative, or the validation set has no sequence of that index.
        """
        sample_ids = np.asarray(sample_ids, dtype=np.int64)
        tokens = np.empty((len(sample_ids), self.sequence_length), dtype=np.int64)
        offsets: dict[tuple[int, int], int] = {}
        for row, (source, epoch, sequence) in enumerate(np.stack(self._locate(sample_ids), axis=1).tolist()):
            if (source, epoch) not in offsets:
                offsets[source, epoch] = self._offset(source, epoch)
            # On the ring: from the epoch's offset, so many sequences further.
            start = (offsets[source, epoch] + sequence * self.sequence_length) % self._lengths[source]
            tokens[row] = self._read(source, start)
            if self.vocab_size is not None:
                _require_ids_below(self.files[source], start, tokens[row], self.vocab_size)
        return tokens

    def locate(self, sample_id: int) -> Location:
        """Source, epoch and sequence of one sample."""
        source, epoch, sequence = self._locate(np.array([sample_id], dtype=np.int64))
        return Location(int(source[0]), int(epoch[0]), int(sequence[0]))

    def epoch(self, consumed_samples: int) -> float:
        """Passes over the unique tokens after so many samples; over a blend, the mean weighted by sequences."""
        return consumed_samples / self.samples_per_epoch

    def unigram_counts(self, vocab_size: int, max_tokens: int = 2**24) -> np.ndarray:
        """How often each id occurs in what training reads, [vocab_size] int64.

        Counted in the first `max_tokens` used tokens (documents are shuffled); in a blend, in an equal part of each
        source, scaled to its share.

        Raises:
            DataError: an id in the file is outside the vocabulary.
        """
        limit = max(1, max_tokens // len(self.files))
        parts = [file.read(0, min(n, limit)) for file, n in zip(self.files, self._lengths, strict=True)]
        total = sum(len(part) for part in parts)
        counts = np.zeros(vocab_size)
        for file, part, share in zip(self.files, parts, self.blend.shares, strict=True):
            _require_ids_below(file, 0, part, vocab_size)
            counts += np.bincount(part, minlength=vocab_size) * (share * total / len(part))
        return np.rint(counts).astype(np.int64)

    def _locate(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`locate` for an array, [n] int64 each."""
        if sample_ids.size and sample_ids.min() < 0:
            raise ValueError("sample ids must not be negative")
        source, index = self.blend.locate(sample_ids)
        # The source's samples are passes of a fixed number of sequences, one pass after the other.
        epoch, position = np.divmod(index, self._sequences[source])
        if self.purpose == Purpose.VALIDATION:
            if epoch.any():
                raise ValueError(f"the validation set has only {self.samples_per_epoch} sequences")
            return source, epoch, position
        # Position in the pass -> which sequence comes there; a permutation of its own for each (source, epoch).
        sequence = np.empty_like(position)
        for s, e in np.unique(np.stack([source, epoch], axis=1), axis=0).tolist():
            here = (source == s) & (epoch == e)
            count = int(self._sequences[s])
            sequence[here] = permute(position[here], count, self._seeds[s], Stream.DATA_ORDER, step=e)
        return source, epoch, sequence

    def _offset(self, source: int, epoch: int) -> int:
        if self.purpose == Purpose.VALIDATION:
            return 0
        return permute(0, self._lengths[source], self._seeds[source], Stream.DATA_OFFSET, step=epoch)

    def _read(self, source: int, start: int) -> np.ndarray:
        """`sequence_length` tokens of the ring of the source's used tokens, from `start` on."""
        length, file = self._lengths[source], self.files[source]
        end = start + self.sequence_length
        if end <= length:
            return file.read(start, end)
        # Past the last used token the ring goes on with the first. Once round at most: a source has a whole sequence.
        return np.concatenate([file.read(start, length), file.read(0, end - length)])

    def _used_length(self, source: int, unique_tokens: int | None) -> int:
        """Tokens used of a source: all, or its share of `unique_tokens`."""
        file = self.files[source]
        available = length = file.metadata.tokens
        cause = ""
        if unique_tokens is not None:
            block_size, count = self.blend.block_size, int(self.blend.counts[source])
            length = unique_tokens * count // block_size
            cause = f" as its share of unique_tokens ({unique_tokens})"
            if length > available:
                raise DataError(
                    f"unique_tokens ({unique_tokens}) takes {length} tokens of {file.prefix}, which has {available}: "
                    f"use at most {available * block_size // count}, or other weights"
                )
        if length < self.sequence_length:
            raise DataError(
                f"{file.prefix} has {length} tokens{cause}, less than one sequence of {self.sequence_length}: "
                "give more data or a shorter data.sequence_length"
            )
        return length


def _source_seed(seed: int, source: int) -> int:
    """64 bits of its own for each source, so that two sources of one length get different orders."""
    low, high, *_ = random_words(seed, Stream.DATA_ORDER, source)
    return high << 32 | low


def _check_vocabulary(file: TokenFile, vocab_size: int | None, fingerprint: str | None) -> None:
    made = file.metadata
    if fingerprint is not None and made.tokenizer_fingerprint != fingerprint:
        raise DataError(
            f"{file.prefix} was prepared with another tokenizer ({made.tokenizer_fingerprint[:12]}) than "
            f"data.tokenizer ({fingerprint[:12]}): name the tokenizer saved beside the data, or prepare it again"
        )
    if vocab_size is not None and made.max_token_id >= vocab_size:
        raise DataError(
            f"{file.prefix} has ids up to {made.max_token_id}, outside the vocabulary of {vocab_size}: "
            "use the tokenizer that the data was prepared with"
        )


def _require_ids_below(file: TokenFile, start: int, tokens: np.ndarray, vocab_size: int) -> None:
    if int(tokens.max()) >= vocab_size or int(tokens.min()) < 0:
        at = int(np.argmax((tokens >= vocab_size) | (tokens < 0)))
        raise DataError(
            f"{file.prefix}.bin has the id {int(tokens[at])} at token {(start + at) % file.metadata.tokens}, outside "
            f"the vocabulary of {vocab_size}: the file is damaged or of another tokenizer; prepare the data again"
        )
