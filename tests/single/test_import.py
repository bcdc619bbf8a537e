"""Imported models compute what they did; the vocabulary fits the tokenizer; nothing is half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dlm import cli
from megatron_dlm.checkpoint import manifest
from megatron_dlm.checkpoint.stored import StoredCheckpoint, open_checkpoint
from megatron_dlm.checkpoint.whole_tensors import WeightsReader
from megatron_dlm.commands.import_ import summary
from megatron_dlm.config.load import to_dict
from megatron_dlm.data.tokenizer import load_tokenizer
from megatron_dlm.errors import ConfigError
from megatron_dlm.hf import import_model as module
from megatron_dlm.hf.import_model import Imported, import_model
from megatron_dlm.hf.tensor_map import EMBEDDING, HEAD
from tests.hf_sources import edit_config, save_source, save_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def take(folder: Path, tmp_path: Path) -> Callable[..., Imported]:
    def run(objective: Any = "autoregressive", **options: Any) -> Imported:
        return import_model(str(folder), tmp_path / "out", objective=objective, **options)

    return run


def logits(stored: StoredCheckpoint, tokens: torch.Tensor) -> torch.Tensor:
    """[batch, seq, vocab] of our model in fp32 on one process."""
    from megatron_dlm.generation.denoiser import load_denoiser

    stored.config.train.precision = "fp32"
    return load_denoiser(stored)(tokens)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3, grouped queries": ("qwen3", {"head_dim": 16}),
    "qwen3, tied, bf16, shards": (
        "qwen3",
        {"tie_word_embeddings": True, "dtype": torch.bfloat16, "shard": "20KB", "head_dim": 8},
    ),
    "llama, a head for each": ("llama", {"num_key_value_heads": 4, "rope_parameters": {"rope_theta": 5e5}}),
    "llama, fp16, shards, wide heads": ("llama", {"dtype": torch.float16, "shard": "30KB", "head_dim": 24}),
    "llama, tied, one key": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, folder: Path, take: Any) -> None:
    kind, fields = CASES[case]
    model = save_source(folder, kind, **fields)
    imported = take()
    size = len(load_tokenizer(str(folder))._model.get_vocab())
    tokens = torch.randint(size, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(tokens).logits[..., :size]
    stored = open_checkpoint(imported.directory)
    assert stored.config == imported.config
    torch.testing.assert_close(logits(stored, tokens)[..., :size], expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.5
    assert {info.dtype for info in WeightsReader(stored.directory).tensors.values()} == {torch.float32}
    precision = "bf16" if fields.get("dtype") is torch.bfloat16 else "fp32"
    assert imported.config.train.precision == precision


def test_the_objective_decides_what_is_attended_to(folder: Path, take: Any) -> None:
    save_source(folder, "qwen3", head_dim=8)
    tokens = torch.arange(20)[None]
    for objective, same in (("autoregressive", True), ("masked_diffusion", False)):
        stored = open_checkpoint(take(objective, overwrite=True).directory)
        assert stored.config.model.objective == objective
        changed = tokens.clone()
        changed[0, -1] = 99
        difference = (logits(stored, tokens) - logits(stored, changed))[0, :-1].abs().max()
        assert (difference == 0) == same


def test_what_the_checkpoint_says(folder: Path, take: Any, tmp_path: Path) -> None:
    save_source(folder, "llama")
    imported = take("masked_diffusion")
    stored = open_checkpoint(tmp_path / "out")
    model, data = stored.config.model, stored.config.data
    assert (model.qk_norm, model.norm_eps, model.rope_theta, model.init_std) == (False, 1e-5, 10000.0, 0.2)
    assert (model.num_query_groups, model.head_dim, data.sequence_length) == (2, 8, 128)
    tokenizer = load_tokenizer(stored.tokenizer)
    assert data.tokenizer == stored.tokenizer and load_tokenizer(data.tokenizer).fingerprint == tokenizer.fingerprint
    assert stored.info["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert stored.info["vocab_size"] == tokenizer.vocab_size == imported.vocab_size
    assert stored.info["imported_from"] == str(folder)
    assert stored.info["step"] == stored.info["consumed_samples"] == 0 and stored.info["train_sources"] == []
    assert manifest.find_fault(stored.directory) is None
    tensors = load_file(folder / "model.safetensors")
    unused = tensors["model.embed_tokens.weight"].numel() // 400 * (400 - imported.vocab_size) * 2
    assert imported.parameters == sum(tensor.numel() for tensor in tensors.values()) - unused
    assert take("masked_diffusion", sequence_length=77, overwrite=True).config.data.sequence_length == 77
    edit_config(folder, max_position_embeddings=1 << 17)
    assert take("masked_diffusion", overwrite=True).config.data.sequence_length == 4096


def test_both_spellings_of_the_rotary_base(folder: Path, take: Any) -> None:
    save_source(folder, "qwen3", head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 3e5})
    assert take().config.model.rope_theta == 3e5
    edit_config(folder, rope_parameters=None, rope_theta=2e6, rope_scaling=..., dtype=None, torch_dtype="float32")
    assert take(overwrite=True).config.model.rope_theta == 2e6
    edit_config(folder, rope_scaling={"type": "default"}, num_key_value_heads=2)
    assert take(overwrite=True).config.model.rope_theta == 2e6


def vocabulary(stored: StoredCheckpoint) -> list[torch.Tensor]:
    reader = WeightsReader(stored.directory)
    return [reader.read(EMBEDDING), reader.read(HEAD)]


@pytest.mark.parametrize("rows", [280, 400])
def test_rows_are_those_of_the_tokenizer(rows: int, folder: Path, take: Any) -> None:
    """280: fewer rows than ids; 400: rows that no id has, where the new [MASK] would be."""
    save_source(folder, "llama", vocab_size=rows)
    size = save_tokenizer(folder)
    imported = take("masked_diffusion")
    kept = min(rows, size)
    assert imported.vocab_size == size + 1 and imported.mask_token_id == size
    assert (imported.new_ids, imported.dropped_rows) == (size + 1 - kept, rows - kept)
    assert f"{rows - kept:,} that no token has left out (an export has {size + 1:,} rows)" in summary(imported)
    tensors = load_file(folder / "model.safetensors")
    stored = open_checkpoint(imported.directory)
    for ours, name in zip(vocabulary(stored), ("model.embed_tokens.weight", "lm_head.weight"), strict=True):
        assert ours.shape == (384, 32)
        assert torch.equal(ours[:kept], tensors[name][:kept])
        mean = tensors[name][:kept].double().mean(0).float().expand(size + 1 - kept, -1)
        assert torch.equal(ours[kept : size + 1], mean)
        assert not ours[size + 1 :].any()


def test_a_special_token_becomes_the_mask_as_it_is(folder: Path, take: Any) -> None:
    save_source(folder, "qwen3", head_dim=8, vocab_size=300)
    size = save_tokenizer(folder, special=("<|endoftext|>", "<|spare|>"))
    imported = take("masked_diffusion", mask_token="<|spare|>")
    assert (imported.mask_token_id, imported.vocab_size) == (1, size)
    row = load_file(folder / "model.safetensors")["model.embed_tokens.weight"][1]
    assert torch.equal(vocabulary(open_checkpoint(imported.directory))[0][1], row)


def test_tied_where_the_configuration_is_silent_and_there_is_no_head(folder: Path, take: Any) -> None:
    save_source(folder, "llama", tie_word_embeddings=True)
    edit_config(folder, tie_word_embeddings=None)
    assert take().config.model.tie_embeddings
    assert HEAD not in WeightsReader(take(overwrite=True).directory).tensors


def test_a_copy_of_the_embedding_as_the_head_is_not_needed(folder: Path, take: Any) -> None:
    save_source(folder, "llama", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors")
    assert HEAD not in WeightsReader(take().directory).tensors
    tensors["lm_head.weight"][7, 7] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="tie_word_embeddings is true but lm_head.weight is not model.embed_tokens"):
        take(overwrite=True)


def test_output_is_complete_or_as_before(
    folder: Path, take: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_source(folder, "llama")
    out, tensors = tmp_path / "out", module.SourceTensors
    before = sorted(tmp_path.iterdir())
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):

        def fail(self: Any, name: str, error: BaseException = error) -> torch.Tensor:
            if "layers.1." in name:
                raise error
            return tensors.read(self, name)

        with monkeypatch.context() as patch:
            patch.setattr(module, "SourceTensors", type("Failing", (tensors,), {"read": fail}))
            with pytest.raises(type(error) if isinstance(error, KeyboardInterrupt) else ConfigError) as raised:
                take()
        assert "No space left" in str(raised.value) or isinstance(error, KeyboardInterrupt)
        assert sorted(tmp_path.iterdir()) == before
    take()
    first = (out / manifest.NAME).read_bytes()
    with pytest.raises(ConfigError, match="is not empty; use --overwrite"):
        take(sequence_length=64)
    assert (out / manifest.NAME).read_bytes() == first
    take(sequence_length=64, overwrite=True)
    assert open_checkpoint(out).config.data.sequence_length == 64
    assert sorted(tmp_path.iterdir()) == [out, folder]


def test_only_imported_checkpoints_are_replaced(folder: Path, take: Any, tmp_path: Path) -> None:
    save_source(folder, "llama")
    out = tmp_path / "out"
    take()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="notes.txt"):
        take(overwrite=True)
    (out / "notes.txt").unlink()
    info = json.loads((out / "checkpoint.json").read_text())
    del info["imported_from"]  # as a run's checkpoint is
    (out / "checkpoint.json").write_text(json.dumps(info))
    with pytest.raises(ConfigError, match="out has .* in it"):
        take(overwrite=True)
    shutil.rmtree(out)
    out.mkdir()
    take()  # an empty folder is as none


def test_neither_megatron_nor_transformers_is_needed(folder: Path, tmp_path: Path) -> None:
    save_source(folder, "llama")
    code = (
        "import sys, torch.distributed as dist; from megatron_dlm.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "assert not {'megatron', 'transformers'} & set(sys.modules), 'slow imports'\n"
        "assert not dist.is_initialized()"
    )
    arguments = ["import", "--model", str(folder), "--output", str(tmp_path / "an output"), "--sequence-length", "64"]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "masked_diffusion | sequences of 64 tokens | fp32" in result.stdout
    assert "[MASK] is <|mask|>" in result.stdout and "1 new (the mean of the others)" in result.stdout
    assert f"--checkpoint.initialize_from '{tmp_path}/an output'" in result.stdout


def test_the_command_line_prints_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.mkdir()
    arguments = ["import", "--model", str(folder), "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "config.json: No such file" in error
    assert sorted(tmp_path.iterdir()) == [folder]


def test_a_model_of_the_hub(folder: Path, take: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    save_source(folder, "llama")
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        if name == "a/missing":
            raise OSError("offline,\nor no such model")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    import_model("some/model", tmp_path / "out", objective="autoregressive")
    assert asked == [("some/model", ["*.json", "*.safetensors"])]
    assert open_checkpoint(tmp_path / "out").info["imported_from"] == "some/model@source"
    with pytest.raises(ConfigError, match="getting it from the Hub failed .offline, or no such model"):
        import_model("a/missing", tmp_path / "other", objective="autoregressive")
    for name in ("./no/such/folder", str(folder / "config.json"), "a/b/c"):
        with pytest.raises(ConfigError, match="is no folder, nor the name of a model"):
            import_model(name, tmp_path / "other", objective="autoregressive")
    assert len(asked) == 2


def test_configuration_is_one_that_a_run_takes(folder: Path, take: Any) -> None:
    """What cannot be trained is refused at once, in the words of the configuration."""
    save_source(folder, "llama")
    tree = to_dict(take().config)
    assert set(tree) == set(to_dict(type(take(overwrite=True).config)()))
    with pytest.raises(ConfigError, match="data.sequence_length is 0; it must be from 1"):
        take(sequence_length=0, overwrite=True)
    edit_config(folder, rms_norm_eps=0)
    with pytest.raises(ConfigError, match="model.norm_eps is 0"):
        take(overwrite=True)
