"""What an export holds: weights, configurations, code and model card; and that it is made with little."""

from __future__ import annotations

import ast
import json
import logging
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_dlm.checkpoint import manifest
from megatron_dlm.checkpoint.whole_tensors import WeightsReader
from megatron_dlm.config.load import dump_yaml, from_dict, load_yaml
from megatron_dlm.hf.export import export
from tests.exports import config, content, make_checkpoint

ROOT = Path(__file__).parents[2]
AUTOREGRESSIVE = {"objective": "autoregressive"}
END, MASK = 256, 257  # of the byte tokenizer


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What transformers warns of."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logging.getLogger("transformers").addHandler(handler)
    yield found
    logging.getLogger("transformers").removeHandler(handler)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


def read(directory: Path, name: str) -> dict[str, Any]:
    return json.loads((directory / name).read_text())


def test_the_weights_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    exported = export(source, tmp_path / "out", dtype="bf16")
    found, stored = tensors_of(tmp_path / "out"), WeightsReader(source)
    assert len(found) == 2 * 11 + 3
    embedding = stored.read("embedding.word_embeddings.weight").bfloat16()
    assert embedding.shape == (320, 32) and torch.equal(found["model.embed_tokens.weight"], embedding[:258])
    rows = stored.read("decoder.layers.1.self_attention.linear_qkv.weight", torch.bfloat16).split(12)
    assert torch.equal(found["model.layers.1.self_attn.k_proj.weight"], torch.cat((rows[2], rows[6])))
    assert torch.equal(found["model.norm.weight"], stored.read("decoder.final_layernorm.weight").bfloat16())
    assert exported.parameters == sum(tensor.numel() for tensor in found.values())
    files = content(tmp_path / "out")
    assert exported.files == sorted(files) and exported.bytes == sum(map(len, files.values()))
    assert (exported.directory, exported.architecture) == (tmp_path / "out", "DLMForMaskedDiffusion")


