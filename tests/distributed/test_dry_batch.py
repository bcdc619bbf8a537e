"""The dry batch is as heavy as any step, leaves no trace, and says what to do where memory does not suffice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

import megatron_dlm.training.dry_batch as dry
from megatron_dlm.cli import main
from megatron_dlm.config.load import to_dict
from megatron_dlm.config.tree import Config
from megatron_dlm.errors import ConfigError
from megatron_dlm.model.transformer import TokenLosses
from megatron_dlm.parallel.topology import initialize
from megatron_dlm.training.progress import Progress
from megatron_dlm.training.setup import build
from megatron_dlm.training.state import Training
from megatron_dlm.training.step import train_step
from tests.ranks import run_ranks
from tests.runs import tiny_config

PP2 = {"pipeline_model_parallel_size": 2}
PP2_VP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
# Dropout would give a trace in the random streams away, and two layers of it are enough.
DROPOUT = {"num_layers": 4, "hidden_dropout": 0.1, "attention_dropout": 0.1}


def figures(config: Config, *, with_dry_batch: bool) -> list[tuple[float, float]]:
    """(loss, gradient norm) of four steps, and the dry batch before the first of them or not."""
    training = build(config, initialize(config.parallel))
    if with_dry_batch:
        line = dry.dry_batch(training, Progress())
        assert line.startswith("dry batch  ok in ") and line.endswith(" GiB")
        grads = [p.main_grad for chunk in training.chunks for p in chunk.parameters()]
        assert not any(bool(g.any()) for g in grads), "the gradients are cleared"
        states = [state for part in training.optimizer.parts for state in part.optimizer.state.values()]
        assert states and not any(bool(value.any()) for state in states for value in state.values())
    reports = [train_step(training, training.progress_at(step)) for step in range(4)]
    return [(report.loss, report.grad_norm) for report in reports]


def with_and_without(configs: list[Config]) -> list[tuple[Any, Any]]:
    return [(figures(c, with_dry_batch=True), figures(c, with_dry_batch=False)) for c in configs]


@pytest.mark.parametrize("world", [1, 2])
def test_no_trace_is_left(world: int, tiny_data: Path, tmp_path: Path) -> None:
    overlap = {"ddp_config": {"overlap_grad_reduce": True}}
    cases: list[dict[str, Any]] = (
        [{}, {"model": {**DROPOUT, "objective": "autoregressive"}}, {"data": {"valid": []}}]
        if world == 1
        else [{"parallel": PP2_VP2}, {"parallel": PP2, "train": {"precision": "bf16"}}, {"parallel": overlap}]
    )
    configs = [tiny_config(tiny_data, **{"model": DROPOUT, **case}) for case in cases]
    for with_it, without in run_ranks(with_and_without, world, tmp_path, configs):
        assert with_it == without


def held(training: Training) -> Iterator[list[int]]:
    """Counts [now, at most] the micro-batches whose backward pass is to come, over this rank's chunks."""
    counts = [0, 0]

    def forward(module: Any, inputs: Any, output: torch.Tensor | TokenLosses) -> None:
        tensor = output.loss_sum if isinstance(output, TokenLosses) else output
        if torch.is_grad_enabled():
            counts[0] += 1
            counts[1] = max(counts)
            tensor.register_hook(backward)

    def backward(gradient: torch.Tensor) -> None:
        counts[0] -= 1

    hooks = [chunk.register_forward_hook(forward) for chunk in training.chunks]
    yield counts
    for hook in hooks:
        hook.remove()


def most_held(configs: list[Config]) -> list[list[list[int]]]:
    """[config][dry batch, training step][rank]: micro-batches held at once."""
    results = []
    for config in configs:
        training = build(config, initialize(config.parallel))
        own = []
        for run in (lambda t=training: dry.dry_batch(t, Progress()), lambda t=training: train_step(t, Progress())):
            for counts in held(training):
                run()
                assert counts[0] == 0
                own.append(counts[1])
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        results.append([list(values) for values in zip(*ranks, strict=True)])
    return results


def test_every_stage_holds_as_many_micro_batches_as_in_training(tiny_data: Path, tmp_path: Path) -> None:
    layouts = [{"pipeline_model_parallel_size": 4}, PP2_VP2]
    sizes = {"micro_batch_size": 1, "global_batch_size": 16}
    configs = [tiny_config(tiny_data, parallel=layout, train=sizes) for layout in layouts]
    plain, interleaved = run_ranks(most_held, 4, tmp_path, configs)
    assert plain == [[4, 3, 2, 1]] * 2
    assert interleaved[0] == interleaved[1] and max(interleaved[0]) == 5  # more than the PP x VP = 4 of one round


@pytest.mark.parametrize("objective", ["masked_diffusion", "autoregressive"])
def test_the_head_computes_every_row_of_full_sequences(objective: str, tiny_data: Path) -> None:
    short = {"random_length_probability": 1.0}
    config = tiny_config(tiny_data, model={"objective": objective}, diffusion=short)
    training = build(config, initialize(config.parallel))
    micro_batch = next(training.train_stream.training(Progress(), reads_tokens=True))
    heaviest = dry._heaviest(micro_batch, training.tokenizer.mask_token_id)
    assert heaviest.lengths is None and heaviest.batch.lengths is None
    seen = []
    hook = training.chunks[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        training.chunks[0](heaviest.inputs, heaviest.lengths, heaviest.batch)
    finally:
        hook.remove()
    assert seen[0].cross_entropy.shape == (2 * 32,) and bool((heaviest.batch.weights != 0).all())
    masked = heaviest.inputs == training.tokenizer.mask_token_id
    assert bool(masked.all()) == (objective == "masked_diffusion")
    on_a_middle_stage = micro_batch._replace(inputs=None, batch=None)
    assert dry._heaviest(on_a_middle_stage, 0).lengths is None


ERRORS = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
    "NCCL": RuntimeError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"),
    "host": MemoryError(),
}


@pytest.mark.parametrize("where", ERRORS)
def test_out_of_memory_is_one_line_and_exit_2(
    where: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ERRORS[where]

    monkeypatch.setattr(dry, "accumulate_gradients", fail)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(to_dict(tiny_config(tiny_data, run={"directory": str(tmp_path / "run")}))))
    assert main(["train", "--config", str(config)]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "out of memory in the dry batch before the first step (2 x 32 tokens" in error
    assert "lower train.micro_batch_size (now 2), or set train.recompute to full, or raise parallel.tensor" in error
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_advice_names_only_what_can_still_be_done(tiny_data: Path) -> None:
    config = tiny_config(tiny_data, train={"steps": 20, "micro_batch_size": 1, "recompute": "full"})
    advice = dry._advice(config)
    assert "micro_batch_size (" not in advice and "recompute" not in advice and "tensor_model_parallel" in advice


def test_other_errors_keep_their_traceback(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(dry, "accumulate_gradients", fail)
    config = tiny_config(tiny_data)
    with pytest.raises(RuntimeError, match="shapes do not match") as raised:
        dry.dry_batch(build(config, initialize(config.parallel)), Progress())
    assert not isinstance(raised.value, ConfigError)
