"""What megatron_dlm has exported comes back as it was: weights bit for bit, configuration, and control tokens."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dlm.checkpoint.stored import open_checkpoint
from megatron_dlm.checkpoint.whole_tensors import WeightsReader
from megatron_dlm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dlm.errors import ConfigError
from megatron_dlm.hf.export import export
from megatron_dlm.hf.import_model import import_model
from megatron_dlm.hf.source_tokenizer import convert_tokenizer
from megatron_dlm.hf.tokenizer import save_pretrained_tokenizer
from megatron_dlm.preparation.documents import embedded_documents
from megatron_dlm.preparation.sentencepiece_training import train_sentencepiece
from tests.exports import content, make_checkpoint
from tests.hf_sources import save_tokenizer

CASES: dict[str, dict[str, Any]] = {
    "diffusion": {"sequence_length": 8192},
    "diffusion, tied, without qk norm, bf16": {"tie_embeddings": True, "qk_norm": False, "precision": "bf16"},
    "autoregressive, as Qwen3": {"objective": "autoregressive", "tie_embeddings": True},
    "autoregressive, as Llama": {"objective": "autoregressive", "qk_norm": False, "rope_theta": 5e5, "norm_eps": 1e-5},
}


@pytest.mark.parametrize("case", CASES)
def test_exported_again_it_is_the_same(case: str, tmp_path: Path) -> None:
    keys = CASES[case]
    first = open_checkpoint(make_checkpoint(tmp_path / "checkpoint", **keys))
    export(first.directory, tmp_path / "export", dtype="fp32")
    objective = keys.get("objective")  # of our diffusion models it need not be said
    imported = import_model(str(tmp_path / "export"), tmp_path / "imported", objective=objective)
    second = open_checkpoint(tmp_path / "imported")
    assert (imported.new_ids, imported.dropped_rows) == (0, 0)
    before, after = WeightsReader(first.directory), WeightsReader(second.directory)
    assert before.tensors.keys() == after.tensors.keys()
    for key in before.tensors:
        ours = after.read(key)
        rows = 258 if "embedding" in key or "output_layer" in key else None  # beyond is padding
        assert torch.equal(ours[:rows], before.read(key, torch.float32)[:rows]), key
    model = second.config.model
    assert model.objective == first.config.model.objective and model.qk_norm == first.config.model.qk_norm
    assert (model.rope_theta, model.norm_eps) == (first.config.model.rope_theta, first.config.model.norm_eps)
    export(second.directory, tmp_path / "again", dtype="fp32")
    files, again = content(tmp_path / "export"), content(tmp_path / "again")
    differing = {name for name in files.keys() | again.keys() if files.get(name) != again.get(name)}
    assert differing == {"README.md"}  # which tells where it is from


def test_bf16_exports_are_bf16_runs(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", precision="bf16")
    export(tmp_path / "checkpoint", tmp_path / "export", max_shard_size=10_000)
    imported = import_model(str(tmp_path / "export"), tmp_path / "imported", objective=None)
    assert imported.config.train.precision == "bf16"
    before, after = WeightsReader(tmp_path / "checkpoint"), WeightsReader(tmp_path / "imported")
    key = "decoder.layers.1.mlp.linear_fc1.weight"
    assert torch.equal(after.read(key), before.read(key).bfloat16().float())


def test_the_mask_of_a_diffusion_model_stays_what_it_is(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "export")
    for mask_token in ("<|other|>", None):
        if mask_token is None:
            path = tmp_path / "export" / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_token_id": 7}))
        with pytest.raises(ConfigError, match=r"was trained with \[MASK\] as id (257|7), not"):
            import_model(str(tmp_path / "export"), tmp_path / "imported", objective=None, mask_token=mask_token)
    assert not (tmp_path / "imported").exists()


def tokenizers(folder: Path) -> list[Tokenizer]:
    """One of each kind, of which the last two have to get control tokens."""
    train_sentencepiece(
        [document.text for document in itertools.islice(embedded_documents(), 40)], 600, folder / "a.model"
    )
    save_tokenizer(folder / "hub", special=("<|endoftext|>", "<|mask|>"))
    save_tokenizer(folder / "bare", special=())
    return [load_tokenizer(str(path)) for path in ("byte", folder / "a.model", folder / "hub", folder / "bare")]


def test_control_tokens_of_every_kind_of_tokenizer(tmp_path: Path) -> None:
    texts = ["def f(x):\n\treturn x  # 123\n", "na\u00efve \U0001f600 \u4f60\u597d", ""]
    for index, before in enumerate(tokenizers(tmp_path)):
        exported = tmp_path / f"exported{index}"
        exported.mkdir()
        save_pretrained_tokenizer(before, exported, add_bos=bool(index % 2), max_length=64)
        found = convert_tokenizer(exported, tmp_path / f"converted{index}", mask_token=None)
        after = found.tokenizer
        assert found.size == after.vocab_size == before.vocab_size
        assert (after.mask_token_id, after.end_of_document_id) == (before.mask_token_id, before.end_of_document_id)
        assert [after.encode(text) for text in texts] == [before.encode(text) for text in texts]
