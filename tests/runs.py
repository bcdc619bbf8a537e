"""Tiny training runs that tests compare with one another."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dlm.config.load import from_dict
from megatron_dlm.config.tree import Config
from megatron_dlm.parallel import topology as parallel

TINY: dict[str, Any] = {
    "run": {"seed": 7},
    "model": {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 96,
        "vocab_size_multiple": 64,
    },
    "diffusion": {"random_length_probability": 0.1},
    "data": {"tokenizer": "byte", "sequence_length": 32},
    "train": {"steps": 20, "micro_batch_size": 2, "global_batch_size": 16},
    "optimizer": {"lr": 1.0e-3, "min_lr": 1.0e-4, "warmup_steps": 3, "decay_steps": 5},
    "evaluate": {"interval": 1000, "sequences": 9},
}


def write_data(folder: Path) -> Path:
    """``folder``, with ``train`` and ``valid`` token files: some chapters of the language reference, in bytes."""
    from pydoc_data.topics import topics

    from megatron_dlm.preparation.prepare import PrepareOptions, prepare

    inputs = folder / "chapters"
    inputs.mkdir()
    for name in sorted(topics)[:24]:
        (inputs / f"{name.replace('/', '-')}.txt").write_text(topics[name][:4000], encoding="utf-8")
    prepare(PrepareOptions(output=folder, inputs=[inputs], tokenizer="byte", valid_fraction=0.2))
    return folder


def tiny_config(data: Path, /, **sections: dict[str, Any]) -> Config:
    """The tiny run on the data prefixes ``data/train`` and ``data/valid``, with sections updated."""
    tree = {name: dict(values) for name, values in TINY.items()}
    tree["data"] |= {"train": [{"path": str(data / "train")}], "valid": [{"path": str(data / "valid")}]}
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return from_dict(tree)


@dataclass
class Trace:
    """What a run did, gathered on rank 0."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    nelbo: float = 0.0
    noised: dict[tuple[int, int], str] = field(default_factory=dict)
    """Digest of what the first stage was fed (xt) for every (step, sample id)."""
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    """The whole tensors, assembled from all ranks."""
    logits: torch.Tensor | None = None


def run_cases(configs: list[Config], steps: int) -> list[Trace]:
    """Train every configuration on this rank's process group, one after the other."""
    return [trace(config, steps) for config in configs]


def trace(config: Config, steps: int, perturbation: float = 0.0) -> Trace:
    """Train for ``steps`` steps, from weights that are wrong by ``perturbation``, relatively; collective."""
    from megatron_dlm.generation.denoiser import Denoiser
    from megatron_dlm.training.held_out import held_out_nelbo
    from megatron_dlm.training.setup import build
    from megatron_dlm.training.step import train_step

    topology = parallel.initialize(config.parallel)
    training = build(config, topology)
    if perturbation:
        generator = torch.Generator().manual_seed(0)
        for parameter in (parameter for chunk in training.chunks for parameter in chunk.parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.mul_(1 + perturbation * noise)
        for part in training.optimizer.parts:
            part.reload_model_params()
    result = Trace()
    noised: dict[tuple[int, int], str] = {}
    fed: list[torch.Tensor] = []
    hooks = [
        chunk.module.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0].clone()))
        for chunk in training.chunks
        if chunk.module.pre_process
    ]
    for step in range(steps):
        report = train_step(training, training.progress_at(step))
        result.losses.append(report.loss)
        result.grad_norms.append(report.grad_norm)
        micro_batches = training.train_stream.training(training.progress_at(step), reads_tokens=False)
        for micro_batch, tokens in zip(micro_batches, fed, strict=bool(fed)):
            for sample, row in zip(micro_batch.sample_ids.tolist(), tokens, strict=True):
                noised[step, sample] = hashlib.sha256(row.numpy().tobytes()).hexdigest()
        fed.clear()
    for hook in hooks:
        hook.remove()
    count = training.valid_sequences
    result.nelbo = held_out_nelbo(training.chunks, training.valid_stream, topology, num_sequences=count).nelbo
    tokens = torch.from_numpy(training.valid_stream.dataset.sequences(torch.arange(2).numpy()))
    denoise = Denoiser(training.chunks, topology)
    result.logits = denoise(tokens)
    rows = torch.tensor([3, 4, 17, 20, 31])
    torch.testing.assert_close(denoise(tokens, rows=rows), result.logits.flatten(0, 1)[rows], rtol=1e-4, atol=1e-5)
    for part in _gather(noised):
        assert all(result.noised.get(key, digest) == digest for key, digest in part.items()), "ranks disagree about xt"
        result.noised.update(part)
    result.parameters = assemble(_gather(shards(training.chunks)))
    return result


def shards(chunks: list[Any]) -> list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]:
    """(key, global shape, offset, data) of this rank's parameters."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    found = []
    for chunk in chunks:
        state = chunk.module.sharded_state_dict(metadata={"non_homogeneous_layers": True})
        apply_factories(state)
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor):
                found.append(
                    (tensor.key, tuple(tensor.global_shape), tensor.global_offset, tensor.data.detach().clone())
                )
    return found


def assemble(parts: list[Any]) -> dict[str, torch.Tensor]:
    """Whole tensors from all ranks' shards."""
    whole: dict[str, torch.Tensor] = {}
    for part in parts:
        for key, shape, offset, data in part:
            target = whole.setdefault(key, torch.full(shape, float("nan")))
            target[tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))] = data
    return whole


def _gather(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
