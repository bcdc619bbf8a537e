"""Which implementation a call takes, and that the choice changes nothing else."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import dlm_kernels
from dlm_kernels import implementation, reference
from dlm_kernels.implementation import resolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_takes_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "triton_is_installed", lambda: True)
    assert resolve("auto", CPU) == resolve("torch", CUDA) == "torch"
    assert resolve("auto", CUDA) == resolve("triton", CUDA) == "triton"
    monkeypatch.setattr(implementation, "triton_is_installed", lambda: False)
    assert resolve("auto", CUDA) == "torch"
    with pytest.raises(ValueError, match="needs the package triton"):
        resolve("triton", CUDA)


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(implementation, "triton_is_installed", lambda: True)
    with pytest.raises(ValueError, match="needs a GPU"):
        resolve("triton", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("triton", CPU) == "triton"
    with pytest.raises(ValueError, match="choose auto, triton or torch"):
        resolve("cuda", CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mask_tokens", "cross_entropy", "linear_cross_entropy"])
def test_public_functions_have_the_arguments_of_their_twins(name: str) -> None:
    public, twin = getattr(dlm_kernels, name), getattr(reference, name)
    parameters = dict(inspect.signature(public).parameters)
    assert parameters.pop("impl").default == "auto"
    assert list(parameters.values()) == list(inspect.signature(twin).parameters.values())
    assert public.__doc__ == twin.__doc__


def test_a_call_is_the_twins() -> None:
    logits, targets, weights = torch.randn(3, 5), torch.tensor([4, 0, 2]), torch.rand(3)
    for impl in ("auto", "torch"):
        ours = dlm_kernels.cross_entropy(logits, targets, weights, impl=impl)
        assert all(
            torch.equal(a, b) for a, b in zip(ours, reference.cross_entropy(logits, targets, weights), strict=True)
        )


def test_the_example_of_the_readme_runs() -> None:
    text = Path(inspect.getfile(dlm_kernels)).with_name("README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    batch, seq, hidden, vocab = 4, 16, 8, 50257
    head = torch.nn.Linear(hidden, vocab, bias=False)
    embedding = torch.nn.Embedding(vocab, hidden)
    names = {
        "tokens": torch.randint(0, 1000, (batch, seq)),
        "step": 3,
        "global_batch": 8,
        "first": 4,
        "MASK": vocab - 1,
        "model": embedding,
        "head": head,
        "tensor_parallel_group": None,
    }
    exec(example, names)
    assert head.weight.grad is not None and embedding.weight.grad is not None
    assert bool(head.weight.grad.isfinite().all()) and bool(head.weight.grad.any())
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 15


def problem() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(8, 6, requires_grad=True),
        "weight": torch.randn(11, 6, requires_grad=True),
        "rows": torch.tensor([0, 3, 5]),
        "targets": torch.tensor([1, 10, 4]),
        "weights": torch.tensor([1.0, 2.0, 0.5]),
    }


def test_all_arguments_can_be_named() -> None:
    names = problem()
    loss = dlm_kernels.linear_cross_entropy(**names)[0]
    assert torch.equal(loss, reference.linear_cross_entropy(*names.values())[0])  # type: ignore[arg-type]


def test_autocast_changes_nothing() -> None:
    names = problem()
    expected = torch.autograd.grad(dlm_kernels.linear_cross_entropy(**names)[0], names["weight"])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = dlm_kernels.linear_cross_entropy(**names)[0]
    assert torch.equal(torch.autograd.grad(loss, names["weight"])[0], expected)
    names["weight"] = names["weight"].detach().bfloat16()
    with pytest.raises(ValueError, match="hidden is torch.float32 and weight torch.bfloat16; pass weight.to"):
        dlm_kernels.linear_cross_entropy(**names)


def test_what_a_kernel_would_read_beyond_is_refused() -> None:
    logits, three, four = torch.randn(4, 5), torch.zeros(3, dtype=torch.int64), torch.ones(4)
    with pytest.raises(ValueError, match=r"cross_entropy: targets has the shape \(3,\) and must have \(4,\)"):
        dlm_kernels.cross_entropy(logits, three, four)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        dlm_kernels.linear_cross_entropy(**problem(), chunk_size=0)  # type: ignore[arg-type]
    tokens, ids = torch.zeros(4, 8, dtype=torch.int64), np.arange(4)
    options = {"seed": 1, "mask_token_id": 9}
    levels = {"levels": torch.ones(4, dtype=torch.int64), "weights": four}
    for changed, message in (
        ({"sample_ids": ids[:1]}, "sample_ids has the shape"),
        ({"levels": torch.ones(2, dtype=torch.int64)}, "levels has the shape"),
        ({"levels": torch.ones(4, dtype=torch.int32)}, "levels are torch.int32"),
        ({"eligible": torch.ones(4, 7, dtype=torch.bool)}, "eligible has the shape"),
        ({"masking": "exact-count"}, "masking is 'exact-count'; choose exact_count or bernoulli"),
    ):
        arguments = {"tokens": tokens, "sample_ids": ids, **options, **levels, **changed}
        with pytest.raises(ValueError, match=message):
            dlm_kernels.mask_tokens(**arguments)
