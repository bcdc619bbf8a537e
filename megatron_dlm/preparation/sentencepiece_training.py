"""Training of a SentencePiece tokenizer that gives back every text exactly."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_dlm.data.tokenizer import END_OF_DOCUMENT_PIECE, MASK_PIECE
from megatron_dlm.errors import DataError

# Long lines are cut here: the trainer drops sentences above its limit in bytes, and one character has at most four.
_CHUNK_CHARACTERS = 4096


def train_sentencepiece(texts: Iterable[str], vocab_size: int, path: str | Path) -> None:
    """Train a byte-pair SentencePiece model and write it to `path`.

    Nothing is normalised, whitespace is kept, newline and tab are pieces of their own, and bytes stand in for what the
    vocabulary lacks, so that decoding gives back the text. End-of-document and [MASK] are control pieces. Merges are
    counted in integers, so the model does not depend on threads or machine.

    Args:
        texts: documents; all of them are used, so bound them before.
        vocab_size: number of pieces, the 256 bytes, 2 control pieces and 3 others included.
        path: the *.model file.

    Raises:
        DataError: the texts cannot fill the vocabulary, or the vocabulary cannot hold their characters.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            character_coverage=0.9995,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            control_symbols=[END_OF_DOCUMENT_PIECE, MASK_PIECE],
            user_defined_symbols=["\n", "\t"],
            max_sentence_length=4 * _CHUNK_CHARACTERS,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        # The message is a place in the trainer's source, a condition in brackets, and sometimes a sentence.
        reason = " ".join(str(error).rpartition("]")[2].split()).rstrip(".") or "there is too little usable text"
        raise DataError(
            f"cannot train a SentencePiece vocabulary of {vocab_size} on these texts ({reason}): "
            "give --train-sentencepiece another size, or more text"
        ) from error
    Path(path).write_bytes(model.getvalue())


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines, in chunks; no piece spans two lines, as newline is a piece of its own."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _CHUNK_CHARACTERS):
                yield line[start : start + _CHUNK_CHARACTERS]
