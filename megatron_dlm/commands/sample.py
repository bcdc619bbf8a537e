"""`megatron-dlm sample`: text from a run, a checkpoint or an export."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from megatron_dlm.commands.common import add_checkpoint, add_layout, layout_of, opened, refusing, say
from megatron_dlm.config.check import MAX_SEQUENCE_LENGTH
from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.launch import place
from megatron_dlm.shipped.sampler_plan import DEFAULT_BLOCK_LENGTH, Remasking, SamplerOptions

if TYPE_CHECKING:
    from megatron_dlm.generation.text_model import TextModel


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
    with refusing():
        options = SamplerOptions(**{field.name: getattr(args, field.name) for field in fields(SamplerOptions)})
    with opened(args.checkpoint, layout_of(args)) as model, refusing():
        _sample(model, texts, options, args)
    return 0


def _texts(args: argparse.Namespace) -> list[str]:
    """What is to be continued or filled in."""
    for name in ("max_new_tokens", "infill_tokens"):
        if not 1 <= (value := getattr(args, name)) <= MAX_SEQUENCE_LENGTH:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be from 1 to {MAX_SEQUENCE_LENGTH}")
    if args.trace is not None:
        from megatron_dlm.generation.trace_page import check_output

        check_output(args.trace)
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


def _sample(model: TextModel, texts: list[str], options: SamplerOptions, args: argparse.Namespace) -> None:
    """Sample all texts as one batch, on every rank; the first one shows, prints and traces what comes out."""
    from megatron_dlm.generation.trace import printable
    from megatron_dlm.generation.trace_page import write
    from megatron_dlm.generation.watching import generate_watched

    first, new = place.is_first_rank(), 0 if args.infill else args.max_new_tokens
    if args.infill:
        prompts = [model.encode_holes(text, args.infill_tokens) for text in texts]
        model = model.forbidding([model.tokenizer.end_of_document_id])  # such a text goes on behind its holes
    else:
        prompts = [model.tokenizer.encode(text) for text in texts]
        options = model.in_blocks(options, new)
    if first:
        say(f"model    {model.name}")
        if (longest := max(map(len, prompts)) + new) > model.max_length:
            say(f"note     {longest} tokens are more than the {model.max_length} of training sequences")
    live = sys.stdout if first and not args.no_live and sys.stdout.isatty() else None
    record = first and args.trace is not None
    found = generate_watched(model, prompts, options, max_new_tokens=new, live=live, record=record)
    if not first:
        return
    for number, row in enumerate(found.samples.texts, 1):
        if len(prompts) > 1:
            say(f"--- {number} of {len(prompts)}")
        print(printable(model.tokenizer.decode(row), sys.stdout), flush=True)
    if new and (ended := sum(not tokens for tokens in found.samples.continuations)):
        where = f" in {ended} of {len(prompts)} texts" if len(prompts) > 1 else ""
        say(f"note     end-of-document came first{where}, so nothing follows; try another prompt, or a --temperature")
    if found.written:
        rate = f"{found.written / found.seconds:.1f} tokens/s"
        say(f"speed    {found.written} tokens in {found.samples.forwards} forwards, {found.seconds:.2f} s: {rate}")
    if found.recorder is not None:
        details = {field.name: str(value) for field in fields(options) if (value := getattr(options, field.name))}
        title = "Infilling" if args.infill else "Sampling"
        write(found.recorder.trace(title, details | {"model": model.name}), args.trace)
        say(f"trace    {args.trace}")
