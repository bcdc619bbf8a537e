"""Tokens per second of `megatron-dlm prepare` on the embedded corpus, by tokenizer and number of workers.

Run: python tools/benchmark_prepare.py [--repeat 3] [--workers 1 2] [--json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from megatron_dlm.preparation.prepare import PrepareOptions, prepare


def measure(tokenizer: str, workers: int, repeat: int, folder: Path) -> dict[str, Any]:
    """The fastest of `repeat` runs; the training of a tokenizer does not count."""
    options = PrepareOptions(folder / "out", embedded=True, tokenizer=tokenizer)
    runs = [prepare(options, workers=workers, overwrite=True) for _ in range(repeat)]
    best = max(runs, key=lambda run: run.tokens_per_second)
    train = best.splits["train"]
    return {
        "tokenizer": "byte" if tokenizer == "byte" else f"sentencepiece {train.vocab_size}",
        "workers": workers,
        "tokens": train.tokens,
        "bytes": train.bytes,
        "tokens_per_second": round(best.tokens_per_second),
        "megabytes_per_second": round(best.tokens_per_second * train.bytes_per_token / 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3, help="runs of each case, of which the fastest counts (3)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of worker processes (1 2)")
    parser.add_argument("--vocab-size", type=int, default=2048, help="pieces of the SentencePiece model (2048)")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained = prepare(PrepareOptions(folder / "model", embedded=True, train_sentencepiece=args.vocab_size))
        rows = [
            measure(tokenizer, workers, args.repeat, folder)
            for tokenizer in ("byte", trained.tokenizer)
            for workers in args.workers
        ]
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'tokenizer':<20} {'workers':>7} {'tokens':>12} {'tokens/s':>12} {'MB/s':>8}")
    for row in rows:
        print(
            f"{row['tokenizer']:<20} {row['workers']:>7} {row['tokens']:>12,} {row['tokens_per_second']:>12,} "
            f"{row['megabytes_per_second']:>8.2f}"
        )


if __name__ == "__main__":
    main()
