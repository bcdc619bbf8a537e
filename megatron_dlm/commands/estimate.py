"""`megatron-dlm estimate`: what generating text and training cost, in FLOPs; no GPU and no data are needed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_dlm.config.tree import ModelConfig
from megatron_dlm.errors import ConfigError
from megatron_dlm.flops import PublishedConvention
from megatron_dlm.shipped.sampler_plan import DEFAULT_BLOCK_LENGTH

if TYPE_CHECKING:
    from megatron_dlm.costs.inference import Curve, InferenceCosts
    from megatron_dlm.costs.training import Point, TrainingCosts

_UNITS = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
_OBJECTIVES = {"autoregressive": "autoregressive", "diffusion": "masked_diffusion"}


class _Model(NamedTuple):
    """What is estimated."""

    model: ModelConfig
    vocab_size: int
    head_columns: int
    """The vocabulary, padded where the model pads it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="{inference,training}")
    summary = (
        "FLOPs of generating 16 to 4096 tokens: AR against masked diffusion, by the published convention and ours."
    )
    inference = subjects.add_parser("inference", help=summary, description=summary)
    inference.add_argument(
        "--config",
        required=True,
        metavar="FILE_OR_DIR",
        help="the model: a training configuration, a run, a checkpoint, or a Hugging Face directory",
    )
    inference.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="ids of the vocabulary (default: those of the tokenizer, or of the checkpoint)",
    )
    inference.add_argument(
        "--prompt-tokens", type=int, default=0, metavar="P", help="tokens before the new ones (%(default)s)"
    )
    inference.add_argument("--output", type=Path, metavar="FIGURE.png", help="draw both over the length")
    summary = "Training FLOPs of a finished AR and DLM run at their best held-out losses, and at equal loss."
    training = subjects.add_parser("training", help=summary, description=summary)
    for name, label in (("autoregressive", "AR"), ("diffusion", "DLM")):
        training.add_argument(
            f"--{name}", required=True, metavar="RUN", help=f"directory of the {label} run, or its metrics.jsonl"
        )
    for subparser in (inference, training):
        subparser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the estimate. Raises ConfigError or DataError, one line."""
    return _inference(args) if args.subject == "inference" else _training(args)


def _inference(args: argparse.Namespace) -> int:
    from megatron_dlm.costs.inference import inference_costs
    from megatron_dlm.figures.inference_costs import check_output, draw

    for name, least in (("vocab_size", 1), ("prompt_tokens", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if args.output:
        check_output(args.output)
    model, vocab_size, columns = _read_model(args.config, args.vocab_size)
    weights = PublishedConvention.of(model, vocab_size).parameters
    costs = inference_costs(model, vocab_size, head_columns=columns, prompt_tokens=args.prompt_tokens)
    shape = f"{model.num_layers} layers x {model.hidden_size}"
    if args.output:
        title = f"{shape} | {weights:,} weights with the LM head | {_prompt(args.prompt_tokens)}"
        draw(model, vocab_size, args.output, title=title, head_columns=columns, prompt_tokens=args.prompt_tokens)
    if args.json:
        content: dict[str, Any] = {
            "weights_with_lm_head": weights,
            "vocab_size": vocab_size,
            "head_columns": columns,
            "tokens": costs.lengths,
            "prompt_tokens": costs.prompt_tokens,
            "published": [curve._asdict() for curve in costs.published],
            "sampler": [curve._asdict() for curve in costs.sampler],
        }
        print(json.dumps(content, indent=2))
        return 0
    heads = f"{model.num_attention_heads} heads of {model.resolved_head_dim}"
    groups = f", {model.resolved_query_groups} of keys and values"
    heads += groups if model.resolved_query_groups != model.num_attention_heads else ""
    print(f"model     {shape} | {heads} | FFN {model.ffn_hidden_size} | vocabulary {vocab_size:,}")
    print(f"weights   {weights:,} with the LM head, without the embedding that is only looked up\n")
    print(inference_table(costs, columns))
    if args.output:
        print(f"\nfigure    {args.output}")
    return 0


def inference_table(costs: InferenceCosts, head_columns: int) -> str:
    """Both ways of counting as text; every cell has FLOPs and how many times those of AR with a KV cache they are."""
    lines = ["FLOPs of generating L tokens, and how many times those of AR with a KV cache", ""]
    lines += _table("published convention, no prompt", costs.lengths, costs.published)
    lines += ["", *_table(f"our sampler, {_prompt(costs.prompt_tokens)}", costs.lengths, costs.sampler), ""]
    lines += [
        f"published convention: a step reads all L tokens (growing by {DEFAULT_BLOCK_LENGTH}: those up to the end of "
        "its block), and the",
        "LM head runs on every token that is read.",
        f"our sampler: a step reads the prompt and all L tokens, and the LM head ({head_columns:,} columns) runs on",
        "the masks of the current block only. AR has the head on the last token only; it samples with a cache from",
        "an export, and recomputed from a checkpoint.",
    ]
    return "\n".join(lines)


def _table(title: str, lengths: list[int], curves: list[Curve]) -> list[str]:
    rows = [[title, *(f"L = {length:,}" for length in lengths)]]
    for curve in curves:
        cells = zip(curve.flops, curve.ratio, strict=True)
        rows.append([curve.name, *(f"{format_flops(flops)} {format_ratio(ratio):>7}" for flops, ratio in cells)])
    return [f"{name:<33}" + "".join(f"{cell:>15}" for cell in cells) for name, *cells in rows]


def format_flops(value: float) -> str:
    """Three digits with a unit: 34.8G, 557G, 49.2P; E stands for 10**18."""
    power = 0
    while value >= 999.5 and power < len(_UNITS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:#.3g}".rstrip(".") + _UNITS[power]


def format_ratio(value: float) -> str:
    """``16.0x``, ``0.87x``, ``4,708x``."""
    if value >= 999.5:
        return f"{value:,.0f}x"
    return f"{value:.1f}x" if value >= 9.95 else f"{value:.2f}x"


def _prompt(tokens: int) -> str:
    return f"prompt of {tokens:,} tokens" if tokens else "no prompt"


def _read_model(path: str, vocab_size: int | None) -> _Model:
    """The model at ``path``, with its own vocabulary where none is given. Raises ConfigError or DataError."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        from megatron_dlm.hf.source_config import read_source_config

        source = read_source_config(folder)
        rows = vocab_size or source.rows
        return _Model(source.model, rows, rows)
    if folder.is_dir():
        from megatron_dlm.checkpoint.stored import open_checkpoint

        stored = open_checkpoint(folder)
        model, vocab_size = stored.config.model, vocab_size or int(stored.info["vocab_size"])
    else:
        from megatron_dlm.config.load import load_config

        config = load_config(["--config", path])
        model, vocab_size = config.model, vocab_size or _tokenizer_size(path, config.data.tokenizer)
    return _Model(model, vocab_size, model.padded_vocab_size(vocab_size))


