"""Rates of training steps: tokens, FLOPs and memory."""

from __future__ import annotations

import time

import psutil
import torch

from megatron_dlm.config.tree import Config
from megatron_dlm.flops import training_flops
from megatron_dlm.model.layer_spec import last_layer_takes_rows

# Dense bf16 peaks of the published data sheets, TFLOP/s.
_PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}


def peak_tflops() -> float | None:
    """Peak dense bf16 TFLOP/s of this GPU; None on a CPU or an unknown device."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in _PEAK_TFLOPS.items() if key in name), None)


def memory_gib() -> tuple[float, float]:
    """(peak in use, total) of this rank's device in GiB; the process's resident memory on a CPU."""
    if torch.cuda.is_available():
        used = torch.cuda.max_memory_allocated()
        return used / 2**30, torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
    return psutil.Process().memory_info().rss / 2**30, psutil.virtual_memory().total / 2**30


class Throughput:
    """Turns step reports into rates; one instance per run."""

    def __init__(
        self,
        config: Config,
        *,
        vocab_size: int,
        devices: int,
        steps: int,
        first_step: int,
        flops_before: float | None = None,
    ) -> None:
        """``flops_before`` are the FLOPs of the first ``first_step`` steps; None takes them to be like the next one."""
        self._config = config
        self._vocab = vocab_size
        self._last_layer_rows = last_layer_takes_rows(config)
        self._devices = devices
        self._steps, self._first_step, self._done = steps, first_step, first_step
        self._flops = flops_before
        self._tokens_per_step = config.train.global_batch_size * config.data.sequence_length
        self._mean: float | None = None
        self._between = 0.0
        self._peak = peak_tflops()
        self._last: float | None = None

    def restart(self) -> None:
        """Start the clock of the next step; what came since the last one, evaluations say, only counts in the ETA."""
        now = time.perf_counter()
        if self._last is not None:
            self._between += now - self._last
        self._last = now

    def after_step(self, scored_tokens: int) -> dict[str, float | None]:
        """Rates of the step that has just ended; its time runs from the last ``restart``."""
        assert self._last is not None, "restart first"
        now = time.perf_counter()
        seconds, self._last = max(now - self._last, 1e-9), now
        self._done += 1
        # A running mean that forgets the first step, which builds buffers and kernels.
        self._mean = seconds if self._mean is None else 0.9 * self._mean + 0.1 * seconds
        actual, nominal = self._step_flops(scored_tokens), self._step_flops(self._tokens_per_step)
        self._flops = (self._first_step * actual if self._flops is None else self._flops) + actual
        per_second = seconds * self._devices * 1e12
        used, total = memory_gib()
        return {
            "training_flops": self._flops,
            "tokens_per_second": self._tokens_per_step / seconds,
            "tokens_per_second_per_device": self._tokens_per_step / seconds / self._devices,
            "tflops_per_device": actual / per_second,
            "mfu": None if self._peak is None else actual / per_second / self._peak,
            "mfu_nominal": None if self._peak is None else nominal / per_second / self._peak,
            "memory_gib": used,
            "memory_total_gib": total,
            "step_seconds": seconds,
            "eta_seconds": (self._steps - self._done) * (self._mean + self._between / (self._done - self._first_step)),
        }

    def _step_flops(self, head_rows: int) -> float:
        return training_flops(
            self._config.model,
            tokens=self._tokens_per_step,
            head_rows=head_rows,
            sequence_length=self._config.data.sequence_length,
            vocab_size=self._vocab,
            last_layer_rows=self._last_layer_rows,
        )
