"""One interface to every model, and the sample command."""

from __future__ import annotations

import io
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dlm.cli import main
from megatron_dlm.config.kinds import MASKED_DIFFUSION
from megatron_dlm.config.tree import Config
from megatron_dlm.data.tokenizer import ByteTokenizer
from megatron_dlm.errors import ConfigError
from megatron_dlm.generation.text_model import TextModel, open_text_model
from megatron_dlm.hf.export import export
from megatron_dlm.parallel import topology as parallel
from megatron_dlm.shipped.sampler import Samples, Step
from megatron_dlm.shipped.sampler_plan import SamplerOptions
from megatron_dlm.training.progress import Progress
from megatron_dlm.training.saving import save
from megatron_dlm.training.setup import build
from tests.runs import tiny_config


def save_run(config: Config) -> None:
    save(build(config, parallel.initialize(config.parallel)), Progress())
    parallel.shutdown()


@pytest.fixture(scope="module")
def models(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained runs of both objectives, and their exports."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for objective in ("masked_diffusion", "autoregressive"):
        run = folder / objective
        model = {"objective": objective, "init_std": 0.3}
        save_run(tiny_config(tiny_data, run={"directory": str(run)}, model=model))
        found[objective] = run
        found[f"{objective} export"] = folder / f"{objective}-export"
        export(run, found[f"{objective} export"])
    return found


@pytest.mark.parametrize(
    "kind", ["masked_diffusion", "autoregressive", "masked_diffusion export", "autoregressive export"]
)
def test_every_kind_of_model_writes(models: dict[str, Path], kind: str) -> None:
    model = open_text_model(str(models[kind]))
    prompts = [model.tokenizer.encode("The import statement"), model.tokenizer.encode("a")]
    steps: list[Step] = []
    options = SamplerOptions(temperature=1.0, seed=4)
    samples = model.generate(prompts, options, max_new_tokens=6, on_step=steps.append)
    assert [row[: len(prompt)] for row, prompt in zip(samples.tokens, prompts, strict=True)] == prompts
    assert samples.prompt_lengths == [20, 1] and all(len(row) <= 6 for row in samples.continuations)
    assert model.tokenizer.mask_token_id not in samples.tokens[0] + samples.tokens[1]
    assert samples.forwards == len(steps) - 1 <= 6 and samples.sequence_forwards >= samples.forwards
    assert steps[0].number == 0 and steps[-1].tokens[0, : len(samples.texts[0])].tolist() == samples.texts[0]
    assert model.generate(prompts, options, max_new_tokens=6).tokens == samples.tokens, "a seed decides the text"
    others = [model.generate(prompts, SamplerOptions(temperature=1.0, seed=s), max_new_tokens=6) for s in range(5, 8)]
    assert any(other.tokens != samples.tokens for other in others)
    alone = model.generate(prompts[1:], SamplerOptions(), max_new_tokens=6)
    assert alone.tokens == model.generate(prompts, SamplerOptions(), max_new_tokens=6).tokens[1:], "padding is not seen"


def test_the_cache_and_recomputing_write_the_same(models: dict[str, Path]) -> None:
    cached, recomputed = (open_text_model(str(models[name])) for name in ("autoregressive export", "autoregressive"))
    prompts = [list(b"for"), list(b""), list(b"a much longer prompt")]
    found = [model.generate(prompts, SamplerOptions(), max_new_tokens=10).tokens for model in (cached, recomputed)]
    assert found[0] == found[1] and len({tuple(row[-10:]) for row in found[0]}) == 3


def test_holes() -> None:
    model = TextModel(None, ByteTokenizer(), MASKED_DIFFUSION, 32, torch.device("cpu"), "")  # type: ignore[arg-type]
    mask = model.tokenizer.mask_token_id
    assert model.encode_holes("a____b_______", 2) == [97, mask, mask, 98, mask, mask]
    assert model.encode_holes("____", 3) == [mask] * 3 and model.encode_holes("___ ____", 1) == [*b"___ ", mask]
    with pytest.raises(ValueError, match="nothing to fill in: write ____"):
        model.encode_holes("a ___ b", 2)


def test_left_to_right_models_refuse_what_they_cannot_do(models: dict[str, Path]) -> None:
    for name in ("autoregressive", "autoregressive export"):
        model = open_text_model(str(models[name]))
        with pytest.raises(ValueError, match="leave out steps, guidance, remasking"):
            model.generate([[1]], SamplerOptions(steps=4, guidance=1.0, remasking="margin"), max_new_tokens=4)
        with pytest.raises(ValueError, match="cannot fill in masks"):
            model.generate([[1, model.tokenizer.mask_token_id]], SamplerOptions(), max_new_tokens=4)


def test_what_is_no_model_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no directory"):
        open_text_model(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="neither a checkpoint nor a config.json"):
        open_text_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="'gpt2'; only megatron_dlm, qwen3, llama"):
        open_text_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json is not JSON: .*; export the model again$"):
        open_text_model(str(tmp_path))
    (models["masked_diffusion export"] / "model.safetensors").rename(tmp_path / "moved")
    try:
        with pytest.raises(ConfigError, match="cannot load .*export it again|cannot load .*export the model again"):
            open_text_model(str(models["masked_diffusion export"]))
    finally:
        (tmp_path / "moved").rename(models["masked_diffusion export"] / "model.safetensors")