def _tokenizer_size(path: str, tokenizer: str) -> int:
    from megatron_dlm.data.tokenizer import load_tokenizer
    from megatron_dlm.errors import DataError

    try:
        return load_tokenizer(tokenizer).vocab_size
    except DataError as error:
        raise ConfigError(f"the vocabulary of {path} is not known, give --vocab-size; its tokenizer: {error}") from None


def _training(args: argparse.Namespace) -> int:
    from megatron_dlm.costs.training import compare_training, read_points

    for name, objective in _OBJECTIVES.items():
        _check_objective(getattr(args, name), name, objective)
    costs = compare_training(read_points(args.autoregressive), read_points(args.diffusion))
    if args.json:
        points = {name: point and point._asdict() for name, point in costs._asdict().items()}
        ratios = {"ratio_at_best": costs.ratio_at_best, "ratio_at_equal_loss": costs.ratio_at_equal_loss}
        print(json.dumps(points | ratios, indent=2))
    else:
        print(training_table(costs))
    return 0


def training_table(costs: TrainingCosts) -> str:
    """The points that are compared, and the ratios of their FLOPs."""

    def line(name: str, point: Point, ratio: float | None = None) -> str:
        times = "" if ratio is None else f" | {format_ratio(ratio)} AR at its best"
        flops = f"{format_flops(point.flops)} FLOPs"
        return f"{name:<22} {point.loss:.4f} nats/tok at step {point.step:,} | {flops}{times}"

    at_equal_loss = "DLM at AR's best loss"
    lines = [line("AR at its best", costs.autoregressive)]
    lines.append(line("DLM at its best", costs.diffusion, costs.ratio_at_best))
    if costs.reached is None:
        behind = costs.diffusion.loss - costs.autoregressive.loss
        lines.append(f"{at_equal_loss:<22} not reached in this run: {behind:.4f} nats/tok above at its best")
    else:
        lines.append(line(at_equal_loss, costs.reached, costs.ratio_at_equal_loss))
    lines.append(
        "Losses are held out; the DLM's is an upper bound (NELBO). FLOPs are of training up to that evaluation."
    )
    return "\n".join(lines)


def _check_objective(run: str, name: str, objective: str) -> None:
    """Refuse runs in each other's place, where the configuration is still beside the metrics."""
    from megatron_dlm.config.load import read_yaml

    path = Path(run)
    file = (path if path.is_dir() else path.parent) / "config.yaml"
    if not file.is_file():
        return
    content = read_yaml(str(file))
    model = content.get("model") if isinstance(content, dict) else None
    found = model.get("objective") if isinstance(model, dict) else None
    if found in _OBJECTIVES.values() and found != objective:
        raise ConfigError(f"--{name} {run} is a {found} run, as {file} says; give a run of {objective}")
