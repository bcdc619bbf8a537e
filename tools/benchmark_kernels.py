"""Times the kernels beside every peer that can be imported, in one run, against the measured ceilings of the card.

    python -m tools.benchmark_kernels [--output FILE.json] [--only mask_tokens,cross_entropy,linear_cross_entropy]

Random inputs, forward and backward, CUDA events, median of 20 after a flush of the L2 cache, everything timed twice.
The loss over H-wide hidden states is compared at equal rows (the peers get the masked rows, selected within the timed
call) and dense against compacted (half of the tokens are masked: the peers compute all of them with weight 0, which is
what they offer). Errors are those of gradients against fp64 on the same rounded inputs, at 512 rows. Without a GPU the
shapes are tiny and the torch twins are timed, which tests this script and says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dlm_kernels
from dlm_kernels.types import NoiseDraw
from megatron_dlm.packages import versions
from tools.kernel_peers import Loss, Peer, cross_entropy_peers, fp64_gradients, linear_peers, mask_peers

KERNELS = ("mask_tokens", "cross_entropy", "linear_cross_entropy")
REPEATS = 20
BUDGET = 800.0  # milliseconds that one median may take


class Bench:
    """Clock, ceilings and results of one device."""

    def __init__(self, device: torch.device, output: Path | None = None) -> None:
        """``output`` is written after every measurement, so that one that breaks the run costs none of the others."""
        self.device, self.gpu, self.output = device, device.type == "cuda", output
        self.rows: list[dict[str, Any]] = []
        self.errors: list[dict[str, Any]] = []
        self._flush = torch.empty(2**28 if self.gpu else 1, dtype=torch.int8, device=device)
        self.description = describe(self.gpu)
        self.ceilings = self._ceilings()

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Median time of a call, of 20 or of as many as fit the budget, at least 5."""
        call()
        self._time(call)  # compiled and autotuned by now
        repeats = max(5, min(REPEATS, int(BUDGET / max(self._time(call), 1e-3)))) if self.gpu else 3
        return statistics.median(self._time(call) for _ in range(repeats))

    def _time(self, call: Callable[[], object]) -> float:
        self._flush.zero_()
        if not self.gpu:
            began = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - began)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)  # a millisecond in which Python gets ahead: its time is not the kernels'
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def graph_milliseconds(self, call: Callable[[], object]) -> float:
        """Time of a call inside a CUDA graph of 20 of them: without launch overhead, as in a captured step."""
        if not self.gpu:
            return self.milliseconds(call)
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(20):
                call()
        return self.milliseconds(graph.replay) / 20

    def record(self, kernel: str, peer: Peer | str, call: Callable[[], object], **facts: Any) -> dict[str, Any] | None:
        """Time a call twice and keep it; a peer that fails is kept with its error."""
        name, note = (peer, "") if isinstance(peer, str) else (peer.name, peer.note)
        row: dict[str, Any] = {"kernel": kernel, "implementation": name, "note": note, **facts}
        self.rows.append(row)
        try:
            call()
            if self.gpu:
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                call()
                torch.cuda.synchronize()
                row["peak_extra_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
            row["ms"], row["ms_again"] = self.milliseconds(call), self.milliseconds(call)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            self.show(row)
            return None
        return row

    def show(self, row: dict[str, Any]) -> None:
        """Print a measurement, and keep all of them."""
        print(line(row), flush=True)
        if self.output:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.output.write_text(json.dumps(self.result(), indent=1) + "\n")

    def result(self) -> dict[str, Any]:
        """Everything so far, and where and with what it was measured."""
        return {**self.description, "ceilings": self.ceilings, "rows": self.rows, "errors": self.errors}

    def _ceilings(self) -> dict[str, float]:
        size = 8192 if self.gpu else 128
        a = torch.randn(size, size, device=self.device).bfloat16()
        b = torch.randn(size, size, device=self.device).bfloat16()
        source = torch.empty(2**30 if self.gpu else 2**16, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        return {
            "copy_tb_s": 2 * source.numel() / self.milliseconds(lambda: target.copy_(source)) / 1e9,
            "gemm_tflops": 2 * size**3 / self.milliseconds(lambda: a @ b) / 1e9,
        }


def bench_mask_tokens(bench: Bench) -> None:
    """K1: 10 us is the target at 32 x 4096 in a CUDA graph."""
    for batch, seq in [(32, 4096), (16, 8192), (64, 2048)] if bench.gpu else [(4, 64)]:
        _bench_mask_shape(bench, batch, seq)


def _bench_mask_shape(bench: Bench, batch: int, seq: int) -> None:
    tokens = torch.randint(0, 50000, (batch, seq), device=bench.device)
    ids, draw = np.arange(batch), NoiseDraw("stratified_antithetic", 0, batch)
    # Exact counts are known: an antithetic pair masks seq + 1 tokens.
    rooms = {"exact_count": -(-(batch // 2 * (seq + 1)) // 128) * 128, "bernoulli": batch * seq}
    calls: list[tuple[Peer | str, Callable[[], object]]] = []
    for masking, room in rooms.items():
        call = partial(
            dlm_kernels.mask_tokens, tokens, ids, seed=1, mask_token_id=50001, masking=masking, draw=draw, capacity=room
        )
        calls.append((f"ours {masking}", call))
    calls += [(peer, partial(peer.function, tokens, 50001)) for peer in mask_peers(bench.gpu)]
    for peer, call in calls:
        row = bench.record("mask_tokens", peer, call, batch=batch, seq=seq)
        if row:
            try:
                row["graph_us"] = 1e3 * bench.graph_milliseconds(call)
            except RuntimeError as error:  # cannot be captured
                row["note"] += f" no graph: {str(error)[:60]}"
            bench.show(row)


def bench_cross_entropy(bench: Bench) -> None:
    """K2: two reads and one write of the logits are the floor for TP > 1."""
    for vocab in (50304, 131072) if bench.gpu else (512,):
        for rows in (4096, 8192, 16384) if bench.gpu else (64,):
            _bench_cross_entropy_shape(bench, rows, vocab)


def _bench_cross_entropy_shape(bench: Bench, rows: int, vocab: int) -> None:
    logits = torch.randn(rows, vocab, device=bench.device, dtype=torch.bfloat16)
    targets = torch.randint(0, vocab, (rows,), device=bench.device)
    weights = 1 / torch.rand(rows, device=bench.device).clamp(min=0.05)
    ours = Peer("ours", lambda x, t, w: dlm_kernels.cross_entropy(x, t, w)[0])

    def step(function: Loss) -> None:
        # Kernels that work in place may overwrite the logits: their time does not depend on the values.
        function(logits.detach().requires_grad_(), targets, weights).backward()

    for peer in (ours, *cross_entropy_peers(bench.gpu)):
        row = bench.record("cross_entropy", peer, partial(step, peer.function), rows=rows, vocab=vocab)
        if row:
            row["tb_s_2r1w"] = 3 * logits.numel() * 2 / row["ms"] / 1e9
            row["of_copy"] = row["tb_s_2r1w"] / bench.ceilings["copy_tb_s"]
            bench.show(row)


def bench_linear(bench: Bench) -> None:
    """K3: 3 GEMMs over the masked rows."""
    for hidden_size in (2048, 4096) if bench.gpu else (64,):
        for vocab in (50304, 131072) if bench.gpu else (512,):
            weight = (torch.randn(vocab, hidden_size, device=bench.device) * hidden_size**-0.5).bfloat16()
            for tokens in (4096, 8192, 16384) if bench.gpu else (64,):
                _bench_linear_shape(bench, weight, tokens)


def _bench_linear_shape(bench: Bench, weight: Tensor, tokens: int) -> None:
    vocab, hidden_size = weight.shape
    hidden = torch.randn(tokens, hidden_size, device=bench.device).bfloat16()
    rows = torch.randperm(tokens, device=bench.device)[: tokens // 2].sort().values
    targets = torch.randint(0, vocab, (tokens,), device=bench.device)
    weights = torch.zeros(tokens, device=bench.device)
    weights[rows] = 1 / torch.rand(len(rows), device=bench.device).clamp(min=0.05)
    row_targets, row_weights, index = targets[rows], weights[rows], rows.int()
    facts = {"tokens": tokens, "masked": len(rows), "vocab": vocab, "hidden": hidden_size}

    def run(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss(h, w).backward()

    def ours(h: Tensor, w: Tensor, **options: Any) -> Tensor:
        return dlm_kernels.linear_cross_entropy(h, w, index, row_targets, row_weights, **options)[0]

    cases: list[tuple[Peer | str, str, Callable[[], None]]] = [
        ("ours", "compacted", lambda: run(ours)),
        ("ours fp32 logits", "compacted", lambda: run(lambda h, w: ours(h, w, fp32_logits=True))),
    ]
    for peer in linear_peers(bench.gpu):
        select = lambda h, w, f=peer.function: f(h.index_select(0, rows), w, row_targets, row_weights)  # noqa: E731
        dense = lambda h, w, f=peer.function: f(h, w, targets, weights)  # noqa: E731
        cases.append((peer, "rows selected first", lambda select=select: run(select)))
        cases.append((peer, "dense", lambda dense=dense: run(dense)))
    for peer, form, call in cases:
        row = bench.record("linear_cross_entropy", peer, call, form=form, **facts)
        if row:
            row["useful_tflops"] = 6 * len(rows) * hidden_size * vocab / row["ms"] / 1e9
            row["of_gemm"] = row["useful_tflops"] / bench.ceilings["gemm_tflops"]
            bench.show(row)


def gradient_errors(bench: Bench) -> None:
    """Relative Frobenius error of the gradients of each implementation of the loss against fp64, weighted."""
    count, hidden_size, vocab = (512, 1024, 50304) if bench.gpu else (32, 32, 100)
    hidden = torch.randn(count, hidden_size, device=bench.device).bfloat16()
    weight = (torch.randn(vocab, hidden_size, device=bench.device) * hidden_size**-0.5).bfloat16()
    targets = torch.randint(0, vocab, (count,), device=bench.device)
    unit = torch.ones(count, device=bench.device)
    weighted = 1 / torch.rand(count, device=bench.device).clamp(min=0.05)

    def ours(fp32_logits: bool) -> Callable[..., Tensor]:
        return lambda h, w, t, x: dlm_kernels.linear_cross_entropy(h, w, None, t, x, fp32_logits=fp32_logits)[0]

    peers = [Peer("ours", ours(False)), Peer("ours fp32 logits", ours(True)), *linear_peers(bench.gpu)]
    for peer in peers:
        weights = unit if "no per-token weights" in peer.note else weighted
        row: dict[str, Any] = {"kernel": "linear_cross_entropy", "implementation": peer.name, "note": peer.note}
        bench.errors.append(row)
        loss, *gradients = fp64_gradients(hidden, weight, targets, weights)
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        try:
            value = peer.function(*leaves, targets, weights)
            value.backward()
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            bench.show(row)
            continue
        grads: Iterable[Any] = [leaf.grad for leaf in leaves]
        d_hidden, d_weight = (float((a.double() - b).norm() / b.norm()) for a, b in zip(grads, gradients, strict=True))
        row["loss"] = abs(float(value.detach()) - float(loss)) / float(loss)
        row |= {"d_hidden": d_hidden, "d_weight": d_weight}
        bench.show(row)


def describe(gpu: bool) -> dict[str, Any]:
    """Where and with what this is measured."""
    packages = ("torch", "triton", "liger-kernel", "quack-kernels", "fla-core", "flash-attn", "cut-cross-entropy")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if gpu else "CPU (torch twins, tiny shapes)"
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return {"device": device, "date": date, "commit": commit, "versions": versions(packages)}


def line(row: dict[str, Any]) -> str:
    """A measurement in a line."""
    keys = ("batch", "seq", "rows", "tokens", "hidden", "vocab", "form")
    shape = " ".join(f"{key}={row[key]}" for key in keys if key in row)
    if "error" in row:
        figures = row["error"]
    elif "ms" in row:
        figures = f"{row['ms']:9.4f} ms (again {row['ms_again']:.4f})"
        for key in ("graph_us", "tb_s_2r1w", "useful_tflops", "peak_extra_gib"):
            figures += f" | {key} {row[key]:.4g}" if key in row else ""
    else:
        figures = "error against fp64: " + " ".join(f"{k} {row[k]:.1e}" for k in ("loss", "d_hidden", "d_weight"))
    return f"{row['kernel']:20} {row['implementation']:24} {shape:60} {figures}"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/kernels-<gpu>-<date>[-<only>].json")
    parser.add_argument("--only", default=",".join(KERNELS), help="kernels, separated by commas")
    options = parser.parse_args(arguments)
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(KERNELS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(KERNELS)}")
    torch.manual_seed(0)
    bench = Bench(torch.device("cuda" if torch.cuda.is_available() else "cpu"), options.output)
    if bench.gpu and bench.output is None:  # figures of a CPU are not worth keeping
        device = bench.description["device"].lower().replace("nvidia ", "").replace(" ", "-")
        part = "" if len(chosen) == len(KERNELS) else "-" + "-".join(chosen)  # parts do not overwrite each other
        bench.output = Path(f"benchmarks/results/kernels-{device}-{bench.description['date']}{part}.json")
    print(" | ".join([bench.description["device"], *(f"{key} {value:.3g}" for key, value in bench.ceilings.items())]))
    parts = {
        "mask_tokens": bench_mask_tokens,
        "cross_entropy": bench_cross_entropy,
        "linear_cross_entropy": bench_linear,
    }
    for name in chosen:
        parts[name](bench)
    if "linear_cross_entropy" in chosen:
        gradient_errors(bench)
    if bench.output:
        print(bench.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