def test_large_models_are_divided_into_files(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    export(source, tmp_path / "one")
    export(source, tmp_path / "many", max_shard_size=20_000)
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    paths = sorted((tmp_path / "many").glob("*.safetensors"))
    count = len(paths)
    assert [path.name for path in paths] == [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    index, largest = read(tmp_path / "many", "model.safetensors.index.json"), 258 * 32 * 4
    sizes = []
    for path in paths:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            names = set(file.keys())
            size = sum(file.get_tensor(name).nbytes for name in names)
        assert size <= 20_000 or (names <= {"lm_head.weight", "model.embed_tokens.weight"} and size == largest)
        assert {name for name, where in index["weight_map"].items() if where == path.name} == names
        assert path.stat().st_mode == (tmp_path / "many" / "config.json").stat().st_mode
        sizes.append(size)
    assert all(a + b > 20_000 for a, b in zip(sizes, sizes[1:], strict=False)), "no more files than need be"
    assert index["metadata"]["total_size"] == sum(sizes)
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)


def test_the_precision_is_the_runs_unless_given(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", precision="bf16")
    for dtype, expected in ((None, torch.bfloat16), ("fp32", torch.float32)):
        output = tmp_path / str(dtype)
        export(source, output, dtype=dtype)
        assert {tensor.dtype for tensor in tensors_of(output).values()} == {expected}
        assert f"torch.{read(output, 'config.json')['dtype']}" == str(expected)


def test_configuration_of_a_diffusion_model(tmp_path: Path) -> None:
    export(make_checkpoint(tmp_path / "source"), tmp_path / "out")
    found = read(tmp_path / "out", "config.json")
    expected = {
        "architectures": ["DLMForMaskedDiffusion"],
        "model_type": "megatron_dlm",
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "use_cache": False,
        "qk_norm": True,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": None,
        "mask_token_id": MASK,
        "torch_dtype": "float32",
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["auto_map"]["AutoConfig"] == "configuration_dlm.DLMConfig"
    models = {found["auto_map"][f"AutoModel{suffix}"] for suffix in ("", "ForCausalLM", "ForMaskedLM")}
    assert models == {"modeling_dlm.DLMForMaskedDiffusion"}
    assert read(tmp_path / "out", "generation_config.json") == {
        "eos_token_id": END,
        "pad_token_id": END,
        "mask_token_id": MASK,
        "max_new_tokens": 128,
        "remasking": "low_confidence",
    }


def test_the_code_that_ships_stands_alone(tmp_path: Path) -> None:
    export(make_checkpoint(tmp_path / "source"), tmp_path / "out")
    own = {"configuration_dlm", "modeling_dlm", "sampler", "sampler_plan"}
    assert {path.stem for path in (tmp_path / "out").glob("*.py")} == own
    for name in own:
        for node in ast.walk(ast.parse((tmp_path / "out" / f"{name}.py").read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert not node.level or node.module in own
                names = [] if node.level else [node.module]
            for module in names:
                top = module.split(".")[0]
                assert top in {"torch", "transformers"} or top in sys.stdlib_module_names, (name, module)
    for name in own:
        source = ROOT / "megatron_dlm" / "shipped" / f"{name}.py"
        assert (tmp_path / "out" / source.name).read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("keys", "architecture", "model_type"),
    [
        ({}, "Qwen3ForCausalLM", "qwen3"),
        ({"qk_norm": False, "num_query_groups": 4}, "LlamaForCausalLM", "llama"),
        ({"tie_embeddings": True}, "Qwen3ForCausalLM", "qwen3"),
    ],
)
def test_transformers_loads_autoregressive_models(
    keys: dict[str, Any], architecture: str, model_type: str, tmp_path: Path, warnings: list[str]
) -> None:
    from transformers import AutoModelForCausalLM

    settings = {**AUTOREGRESSIVE, "rope_theta": 5e5, "norm_eps": 1e-5, **keys}
    source = make_checkpoint(tmp_path / "source", **settings)
    exported = export(source, tmp_path / "out", max_shard_size=20_000)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not warnings
    assert not any(info.values()), info
    assert type(model).__name__ == exported.architecture == architecture and model.dtype == torch.float32
    parameters = dict(model.named_parameters())
    written = tensors_of(tmp_path / "out")
    assert parameters.keys() == written.keys()
    assert all(torch.equal(parameters[name], tensor) for name, tensor in written.items())
    assert sum(parameter.numel() for parameter in parameters.values()) == exported.parameters
    loaded = model.config
    assert (loaded.model_type, loaded.vocab_size, loaded.head_dim, loaded.rms_norm_eps) == (model_type, 258, 12, 1e-5)
    assert loaded.rope_parameters["rope_theta"] == 5e5 and loaded.max_position_embeddings == 64
    assert (loaded.bos_token_id, loaded.eos_token_id) == (END, END) and model.generation_config.pad_token_id == END
    assert model.get_input_embeddings().padding_idx is None, "end-of-document goes on learning"
    assert loaded.tie_word_embeddings == keys.get("tie_embeddings", False)
    assert not list((tmp_path / "out").glob("*.py")) and "auto_map" not in read(tmp_path / "out", "config.json")

    def want_mask(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([MASK]), 1e4)

    model.lm_head.register_forward_hook(want_mask)
    tokens = model.generate(torch.tensor([[END, 65]]), max_new_tokens=3)
    assert tokens.shape[1] > 2 and MASK not in tokens
    assert not model.generation_config.do_sample


def test_neither_megatron_nor_transformers_is_needed(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    code = (
        "import sys; from megatron_dlm.cli import main\n"
        "assert main(['export', '--checkpoint', sys.argv[1], '--output', sys.argv[2]]) == 0\n"
        "assert not {'megatron', 'transformers'} & set(sys.modules)\n"
        "import torch.distributed as dist; assert not dist.is_initialized()"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stderr == "", "no warnings, and no bar where there is no terminal"
    lines = run.stdout.splitlines()
    assert lines[0] == f"exported {tmp_path / 'out'}"
    assert lines[-1] == f"next: megatron-dlm sample --checkpoint {tmp_path / 'out'} --prompt 'The '"


@pytest.mark.parametrize("recorded", ["checkpoint-0.16.1", "checkpoint-0.19.2"])
def test_recorded_checkpoints_of_two_pipeline_stages(recorded: str, tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    with tarfile.open(ROOT / "tests" / "golden" / f"{recorded}.tgz") as archive:
        archive.extractall(root, filter="data")
    exported = export(tmp_path / "run", tmp_path / "out")
    stored = WeightsReader(root / "step-00000006")
    padding = sum(stored.tensors[key].shape[0] - 258 for key in stored.tensors if "word_emb" in key or "output" in key)
    whole = sum(torch.Size(info.shape).numel() for info in stored.tensors.values())
    assert len(stored.files) == 2 and exported.parameters == whole - 16 * padding


def test_the_model_card(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000000")
    info = read(source, "checkpoint.json") | {"step": 20, "consumed_samples": 320, "layout": "TP2-PP1"}
    (source / "checkpoint.json").write_text(json.dumps(info))
    manifest.write(source, {})
    export(source, tmp_path / "without")
    card = (tmp_path / "without" / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "library_name: transformers\npipeline_tag: text-generation\n" in front and "- masked-diffusion" in front
    for row in (
        "| training tokens | 20,480 |",
        "| held-out NELBO | not recorded |",
        "| trained at layout | TP2-PP1 |",
        "| weights | fp32; trained in fp32 |",
    ):
        assert row in card
    assert "trust_remote_code=True" in card and "mask_token_id" in card
    assert "num_query_groups: 2" in card

    def evaluated(step: int, nelbo: float) -> dict[str, float]:
        return {"step": step, "valid_nelbo": nelbo, "valid_nelbo_ci95": 0.25, "valid_bits_per_byte": 2.0}

    records = [
        evaluated(10, 3.0),
        {"step": 19, "epoch": 0.5, "unique_tokens": 19},
        {"step": 20, "epoch": 1.25, "unique_tokens": 16384},
        {"step": 20, "kind": "configuration", "changes": {"optimizer.lr": {"before": 1.0, "after": 2.0}}},
        evaluated(18, 2.5),
        evaluated(18, 9.0),  # of other held-out data, with which the run went on
        evaluated(30, 1.0),
    ]
    text = "".join(json.dumps(record) + "\n" for record in records) + '{"step": 18, "valid_nel'
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    export(source, tmp_path / "with")
    card = (tmp_path / "with" / "README.md").read_text()
    assert "| training tokens | 20,480, 16,384 of them unique (1.25 epochs) |" in card
    assert "| held-out NELBO | 2.5000 +- 0.2500 nats/token (95 % intervals; step 18) |" in card


def test_a_model_card_is_no_place_for_markup(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    hostile = "a|b\n---\n<script>alert(1)</script> `x` [y](javascript:z) ![i](j) ```\n# title"
    stored = config()
    stored.evaluate.prompts, stored.run.directory = [hostile, "````\n</details>"], "runs/```a|b"
    (source / "config.yaml").write_text(dump_yaml(stored))
    info = read(source, "checkpoint.json") | {"imported_from": hostile, "layout": hostile, "versions": {hostile: 1}}
    (source / "checkpoint.json").write_text(json.dumps(info))
    manifest.write(source, {})
    export(source, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    facts, _, block = card.partition("## Configuration of the training run\n\n")
    found = re.fullmatch("(`+)yaml\n(.*)\n\\1\n", block, re.DOTALL)
    assert found and len(found[1]) == 5 and found[1] not in found[2], "nothing in the block ends it"
    assert from_dict(load_yaml(found[2], "card")).evaluate.prompts == stored.evaluate.prompts
    rows = [line for line in facts.splitlines() if line.startswith("|")]
    assert all(row.count("|") == 3 for row in rows) and not {"<", "`", "["} & set("".join(rows))
    assert facts.splitlines().count("---") == 2, "of the front matter"


@pytest.mark.parametrize("objective", ["masked_diffusion", "autoregressive"])
def test_the_examples_of_the_model_card_run(
    objective: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    warnings: list[str],
) -> None:
    export(make_checkpoint(tmp_path / "source", objective=objective), tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    card = Path("README.md").read_text()
    blocks = [block.removeprefix("python\n") for block in card.split("```") if block.startswith("python\n")]
    assert len(blocks) == 1
    exec(compile(blocks[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("The ") and not warnings
    if objective == "masked_diffusion":
        assert "The sun " in printed and " in the west." in printed


def test_an_export_that_is_moved_still_stands_alone(tmp_path: Path) -> None:
    from transformers import AutoConfig

    export(make_checkpoint(tmp_path / "source"), tmp_path / "out")
    shutil.rmtree(tmp_path / "source")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    loaded = AutoConfig.from_pretrained(tmp_path / "elsewhere", trust_remote_code=True)
    assert (loaded.mask_token_id, loaded.qk_norm, loaded.head_dim) == (MASK, True, 12)
    assert config().model.resolved_head_dim == 12
