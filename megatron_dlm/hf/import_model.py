"""A Hugging Face model as a checkpoint: of Qwen3's or Llama's layout, or one that megatron_dlm has exported.

One process, without megatron-core and transformers. The result has weights and no optimizer: it can be sampled from,
exported, and training can begin with it (`checkpoint.initialize_from`), but there is no run to continue.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_dlm.checkpoint import manifest
from megatron_dlm.checkpoint.stored import CONFIG, INFO, TOKENIZER
from megatron_dlm.checkpoint.whole_tensors import TensorInfo, write_weights
from megatron_dlm.config.check import validate
from megatron_dlm.config.load import dump_yaml
from megatron_dlm.config.tree import Config, DataConfig, SourceConfig, TrainConfig
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.errors import ConfigError
from megatron_dlm.hf.source_config import OURS, SourceModel, read_source_config
from megatron_dlm.hf.source_tensors import SourceTensors
from megatron_dlm.hf.source_tokenizer import SourceTokenizer, convert_tokenizer
from megatron_dlm.hf.tensor_map import EMBEDDING_HF, HEAD_HF, Whole, weight_map
from megatron_dlm.output_folder import check_output, complete_folder
from megatron_dlm.packages import optional_module, versions

Objective = Literal["masked_diffusion", "autoregressive"]

LONGEST = 4096
"""Default of `data.sequence_length` where another library's model is made for longer ones (tokens): its sequences are
those of a whole context window, a run's are what it can afford."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.safetensors"]
_ROWS = 4096  # of a matrix that are looked at, at a time
_ROOM = 50_000_000  # bytes that are asked for beside the weights', for the tokenizer and the small files


class Imported(NamedTuple):
    """What `import_model` wrote."""

    directory: Path
    source: str
    model_type: str
    config: Config
    parameters: int
    """Without the padding of the vocabulary."""
    vocab_size: int
    mask_token: str
    mask_token_id: int
    end_token: str
    end_of_document_id: int
    new_ids: int
    """Ids that the source had no row for, or no token; their rows are the mean of the others."""
    dropped_rows: int
    """Rows of the source that no token has."""


