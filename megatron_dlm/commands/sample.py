"""`megatron-dlm sample`: text from a run, a checkpoint or an export."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from megatron_dlm.commands.common import add_checkpoint, add_layout, layout_of, opened
from megatron_dlm.config.check import MAX_SEQUENCE_LENGTH
from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.shipped.sampler_plan import DEFAULT_BLOCK_LENGTH, Remasking, SamplerOptions

if TYPE_CHECKING:
    from megatron_dlm.generation.text_model import TextModel
    from megatron_dlm.shipped.sampler import Step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    text = parser.add_argument_group("what to write (without one of the first three: a text from nothing)")
    one = text.add_mutually_exclusive_group()
    repeated: dict[str, Any] = {"action": "append", "metavar": "TEXT"}
    one.add_argument(
        "--prompt",
        help="continue this; may be repeated; \\n, \\t and \\\\ are a newline, a tab, a backslash",
        **repeated,
    )
    one.add_argument("--prompt-file", metavar="FILE", help="continue the text of this file; - is the standard input")
    one.add_argument("--infill", help="fill in every ____ of this; may be repeated; \\n is a newline", **repeated)
    text.add_argument("--infill-tokens", type=int, default=16, metavar="N", help="tokens of every ____ (%(default)s)")
    text.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="behind a prompt (%(default)s)")
    sampler = parser.add_argument_group("sampler")
    sampler.add_argument("--steps", type=int, metavar="N", help="denoising steps of a text (one for each token)")
    sampler.add_argument(
        "--block-length",
        type=int,
        metavar="N",
        help=f"fill in blocks of so many tokens from left to right ({DEFAULT_BLOCK_LENGTH} behind a prompt; all at "
        "once for --infill)",
    )
    sampler.add_argument(
        "--remasking",
        default="low_confidence",
        choices=get_args(Remasking),
        help="which tokens of a step stay masked (%(default)s)",
    )
    sampler.add_argument(
        "--threshold", type=float, metavar="P", help="keep every token above this confidence, instead of --steps"
    )
    sampler.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: the best token (%(default)s)")
    sampler.add_argument("--top-p", type=float, default=1.0, metavar="P", help="of the tokens drawn from (%(default)s)")
    sampler.add_argument("--guidance", type=float, default=0.0, metavar="G", help="classifier-free (%(default)s)")
    sampler.add_argument("--seed", type=int, default=0, metavar="N", help="of the random numbers (%(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument("--trace", type=Path, metavar="FILE.html", help="write a page that plays the denoising")
    output.add_argument("--no-live", action="store_true", help="do not show the denoising on the terminal")
    add_layout(parser)


def run(args: argparse.Namespace) -> int:
    """Print the texts. Raises ConfigError or DataError, one line."""
    texts = _texts(args)
    options = _options(args)
    with opened(args.checkpoint, layout_of(args)) as model:
        _run(model, texts, options, args)
    return 0


def _run(model: TextModel, texts: list[str], options: SamplerOptions, args: argparse.Namespace) -> None:
    first = os.environ.get("RANK", "0") == "0"
    try:
        prompts = _encode(model, texts, args)
        if args.infill is None:
            options = model.in_blocks(options, args.max_new_tokens)
        if first:
            _say(f"model    {model.name}")
            if (longest := max(map(len, prompts)) + _new_tokens(args)) > model.max_length:
                _say(f"note     {longest} tokens are more than the {model.max_length} of training sequences")
        _sample(model, prompts, options, args, first)
    except (ConfigError, DataError):
        raise
    except ValueError as error:  # what the model cannot do
        raise ConfigError(str(error)) from None


def _texts(args: argparse.Namespace) -> list[str]:
    """What is to be continued or filled in."""
    for name in ("max_new_tokens", "infill_tokens"):
        if not 1 <= (value := getattr(args, name)) <= MAX_SEQUENCE_LENGTH:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be from 1 to {MAX_SEQUENCE_LENGTH}")
    if args.trace is not None:
        if args.trace.suffix.lower() not in (".html", ".htm") or os.path.lexists(args.trace) > args.trace.is_file():
            raise DataError(f"cannot write a page to {args.trace}; give --trace a file name that ends in .html")
        if not args.trace.parent.is_dir():
            raise DataError(f"cannot write {args.trace}: {args.trace.parent} is no directory; make it first")
    if args.prompt_file == "-" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("only one process can read the standard input; give --prompt-file a file")
    if args.prompt_file is not None:
        try:
            source = Path(args.prompt_file)
            return [sys.stdin.read() if args.prompt_file == "-" else source.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the prompt {args.prompt_file}: {error}; give a UTF-8 text file") from None
    texts = [_unescape(text) for text in args.infill or args.prompt or [""]]
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"the prompt {text!r} is not UTF-8; give its bytes in a file of text") from None
    return texts


def _unescape(text: str) -> str:
    r"""``\n``, ``\t`` and ``\\`` as they arrive from a shell's double quotes."""
    return "\\".join(part.replace("\\n", "\n").replace("\\t", "\t") for part in text.split("\\\\"))


