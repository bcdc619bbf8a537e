"""Exports compute what the trainer computes, from every layout: logits, tokens, and through the import back again."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_dlm.config.tree import Config
from megatron_dlm.hf.export import export
from megatron_dlm.parallel import topology as parallel
from tests.ranks import run_ranks
from tests.runs import tiny_config

LAYOUTS = {
    "TP1": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2xVP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "TP2+SP-PP2": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
    },
}
MODELS = [
    {"objective": objective, "tie_embeddings": tied, "num_query_groups": groups, "qk_norm": groups == 2}
    for objective, tied, groups in product(("masked_diffusion", "autoregressive"), (False, True), (2, 4))
]
TOKENS = torch.randint(0, 256, (3, 18), generator=torch.Generator().manual_seed(1))
PROMPTS = [list(b"The import"), list(b"def")]


def configs(data: Path, folder: Path, layout: str, precision: str = "fp32") -> list[Config]:
    return [
        tiny_config(
            data,
            run={"directory": str(folder / f"run{index}")},
            model=model,
            parallel=LAYOUTS[layout],
            train={"steps": 3, "precision": precision, "global_batch_size": 8},
            optimizer={"lr": 3.0e-2, "warmup_steps": 0, "decay_steps": 1},  # far from what weights began with
        )
        for index, model in enumerate(MODELS)
    ]


def train_and_save(cases: list[Config]) -> list[tuple[torch.Tensor, list[list[int]]]]:
    """Logits and greedy texts of every run's model; its checkpoint is in its run directory."""
    from megatron_dlm.generation.denoiser import Denoiser
    from megatron_dlm.generation.text_model import TextModel
    from megatron_dlm.shipped.sampler_plan import SamplerOptions
    from megatron_dlm.training.saving import save
    from megatron_dlm.training.setup import build
    from megatron_dlm.training.step import train_step

    results = []
    for config in cases:
        topology = parallel.initialize(config.parallel)
        training = build(config, topology)
        for step in range(3):
            train_step(training, training.progress_at(step))
        save(training, training.progress_at(3))
        denoiser = Denoiser(training.chunks, topology)
        autoregressive = config.model.objective == "autoregressive"
        model = TextModel(denoiser, training.tokenizer, config.model.kind, 32, topology.device, "")
        options = SamplerOptions() if autoregressive else SamplerOptions(steps=4, block_length=4)
        texts = model.generate(PROMPTS, options, max_new_tokens=8).tokens
        results.append((denoiser(TOKENS), texts))
    return results


def load(directory: Path) -> Any:
    architecture = AutoConfig.from_pretrained(directory, trust_remote_code=True).architectures[0]
    remote = architecture == "DLMForMaskedDiffusion"
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=remote, output_loading_info=True, dtype="auto"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert type(model).__name__ == architecture
    return model.eval()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_texts_of_trainer_and_export(layout: str, tiny_data: Path, tmp_path: Path) -> None:
    from megatron_dlm.generation.text_model import open_text_model
    from megatron_dlm.shipped.sampler_plan import SamplerOptions

    cases = configs(tiny_data, tmp_path, layout)
    results = run_ranks(train_and_save, cases[0].parallel.model_parallel_size, tmp_path, cases)
    worst = 0.0
    for config, (expected, texts) in zip(cases, results, strict=True):
        directory = tmp_path / "export" / Path(config.run.directory).name
        directory.parent.mkdir(exist_ok=True)
        export(Path(config.run.directory), directory)
        model, diffusion = load(directory), config.model.objective == "masked_diffusion"
        names = ("Qwen3ForCausalLM", "LlamaForCausalLM")
        name = "DLMForMaskedDiffusion" if diffusion else names[not config.model.qk_norm]
        assert type(model).__name__ == name
        with torch.no_grad():
            logits = model(TOKENS).logits
        assert logits.shape == (3, 18, 258) and expected.std() > 0.3
        worst = max(worst, float((logits - expected).abs().max()))
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=diffusion)
        assert tokenizer.mask_token_id == 257 and tokenizer.eos_token_id == 256
        opened = open_text_model(str(directory))
        options = SamplerOptions(steps=4, block_length=4) if diffusion else SamplerOptions()
        assert opened.generate(PROMPTS, options, max_new_tokens=8).tokens == texts, "the same text, with a cache or not"
    print(f"EXPORT {layout:<10} largest difference of logits {worst:.1e}")
    assert worst < 1e-5


def test_bf16_differs_by_what_bf16_loses(tiny_data: Path, tmp_path: Path) -> None:
    cases = configs(tiny_data, tmp_path, "TP2", "bf16")[:5:4]
    results = run_ranks(train_and_save, 2, tmp_path, cases)
    for config, (expected, _) in zip(cases, results, strict=True):
        directory = tmp_path / Path(config.run.directory).name / "export"
        export(Path(config.run.directory), directory)
        model = load(directory)
        assert model.dtype == torch.bfloat16
        with torch.no_grad():
            logits = model(TOKENS).logits.float()
            exact = model.float()(TOKENS).logits
        lost = (logits - exact).abs().max()  # what bf16 arithmetic loses with the same weights
        assert lost > 1e-3 and (expected - exact).abs().max() < 1.5 * lost