def import_model(
    source: str,
    output: Path,
    *,
    objective: Objective | None,
    mask_token: str | None = None,
    sequence_length: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Imported:
    """Write the checkpoint ``output``, complete or not at all; one tensor is in memory at a time.

    Rows of the embedding and the head that no token has are left out. New tokens, whatever the source has at their
    place, begin as the mean of its tokens' rows.

    Args:
        source: a folder, or the name of a model on the Hub.
        objective: what the weights are to be trained for; None: what our own export was trained for.
        mask_token: [MASK], see `source_tokenizer.convert_tokenizer`.
        sequence_length: `data.sequence_length` of the configuration (tokens); None: the longest, see `LONGEST`.
        overwrite: replace an imported checkpoint.
        progress: show a bar.

    Raises:
        ConfigError: the source cannot be read or represented, or the output not written; one line.
        DataError: the tokenizer cannot be taken over; one line.
    """
    directory, origin = _find(source)
    found = read_source_config(directory)
    tensors = SourceTensors(directory)
    if found.may_be_tied and HEAD_HF not in tensors.shapes:
        found = found._replace(model=replace(found.model, tie_embeddings=True))
    objective = objective or _objective(found, directory)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            tokenizer = convert_tokenizer(directory, Path(temporary), mask_token=mask_token)
            _check_mask(found, tokenizer, directory)
            config = _configuration(found, tokenizer.tokenizer, tensors, output, objective, sequence_length)
            maps = weight_map(config.model, tokenizer.tokenizer.vocab_size)
            _check_weights(tensors, maps, found)
            size = 4 * sum(whole.numel for whole in maps) + _ROOM
            check_output(output, overwrite=overwrite, replaceable=_replaceable(output), size=size)
            with complete_folder(output, overwrite=overwrite) as partial:
                with tqdm(total=len(maps), desc="import", unit=" tensors", disable=None if progress else True) as bar:
                    known = write_weights(
                        partial,
                        {whole.key: TensorInfo(whole.shape, torch.float32) for whole in maps},
                        _reader(tensors, maps, found.rows, tokenizer, done=bar.update),
                    )
                tokenizer.tokenizer.save(partial / TOKENIZER)
                (partial / CONFIG).write_text(dump_yaml(config), encoding="utf-8")
                (partial / INFO).write_text(_description(tokenizer.tokenizer, origin), encoding="utf-8")
                manifest.write(partial, known)
    except OSError as error:
        raise ConfigError(
            f"cannot write {output}: {error.strerror or error}; make room or choose another --output"
        ) from None
    kept = min(found.rows, tokenizer.size)
    return Imported(
        directory=output,
        source=source,
        model_type=found.model_type,
        config=config,
        parameters=sum(part.numel for whole in maps for part in whole.parts),
        vocab_size=tokenizer.tokenizer.vocab_size,
        mask_token=tokenizer.mask_token,
        mask_token_id=tokenizer.tokenizer.mask_token_id,
        end_token=tokenizer.end_token,
        end_of_document_id=tokenizer.tokenizer.end_of_document_id,
        new_ids=tokenizer.tokenizer.vocab_size - kept,
        dropped_rows=found.rows - kept,
    )


def _find(source: str) -> tuple[Path, str]:
    """The folder of a model, ``source`` itself or where its files were downloaded to; and a name of its origin."""
    path = Path(source)
    if path.is_dir():
        return path, str(path.absolute())
    if path.exists() or not _HUB_ID.fullmatch(source):
        raise ConfigError(f"{source} is no folder, nor the name of a model on the Hub; check --model")
    hub = optional_module("huggingface_hub", "a model on the Hub")
    try:
        path = Path(hub.snapshot_download(source, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
    except Exception as error:  # the library's, its transport's and the system's errors have no common class
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) <= 200 else reason[:197] + "..."
        raise ConfigError(
            f"{source} is no folder, and getting it from the Hub failed ({reason}); check --model and the network, or "
            "give a folder with its files"
        ) from None
    return path, f"{source}@{path.name}"  # which is the revision


def _objective(found: SourceModel, directory: Path) -> Objective:
    if found.model_type != OURS:
        raise ConfigError(f"{directory} can become a model of either objective; give --objective")
    return "masked_diffusion"


def _check_mask(found: SourceModel, tokenizer: SourceTokenizer, directory: Path) -> None:
    """A diffusion model has learnt which id means that a token is unknown."""
    if found.mask_token_id not in (None, tokenizer.tokenizer.mask_token_id):
        raise ConfigError(
            f"{directory} was trained with [MASK] as id {found.mask_token_id}, not {tokenizer.mask_token} "
            f"({tokenizer.tokenizer.mask_token_id}); leave out --mask-token, or export it again"
        )


def _configuration(
    found: SourceModel,
    tokenizer: Tokenizer,
    tensors: SourceTensors,
    output: Path,
    objective: Objective,
    sequence_length: int | None,
) -> Config:
    """A whole configuration; what it lacks for a run is training data and a length. Raises ``ConfigError``."""
    is_bf16 = tensors.dtypes.get(EMBEDDING_HF) == torch.bfloat16
    if sequence_length is None:
        sequence_length = found.max_positions if found.model_type == OURS else min(found.max_positions, LONGEST)
    config = Config(
        model=replace(found.model, objective=objective),
        data=DataConfig(
            tokenizer=str((output / TOKENIZER).absolute()),
            sequence_length=sequence_length,
        ),
        train=TrainConfig(precision="bf16" if is_bf16 else "fp32"),
    )
    # A run would refuse it otherwise, when it is too late.
    run = replace(
        config, data=replace(config.data, train=[SourceConfig("train")]), train=replace(config.train, epochs=1)
    )
    validate(run, vocab_size=tokenizer.vocab_size)
    return config


def _check_weights(tensors: SourceTensors, maps: Sequence[Whole], found: SourceModel) -> None:
    """Raise ``ConfigError`` unless the tensors are those of the model, with the source's rows of the vocabulary."""
    expected = {part.name: part.shape for whole in maps for part in whole.parts}
    rows = (found.rows, found.model.hidden_size)
    expected |= {name: rows for name in (EMBEDDING_HF, HEAD_HF) if name in expected}
    copied = found.model.tie_embeddings and HEAD_HF in tensors.shapes
    tensors.check({**expected, HEAD_HF: rows} if copied else expected)
    if copied:
        embedding, head = tensors.read(EMBEDDING_HF), tensors.read(HEAD_HF)
        if not all(map(torch.equal, embedding.split(_ROWS), head.split(_ROWS))):
            raise ConfigError(
                f"tie_word_embeddings is true but {HEAD_HF} is not {EMBEDDING_HF}; set it to false in config.json, or "
                "remove that tensor"
            )


def _reader(
    tensors: SourceTensors, maps: Sequence[Whole], rows: int, tokenizer: SourceTokenizer, *, done: Callable[[], Any]
) -> Callable[[str], Tensor]:
    """What gives our tensor of a key, in fp32, and calls ``done`` each time."""
    by_key = {whole.key: whole for whole in maps}

    def read(key: str) -> Tensor:
        whole, parts = by_key[key], []
        for part in whole.parts:
            tensor = tensors.read(part.name)
            if part.name in (EMBEDDING_HF, HEAD_HF):
                tensor = _fit(tensor, min(rows, tokenizer.size), tokenizer.tokenizer.vocab_size)
            parts.append(tensor)
        done()
        return whole.join(parts)

    return read


def _fit(rows: Tensor, kept: int, vocab_size: int) -> Tensor:
    """The first ``kept`` rows of [rows, hidden], and their mean for the other ids: [vocab_size, hidden]."""
    if kept == vocab_size:
        return rows[:kept]
    # In parts: torch would convert all of it to fp64 first.
    mean = torch.stack([part.sum(dim=0, dtype=torch.float64) for part in rows[:kept].split(_ROWS)]).sum(dim=0) / kept
    return torch.cat((rows[:kept], mean.to(rows.dtype).expand(vocab_size - kept, -1)))


def _replaceable(output: Path) -> Callable[[str], bool]:
    """Which files in ``output`` may be replaced: all of an imported checkpoint, none of a run's."""
    try:
        names = {path.split("/")[0] for path in manifest.read(output)} | {manifest.NAME}
        imported = "imported_from" in json.loads((output / INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        names, imported = set(), False
    return lambda name: imported and name in names


def _description(tokenizer: Tokenizer, origin: str) -> str:
    """checkpoint.json."""
    info: dict[str, Any] = {
        "step": 0,
        "skipped": 0,
        "skipped_in_a_row": 0,
        "consumed_samples": 0,
        "layout": "TP1-PP1-DP1",
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "train_sources": [],
        "imported_from": origin,
        "versions": versions(("megatron_dlm", "megatron-core", "torch")),
    }
    return json.dumps(info, indent=2) + "\n"