def sample(*arguments: str) -> int:
    return main(["sample", *arguments])


@pytest.mark.parametrize("kind", ["masked_diffusion", "autoregressive export"])
def test_the_command_prints_texts_and_nothing_else_on_stdout(models: dict[str, Path], kind: str, capsys: Any) -> None:
    common = ["--checkpoint", str(models[kind]), "--max-new-tokens", "5"]
    assert sample(*common, "--prompt", r"if x:\n\tpass\\n", "--prompt", "b") == 0
    out, err = capsys.readouterr()
    assert out.startswith("if x:\n\tpass\\n") and "\nb" in out
    assert f"model    {models[kind]}" in err and "--- 2 of 2" in err and " forwards, " in err and " tokens/s" in err
    assert sample(*common) == 0, "a text from nothing"


def test_a_text_that_ends_at_once_is_said(
    models: dict[str, Path], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = TextModel.generate

    def ends_at_once(model: TextModel, prompts: Any, *arguments: Any, **options: Any) -> Samples:
        found = generate(model, prompts, *arguments, **options)
        end = model.tokenizer.end_of_document_id
        row = [*prompts[0], *[end] * (len(found.tokens[0]) - len(prompts[0]))]
        return found._replace(tokens=[row, *found.tokens[1:]], end_of_document_id=end)

    monkeypatch.setattr(TextModel, "generate", ends_at_once)
    common = ["--checkpoint", str(models["masked_diffusion"]), "--max-new-tokens", "3", "--prompt", "a"]
    assert sample(*common) == 0
    out, err = capsys.readouterr()
    assert out == "a\n" and "note     end-of-document came first, so nothing follows; try" in err and "speed" not in err
    assert sample(*common, "--prompt", "b") == 0
    err = capsys.readouterr().err
    assert "end-of-document came first in 1 of 2 texts" in err and "3 tokens in 3 forwards" in err


def test_the_command_fills_in_and_traces(models: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    page = tmp_path / "page.html"
    common = ["--checkpoint", str(models["masked_diffusion export"]), "--seed", "3", "--temperature", "1"]
    assert sample(*common, "--infill", r"a ____ z\n", "--infill-tokens", "4", "--trace", str(page)) == 0
    out, err = capsys.readouterr()
    assert out.startswith("a ") and out.endswith(" z\n\n") and "4 tokens in 4 forwards" in err
    assert f"trace    {page}" in err and page.read_text(encoding="ascii").startswith("<!doctype html>")


def test_prompt_files(models: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "prompt.txt").write_text("one\ntwo \\n", encoding="utf-8")
    common = ["--checkpoint", str(models["masked_diffusion"]), "--max-new-tokens", "3"]
    assert sample(*common, "--prompt-file", str(tmp_path / "prompt.txt")) == 0
    assert capsys.readouterr().out.startswith("one\ntwo \\n"), "a file is taken as it is"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--infill", "b ____"], "not allowed with argument"),
        (["--infill", "b"], "nothing to fill in"),
        (["--steps", "0"], "steps is 0"),
        (["--steps", "2", "--max-new-tokens", "99"], "at least the number of blocks (4)"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--infill", "____", "--infill-tokens", "0"], "--infill-tokens is 0"),
        (["--prompt-file", "/nowhere"], "cannot read the prompt /nowhere"),
        (["--trace", "/nowhere/page.html"], "/nowhere is no directory"),
        (["--trace", "/dev/null"], "ends in .html"),
        (["--trace", "/tmp"], "ends in .html"),
        (["--prompt", "a\udcff"], "is not UTF-8"),
        (["--tensor-model-parallel-size", "0"], "must be at least 1"),
        (["--max-new-tokens", str(10**10)], "--max-new-tokens is 10000000000"),
        (["--tensor-model-parallel-size", "2"], "torchrun --nproc-per-node 2"),
        (["--seed", "-1"], "seed is -1"),
    ],
)
def test_refusals_are_one_line(models: dict[str, Path], arguments: list[str], message: str, capsys: Any) -> None:
    assert sample("--checkpoint", str(models["masked_diffusion"]), *arguments) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith("megatron-dlm: error: ") and message in last and not out


def test_autoregressive_refusals_are_one_line(models: dict[str, Path], capsys: Any) -> None:
    assert sample("--checkpoint", str(models["autoregressive"]), "--infill", "a ____") == 2
    assert "cannot fill in masks inside a text" in capsys.readouterr().err
    assert sample("--checkpoint", "/nowhere") == 2
    assert capsys.readouterr().err == (
        "megatron-dlm: error: /nowhere is no directory; give a run, a checkpoint, or a Hugging Face directory\n"
    )


def test_pipelines_of_transformers_write(models: dict[str, Path]) -> None:
    from transformers import pipeline

    path = str(models["masked_diffusion export"])
    writer = pipeline("text-generation", model=path, trust_remote_code=True, device="cpu")
    for settings in ({}, {"do_sample": False}, {"do_sample": True, "num_beams": 1}):
        (found,) = writer("The import", max_new_tokens=6, **settings)
        assert found["generated_text"].startswith("The import")


def test_weights_that_are_not_there_are_not_made_up(models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(models["masked_diffusion export"], folder)
    weights = load_file(folder / "model.safetensors")
    head = weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"not those of its config.json \(missing lm_head.weight\)"):
        open_text_model(str(folder))
    more = {**weights, "lm_head.weight": head, "more": head.clone()}
    save_file(more, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="unexpected more"):
        open_text_model(str(folder))
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ConfigError, match="cannot load"):
        open_text_model(str(folder))


def test_a_stream_that_cannot_show_a_text_gets_escapes(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "latin-1"))
    model = str(models["masked_diffusion export"])
    assert main(["sample", "--checkpoint", model, "--prompt", "a\u20ac", "--max-new-tokens", "2"]) == 0
    assert written.getvalue().startswith(b"a\\u20ac")


def test_a_reader_that_has_seen_enough_is_no_error(models: dict[str, Path]) -> None:
    """In a process of its own, which says nothing at its end either."""
    command = [sys.executable, "-m", "megatron_dlm", "sample", "--checkpoint", str(models["masked_diffusion export"])]
    piped = subprocess.run(
        f"{shlex.join(command)} --prompt a --prompt b --max-new-tokens 2 | head -c 0",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in piped.stderr
