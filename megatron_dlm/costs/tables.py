"""The costs of generating and of training as text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from megatron_dlm.costs.inference import Curve, InferenceCosts
from megatron_dlm.costs.training import Point, TrainingCosts
from megatron_dlm.formatting import format_flops, format_ratio, format_table
from megatron_dlm.shipped.sampler_plan import DEFAULT_BLOCK_LENGTH

_WIDTH = 108


def inference_table(costs: InferenceCosts, head_columns: int, last_layer_rows: bool) -> str:
    """Both ways of counting; every cell has FLOPs and how many times those of AR with a KV cache they are."""
    notes = [
        f"published convention: a step reads all L tokens (growing by {DEFAULT_BLOCK_LENGTH}: those up to the end of "
        "its block), and the LM head runs on every token that is read.",
        f"our sampler: a step reads the prompt and all L tokens, and the LM head ({head_columns:,} columns) "
        f"{'and the last layer run' if last_layer_rows else 'runs'} on the masks of the current block only. AR has the "
        "head on the last token only; it samples with a cache from an export, and recomputed from a checkpoint.",
    ]
    return "\n".join(
        [
            "FLOPs of generating L tokens, and how many times those of AR with a KV cache",
            "",
            *_table("published convention, no prompt", costs.lengths, costs.published),
            "",
            *_table(f"our sampler, {prompt_words(costs.prompt_tokens)}", costs.lengths, costs.sampler),
            "",
            *(textwrap.fill(note, _WIDTH) for note in notes),
        ]
    )


def prompt_words(tokens: int) -> str:
    """``prompt of 1,024 tokens`` or ``no prompt``."""
    return f"prompt of {tokens:,} tokens" if tokens else "no prompt"


def _table(title: str, lengths: Sequence[int], curves: Sequence[Curve]) -> list[str]:
    rows = [[title, *(f"L = {length:,}" for length in lengths)]]
    for curve in curves:
        cells = zip(curve.flops, curve.ratio, strict=True)
        rows.append([curve.name, *(f"{format_flops(flops)} {format_ratio(ratio):>7}" for flops, ratio in cells)])
    return format_table(rows, right=range(1, len(rows[0])))


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
