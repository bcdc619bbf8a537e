"""Exports in other people's programs: transformers' Trainer, and lm-eval's own model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from megatron_dlm.hf.export import export
from tests.exports import make_checkpoint


def test_the_trainer_of_transformers_takes_a_step(tmp_path: Path) -> None:
    export(make_checkpoint(tmp_path / "source"), tmp_path / "hf", dtype="fp32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        str(tmp_path / "trainer"),
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    assert 0 < trainer.train().training_loss < 100
    assert all((parameter != before[name]).any() for name, parameter in model.named_parameters())


def test_the_model_hf_of_lm_eval_agrees_with_ours(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from megatron_dlm.evaluation.lm_eval_model import MegatronDLM

    source = make_checkpoint(tmp_path / "source", objective="autoregressive")
    export(source, tmp_path / "hf", dtype="fp32")
    pairs = [("a list", " of it"), ("the class", " of names")]
    requests = [Instance("loglikelihood", {}, pair, 0, metadata=("ours", i, 1)) for i, pair in enumerate(pairs)]
    theirs = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32").loglikelihood(requests, True)
    ours = MegatronDLM(str(source)).loglikelihood(requests, True)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)
