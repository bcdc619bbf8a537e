"""Sampling that is watched: shown on a terminal, recorded for a page, and timed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TextIO

from megatron_dlm.generation.live_view import LiveView
from megatron_dlm.generation.text_model import TextModel
from megatron_dlm.generation.trace import Recorder
from megatron_dlm.shipped.sampler import Samples, Step
from megatron_dlm.shipped.sampler_plan import SamplerOptions


class Watched(NamedTuple):
    """What ``generate_watched`` returns."""

    samples: Samples
    written: int
    """Tokens: masks of the prompts, and the new ones up to the end of each text."""
    seconds: float
    recorder: Recorder | None
    """What a page needs, where it was wanted."""


def generate_watched(
    model: TextModel,
    prompts: Sequence[Sequence[int]],
    options: SamplerOptions,
    *,
    max_new_tokens: int,
    live: TextIO | None = None,
    record: bool = False,
) -> Watched:
    """``TextModel.generate`` of all prompts as one batch, with an eye on it.

    Args:
        live: a terminal on which the first text is shown while it is written, and which then is as it was before;
            None: nothing is shown.
        record: keep what a page of ``trace_page`` shows.

    Raises:
        ValueError: as ``TextModel.generate``.
    """
    views: list[Callable[[Step], None]] = []
    recorder = Recorder(model.tokenizer.decode, model.vocabulary) if record else None
    if recorder is not None:
        views.append(recorder)

    def show(step: Step) -> None:
        for view in views:
            view(step)

    with contextlib.ExitStack() as stack:
        if live is not None:
            view = LiveView(model.tokenizer.decode, model.vocabulary, live, text_at_end=False)
            views.append(stack.enter_context(view))
        started = time.perf_counter()
        # Without a view the sampler need not copy its tensors to the CPU.
        samples = model.generate(prompts, options, max_new_tokens=max_new_tokens, on_step=show if views else None)
        seconds = time.perf_counter() - started
    holes = sum(list(prompt).count(model.vocabulary.mask_token_id) for prompt in prompts)
    return Watched(samples, holes + sum(map(len, samples.continuations)), seconds, recorder)
