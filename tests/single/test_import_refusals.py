"""What the import refuses, in one line that names it, before anything is written; and tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from megatron_dlm.data.tokenizer import load_tokenizer
from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.hf.import_model import Imported, import_model
from megatron_dlm.hf.source_config import read_source_config
from megatron_dlm.hf.source_tensors import SourceTensors
from megatron_dlm.hf.source_tokenizer import SourceTokenizer, convert_tokenizer
from tests.hf_sources import SHAPE, edit_config, save_source, save_tokenizer

Take = Callable[..., Imported]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def take(folder: Path, tmp_path: Path) -> Take:
    def run(objective: Any = "masked_diffusion", **options: Any) -> Imported:
        try:
            return import_model(str(folder), tmp_path / "out", objective=objective, **options)
        except (ConfigError, DataError) as error:
            assert "\n" not in str(error)
            assert sorted(tmp_path.iterdir()) == [folder], "something was written"
            raise

    return run


def write_config(folder: Path, kind: str = "qwen3", **fields: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **SHAPE, "head_dim": 8, **fields}))


QWEN, LLAMA = "qwen3", "llama"
FIELDS: list[tuple[str, dict[str, Any], str]] = [
    (QWEN, {"attention_bias": True}, "attention_bias is true"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias is true"),
    (LLAMA, {"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
    (LLAMA, {"pretraining_tp": 2}, "pretraining_tp is 2"),
    (QWEN, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    (QWEN, {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window is true"),
    (QWEN, {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types is"),
    (LLAMA, {"sliding_window": 64}, "sliding_window is 64"),
    (QWEN, {"quantization_config": {"quant_method": "fp8"}}, 'quantization_config is {"quant_method": "fp8"}'),
    (QWEN, {"num_experts": 8}, "num_experts is 8"),
    (QWEN, {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    (QWEN, {"auto_map": {"AutoModel": "modeling.Other"}}, "auto_map is"),
    (QWEN, {"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling is {"type": "linear"'),
    (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 'rope_scaling is {"rope_type": "llama3"'),
    (QWEN, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 'rope_parameters is {"rope_type": "yarn"'),
    (QWEN, {"rope_parameters": {"rope_type": "default", "factor": 4.0}}, "rope_parameters is"),
    (QWEN, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters is"),
    (QWEN, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "rope_parameters is"),
    (QWEN, {"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 1e6}, "rope_theta is 1000000.0 but rope_parameters."),
    (QWEN, {"rope_theta": "big"}, "rope_theta is 'big'"),
    (QWEN, {"architectures": ["Qwen3ForSequenceClassification"]}, "architectures is"),
    (QWEN, {"model_type": ["qwen3"]}, "model_type is ['qwen3']"),
    ("qwen2", {}, "model_type is 'qwen2'; can be imported: qwen3, llama, megatron_dlm"),
    (QWEN, {"hidden_size": None}, "hidden_size is None; it must be a whole number above 0"),
    (QWEN, {"num_hidden_layers": "4"}, "num_hidden_layers is '4'"),
    (QWEN, {"rms_norm_eps": None}, "rms_norm_eps is None; it must be a number"),
    (QWEN, {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ("megatron_dlm", {"mask_token_id": 3}, "qk_norm is None; it must be true or false"),
    ("megatron_dlm", {"qk_norm": True}, "mask_token_id is None"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), FIELDS, ids=[message for _, _, message in FIELDS])
def test_a_field_that_cannot_be_represented(kind: str, fields: Any, message: str, folder: Path, take: Take) -> None:
    write_config(folder, kind, **fields)
    with pytest.raises(ConfigError) as raised:
        take()
    assert message in str(raised.value) and str(folder / "config.json") in str(raised.value)


def test_fields_that_change_nothing_or_are_switched_off(folder: Path) -> None:
    write_config(
        folder,
        architectures=["Qwen3ForCausalLM"],
        attention_bias=False,
        hidden_act="swish",
        sliding_window=4096,
        use_sliding_window=False,
        max_window_layers=28,
        layer_types=["full_attention"] * 3,
        rope_scaling=None,
        rope_theta=1000000,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        id2label={"0": "LABEL_0"},
        torch_dtype="bfloat16",
        use_mrope=False,
        num_experts=None,
        transformers_version="4.51.0",
        temperature=0.6,
    )
    found = read_source_config(folder)
    assert found.model.rope_theta == 1e6 and found.model.hidden_size == 32 and found.may_be_tied


@pytest.mark.parametrize(("kind", "groups", "head_dim"), [("qwen3", 32, 128), ("llama", 64, 8)], ids=["qwen3", "llama"])
def test_what_transformers_takes_for_absent_fields(kind: str, groups: int, head_dim: int, folder: Path) -> None:
    import transformers

    fields = {"hidden_size": 512, "num_attention_heads": 64}
    write_config(folder, kind, **fields)
    edit_config(folder, num_key_value_heads=None, head_dim=None, rms_norm_eps=None, initializer_range=None)
    model = read_source_config(folder).model
    assert (model.num_query_groups, model.head_dim, model.norm_eps, model.init_std) == (groups, head_dim, 1e-6, 0.02)
    theirs = transformers.AutoConfig.from_pretrained(folder)
    assert (theirs.num_key_value_heads, theirs.head_dim, theirs.rms_norm_eps) == (groups, head_dim, 1e-6)
    edit_config(folder, num_key_value_heads=..., head_dim=...)
    model = read_source_config(folder).model
    assert (model.num_query_groups, model.head_dim) == (64, 8)


@pytest.mark.parametrize("content", ["{", "[]", '"text"', b"\xff"])
def test_config_that_is_not_an_object(content: str | bytes, folder: Path, take: Take) -> None:
    folder.mkdir()
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"config.json is not (JSON|a JSON object)"):
        take()


def test_the_objective_of_anything_but_our_exports_must_be_said(folder: Path, take: Take) -> None:
    save_source(folder, "llama")
    with pytest.raises(ConfigError, match="either objective; give --objective"):
        take(None)


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of the single file; dots are written as two underscores."""
    path = folder / "model.safetensors"
    content = load_file(path)
    for name, tensor in tensors.items():
        content.pop(name.replace("__", "."), None)
        if tensor is not None:
            content[name.replace("__", ".")] = tensor.clone()
    save_file(content, path)


