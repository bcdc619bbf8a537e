"""`megatron-dlm estimate`: what generating text and training cost, in FLOPs; no GPU and no data are needed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_dlm.commands.common import check_at_least, model_shape
from megatron_dlm.flops import PublishedConvention


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
    from megatron_dlm.costs.tables import inference_table, prompt_words
    from megatron_dlm.figures.inference_costs import draw
    from megatron_dlm.figures.style import check_figure_output

    check_at_least(args, vocab_size=1, prompt_tokens=0)
    if args.output:
        check_figure_output(args.output)
    model, vocab_size, columns, last_layer_rows = model_shape(args.config, args.vocab_size)
    weights = PublishedConvention.of(model, vocab_size).parameters
    options: dict[str, Any] = {"head_columns": columns, "last_layer_rows": last_layer_rows}
    options["prompt_tokens"] = args.prompt_tokens
    costs = inference_costs(model, vocab_size, **options)
    shape = f"{model.num_layers} layers x {model.hidden_size}"
    if args.output:
        title = f"{shape} | {weights:,} weights with the LM head | {prompt_words(args.prompt_tokens)}"
        draw(model, vocab_size, args.output, title=title, **options)
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
    print(inference_table(costs, columns, last_layer_rows))
    if args.output:
        print(f"\nfigure    {args.output}")
    return 0


def _training(args: argparse.Namespace) -> int:
    from megatron_dlm.costs.tables import training_table
    from megatron_dlm.costs.training import check_objective, compare_training, read_points

    check_objective(args.autoregressive, "autoregressive")
    check_objective(args.diffusion, "masked_diffusion")
    costs = compare_training(read_points(args.autoregressive), read_points(args.diffusion))
    if args.json:
        points = {name: point and point._asdict() for name, point in costs._asdict().items()}
        ratios = {"ratio_at_best": costs.ratio_at_best, "ratio_at_equal_loss": costs.ratio_at_equal_loss}
        print(json.dumps(points | ratios, indent=2))
    else:
        print(training_table(costs))
    return 0
