"""Questions per second of an evaluation in batches, beside one request at a time: the same model, answers and masks.

    python tools/benchmark_evaluation.py --checkpoint runs/demo

Two kinds of questions, made up of words of the language reference that comes with Python: sentences, four options of
different lengths under many masks as HellaSwag's, where the masks of one request fill a batch already; and letters,
four options that are masked in the same way as MMLU's, where a request is a single row. Rounds alternate between the
two ways; the figure is the ratio of the medians. Both must give the same log-likelihoods. On a CPU the time is that of
the process, which other programs do not change.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time

import torch

from megatron_dlm.evaluation.likelihood_masks import LikelihoodOptions
from megatron_dlm.evaluation.multiple_choice import EncodedTask, answer, encode_task
from megatron_dlm.evaluation.progress import collect
from megatron_dlm.evaluation.scoring import score
from megatron_dlm.evaluation.tasks import Question, Task
from megatron_dlm.generation.text_model import TextModel, open_text_model
from megatron_dlm.parallel.topology import shutdown

_TOLERANCE = 1e-3  # nats; batches round differently


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run, a checkpoint or an export")
    parser.add_argument("--sentences", type=int, default=8, help="questions with sentences (%(default)s)")
    parser.add_argument("--letters", type=int, default=64, help="questions with letters (%(default)s)")
    parser.add_argument("--masks", type=int, default=128, help="masks of every sentence (%(default)s)")
    parser.add_argument("--context-words", type=int, default=24, help="(%(default)s)")
    parser.add_argument("--tokens-per-batch", type=int, default=16384, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = open_text_model(args.checkpoint)
    results = {}
    for kind, count in (("sentences", args.sentences), ("letters", args.letters)):
        task = Task("benchmark", "options", questions(kind, count, args.context_words), [])
        encoded = encode_task(task, model.tokenizer, model.max_length)
        results[kind] = compare(model, encoded, args)
    shutdown()
    if args.json:
        print(json.dumps(results))
        return
    for kind, found in results.items():
        batched, alone = found["batched"], found["alone"]
        print(f"{kind:<10}{batched:8.2f} questions/s batched, {alone:8.2f} one by one: {found['ratio']:.2f}x")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {args.threads} threads"
    print(
        f"{args.masks} masks of a sentence | {args.tokens_per_batch} tokens a batch | {args.rounds} rounds | {device}"
    )


def questions(kind: str, count: int, context_words: int) -> list[Question]:
    """The same for the same arguments and version of Python."""
    from pydoc_data.topics import topics

    words = " ".join(topics[name] for name in sorted(topics)).split()
    source = random.Random(0)

    def text(length: int) -> str:
        start = source.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    def options() -> tuple[str, ...]:
        return ("A", "B", "C", "D") if kind == "letters" else tuple(text(source.randint(3, 12)) for _ in range(4))

    return [Question(text(context_words), options(), 0, "") for _ in range(count)]


def compare(model: TextModel, encoded: EncodedTask, args: argparse.Namespace) -> dict[str, float]:
    """Questions/s with all questions at once, and with one request at a time, its masks as a batch; and the ratio."""
    options = LikelihoodOptions(masks=args.masks, tokens_per_batch=args.tokens_per_batch)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    requests = [request for requests in encoded.requests for request in requests]
    ways = {
        "batched": lambda: [value for each in collect(answer(model, encoded, options)) for value in each.values],
        "alone": lambda: [collect(score(model, [request], options))[0].value for request in requests],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    values: dict[str, list[float]] = {}
    collect(score(model, encoded.requests[0], options))  # the first forward builds buffers
    for _ in range(args.rounds):
        for name, run in ways.items():
            started = clock()
            values[name] = run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(clock() - started)
    if max(abs(a - b) for a, b in zip(values["batched"], values["alone"], strict=True)) > _TOLERANCE:
        sys.exit("the log-likelihoods differ; compare them in fp32, or report a bug")
    rates = {name: len(encoded.requests) / statistics.median(taken) for name, taken in seconds.items()}
    return rates | {"ratio": rates["batched"] / rates["alone"]}


if __name__ == "__main__":
    main()