def test_tensors_that_are_not_the_models(folder: Path, take: Take) -> None:
    save_source(folder, "llama")
    fresh = (folder / "model.safetensors").read_bytes()
    wide, norm = torch.zeros(400, 40), torch.zeros(32)
    for tensors, message in (
        ({"model__norm__weight": None}, "weights .* lack model.norm.weight;"),
        ({"lm_head__weight": None}, "weights .* lack lm_head.weight;"),
        ({"model__norm__bias": norm}, "weights .* have the unknown model.norm.bias;"),
        ({f"x{i}": norm for i in range(5)}, "the unknown x0, x1, x2 and 2 more;"),
        ({"lm_head__weight": wide}, r"the shapes lm_head.weight \[400, 40\] instead of \[400, 32\]"),
        ({"model__norm__weight": norm.to(torch.int8)}, "model.norm.weight in .* is I8; only weights in F32, F16, BF16"),
    ):
        (folder / "model.safetensors").write_bytes(fresh)
        change(folder, **tensors)
        with pytest.raises(ConfigError, match=message):
            take()


def test_files_that_are_damaged_or_missing(folder: Path, take: Take) -> None:
    save_source(folder, "llama", shard="20KB")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first = folder / sorted(set(weight_map.values()))[0]
    content = first.read_bytes()
    first.write_bytes(content[:-7])
    with pytest.raises(ConfigError, match=f"cannot read .*{first.name}: .*get it again"):
        take()
    first.unlink()
    with pytest.raises(ConfigError, match=f"cannot read .*{first.name}: No such file; get it again"):
        take()
    first.write_bytes(content)
    for changed, message in (
        ({**weight_map, "lm_head.weight": "../other.safetensors"}, "lm_head.weight in .* which is not beside it"),
        ({**weight_map, "more.weight": first.name}, f"{first.name} lacks more.weight, which model.safetensors.index"),
        ({}, "has no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ConfigError, match=message):
            take()
    index.unlink()
    with pytest.raises(ConfigError, match="has no model.safetensors or model.safetensors.index.json; give the folder"):
        take()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="only pytorch_model.bin; pickles are not read, so convert it"):
        take()


def test_tensors_are_read_as_they_are(folder: Path) -> None:
    folder.mkdir()
    values = torch.tensor([1.0, 1 / 3, 1e-40, float("inf")])
    save_file({"a": values, "b": values.bfloat16()}, folder / "model.safetensors")
    tensors = SourceTensors(folder)
    assert tensors.shapes == {"a": (4,), "b": (4,)}
    assert torch.equal(tensors.read("a"), values) and torch.equal(tensors.read("b"), values.bfloat16().float())
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot read .*: No such file"):
        tensors.read("a")


def convert(folder: Path, mask_token: str | None = None) -> SourceTokenizer:
    found = convert_tokenizer(folder, folder.with_name("converted"), mask_token=mask_token)
    again = load_tokenizer(str(folder.with_name("converted")))
    ours = found.tokenizer
    assert again.fingerprint == ours.fingerprint and again.vocab_size == ours.vocab_size
    for text in ("the theory\n of <|mask|> things <|endoftext|>", "na\u00efve \U0001f600"):
        assert ours.encode(text) == load_tokenizer(str(folder)).encode(text)
        assert ours.decode(ours.encode(text)) == text
    return found


def test_control_tokens(folder: Path) -> None:
    size = save_tokenizer(folder)
    found = convert(folder)
    assert (found.size, found.mask_token, found.end_token) == (size, "<|mask|>", "<|endoftext|>")
    ids = found.tokenizer
    assert (ids.mask_token_id, ids.end_of_document_id, ids.vocab_size) == (size, 0, size + 1)
    found = convert(folder, "<|hole|>")
    assert (found.mask_token, found.tokenizer.mask_token_id) == ("<|hole|>", size)

    save_tokenizer(
        folder, special=("<end>", "<|endoftext|>", "<hole>"), eos_token="<end>", mask_token={"content": "<hole>"}
    )
    found = convert(folder)
    assert (found.tokenizer.mask_token_id, found.tokenizer.end_of_document_id) == (2, 0)
    assert found.tokenizer.vocab_size == found.size
    assert convert(folder, "<|endoftext|>").tokenizer.mask_token_id == 1  # a special token, and not what ends a text

    size = save_tokenizer(folder, special=())  # no control token at all: both are added, with names
    found = convert(folder)
    ids = found.tokenizer
    assert (ids.end_of_document_id, ids.mask_token_id, ids.vocab_size) == (size, size + 1, size + 2)
    saved = tokenizers.Tokenizer.from_file(str(folder.with_name("converted") / "tokenizer.json"))
    assert (saved.token_to_id("<|end_of_document|>"), saved.token_to_id("<|mask|>")) == (size, size + 1)
    settings = json.loads((folder.with_name("converted") / "tokenizer_config.json").read_text())
    assert settings == {"eos_token": "<|end_of_document|>", "mask_token": "<|mask|>"}


def test_special_tokens_of_older_versions(folder: Path) -> None:
    save_tokenizer(folder, special=("<hole>", "<end>", "<|endoftext|>"))
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<end>"}, "pad_token": "<x>"}')
    assert convert(folder).end_token == "<end>"


def test_unchanged_where_nothing_is_new(folder: Path) -> None:
    save_tokenizer(folder, special=("<|endoftext|>", "<|mask|>"), chat_template="{{ x }}")
    convert(folder)
    made = folder.with_name("converted")
    assert (made / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    settings = json.loads((made / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ x }}" and settings["mask_token"] == "<|mask|>"


def test_masks_that_are_refused(folder: Path, take: Take) -> None:
    save_source(folder, "llama")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "<|mask|>": 1, "the": 2}, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(["<|mask|>", "<end>"])  # text can spell the first: it is a word too
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    for name, message in (
        ("the", "the of .*tokenizer.json is a word that a text can have in it"),
        ("<|mask|>", "is a word that a text can have in it, so it cannot be .MASK."),
        (None, "<.mask.> of .* is a word that a text can have in it"),
        ("<end>", "<end> of .* ends a text, so it cannot be"),
        (" ", "the mask token has no name"),
    ):
        with pytest.raises(DataError, match=message):
            take(mask_token=name)
    assert convert_tokenizer(folder, folder / "made", mask_token="<hole>").tokenizer.mask_token_id == 4


def test_tokenizers_that_are_refused(folder: Path, take: Take) -> None:
    save_source(folder, "llama")
    for name, content, kind, message in (
        (
            "tokenizer_config.json",
            "{",
            ConfigError,
            "tokenizer_config.json is not JSON: .*; get it again",
        ),
        ("tokenizer_config.json", "[]", ConfigError, "tokenizer_config.json is not a JSON object; get it again"),
        ("tokenizer.json", "{}", DataError, "is no tokenizer.json"),
        ("tokenizer.json", None, DataError, "has no tokenizer.json, so no tokenizer that can be taken over"),
    ):
        save_tokenizer(folder)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)
        with pytest.raises(kind, match=message):
            take()
    tokenizers.Tokenizer(tokenizers.models.WordLevel({}, unk_token="x")).save(str(folder / "tokenizer.json"))
    with pytest.raises(DataError, match="tokenizer.json has no tokens; give the tokenizer of the model"):
        convert_tokenizer(folder, folder / "made", mask_token=None)
    gaps = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "the": 7}, unk_token="[UNK]"))
    gaps.save(str(folder / "tokenizer.json"))
    with pytest.raises(
        DataError, match="has gaps between its ids, so <.end_of_document.> and <.mask.> cannot be added"
    ):
        take()
