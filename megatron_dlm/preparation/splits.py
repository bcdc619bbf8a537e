"""The second pass: a split's documents are copied in shuffled order from the spool into its token files."""

from __future__ import annotations

import hashlib
import importlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dlm_kernels.philox import Stream, permute
from megatron_dlm.data.token_file import Metadata, token_dtype
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.preparation.output import SPLITS
from megatron_dlm.preparation.spool import Spool


def indexed_dataset_builder() -> Any:
    """megatron-core's IndexedDatasetBuilder; imported after the workers are done, as it takes seconds and memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # This package first: it lets megatron-core be imported on a machine without a GPU.
        importlib.import_module("megatron_dlm.parallel")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    return IndexedDatasetBuilder


def write_split(
    name: str,
    documents: np.ndarray,
    spool: Spool,
    tokenizer: Tokenizer,
    request: dict[str, Any],
    staging: Path,
    builder_type: Any,
    quiet: bool | None,
) -> Metadata:
    """Write a split's documents in shuffled order as one token file in the staging folder.

    Args:
        name: of the split, see `SPLITS`.
        documents: their numbers in the spool, [documents of the split] int64.
        spool: what `tokenize_into` gave.
        tokenizer: the one of the spool.
        request: written into the .json; its seed decides the order.
        staging: where the three files go.
        builder_type: see `indexed_dataset_builder`.
        quiet: as tqdm's `disable`.

    Raises:
        OSError: the files cannot be written.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    tokens = np.memmap(spool.path, dtype=dtype, mode="r")
    ends = np.cumsum(spool.lengths)
    n = len(documents)
    order = permute(np.arange(n, dtype=np.int64), n, request["seed"], Stream.DOCUMENT_SHUFFLE, purpose=SPLITS[name])
    bin_path, idx_path = staging / f"{name}.bin", staging / f"{name}.idx"
    builder = builder_type(str(bin_path), dtype=dtype)
    largest, digest = 0, hashlib.sha256()
    with tqdm(desc=f"write {name}", unit=" tokens", unit_scale=True, disable=quiet) as bar:
        for document in documents[order].tolist():
            length = int(spool.lengths[document])
            content = tokens[ends[document] - length : ends[document]]
            largest = max(largest, int(content.max()))
            builder.add_document(content, [length])
            digest.update(content.tobytes())
            bar.update(length)
    builder.finalize(str(idx_path))
    metadata = Metadata(
        documents=n,
        tokens=int(spool.lengths[documents].sum()),
        bytes=int(spool.text_bytes[documents].sum()),
        dtype=np.dtype(dtype).name,
        vocab_size=tokenizer.vocab_size,
        mask_token_id=tokenizer.mask_token_id,
        end_of_document_id=tokenizer.end_of_document_id,
        max_token_id=largest,
        tokenizer_fingerprint=tokenizer.fingerprint,
        bin_bytes=bin_path.stat().st_size,
        idx_bytes=idx_path.stat().st_size,
        request=request,
        bin_sha256=digest.hexdigest(),
        idx_sha256=hashlib.sha256(idx_path.read_bytes()).hexdigest(),
        bin_mtime=int(bin_path.stat().st_mtime),
        idx_mtime=int(idx_path.stat().st_mtime),
    )
    metadata.write(staging / f"{name}.json")
    return metadata