def _options(args: argparse.Namespace) -> SamplerOptions:
    try:
        return SamplerOptions(**{field.name: getattr(args, field.name) for field in fields(SamplerOptions)})
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _encode(model: TextModel, texts: list[str], args: argparse.Namespace) -> list[list[int]]:
    if args.infill is None:
        return [model.tokenizer.encode(text) for text in texts]
    return [model.encode_holes(text, args.infill_tokens) for text in texts]


def _new_tokens(args: argparse.Namespace) -> int:
    """Behind every text."""
    return args.max_new_tokens if args.infill is None else 0


def _sample(
    model: TextModel, prompts: list[list[int]], options: SamplerOptions, args: argparse.Namespace, first: bool
) -> None:
    """Sample all prompts as one batch; show, print and trace what comes out on the first rank."""
    from megatron_dlm.generation.live_view import LiveView
    from megatron_dlm.generation.trace import Recorder, visible
    from megatron_dlm.generation.trace_page import write

    tokenizer, infill = model.tokenizer, args.infill is not None
    views: list[Callable[[Step], None]] = []
    if infill:  # such a text goes on behind its holes
        model = model.forbidding([tokenizer.end_of_document_id])
    recorder = Recorder(tokenizer.decode, model.vocabulary)
    if args.trace and first:
        views.append(recorder)
    with contextlib.ExitStack() as stack:
        if first and not args.no_live and sys.stdout.isatty():
            view = LiveView(tokenizer.decode, model.vocabulary, sys.stdout, text_at_end=False)
            views.append(stack.enter_context(view))

        def show(step: Step) -> None:
            for view in views:
                view(step)

        started = time.perf_counter()
        samples = model.generate(
            prompts,
            options,
            max_new_tokens=_new_tokens(args),
            on_step=show if views else None,
        )
        seconds = time.perf_counter() - started
    if not first:
        return
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    for number, row in enumerate(samples.texts, 1):
        if len(prompts) > 1:
            _say(f"--- {number} of {len(prompts)}")
        text = tokenizer.decode(row)
        # A file gets the text as it is, a terminal nothing that it would obey.
        text = visible(text, keep="\n\t") if sys.stdout.isatty() else text
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    holes = sum(row.count(tokenizer.mask_token_id) for row in prompts)
    written = holes + sum(map(len, samples.continuations))
    rate = f"{written / seconds:.1f} tokens/s"
    _say(f"speed    {written} tokens in {samples.forwards} forwards, {seconds:.2f} s: {rate}")
    if args.trace:
        details = {field.name: str(value) for field in fields(options) if (value := getattr(options, field.name))}
        details["model"] = model.name
        write(recorder.trace("Infilling" if infill else "Sampling", details), args.trace)
        _say(f"trace    {args.trace}")


def _say(line: str) -> None:
    """What is no text goes to stderr, so that a pipe gets the texts alone."""
    print(line, file=sys.stderr, flush=True)
