"""Where a run's records go: the log line, metrics.jsonl, TensorBoard and the progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_dlm.config.differences import Difference
from megatron_dlm.config.tree import Config
from megatron_dlm.errors import TrainingError
from megatron_dlm.files import written_beside
from megatron_dlm.formatting import format_count, format_duration, shown
from megatron_dlm.run_folder import RunFolder, is_configuration, is_evaluation, read_lines


def format_line(record: dict[str, Any], *, steps: int) -> str:
    """The one log line; ``record`` is a step's record as in metrics.jsonl."""
    mfu = "n/a" if record["mfu"] is None else f"{100 * record['mfu']:.1f}%"
    unit = "gpu" if torch.cuda.is_available() else "process"
    fields = [
        f"step {record['step']}/{steps}",
        f"loss {record['loss']:.4f} nats/tok",
        f"gnorm {record['grad_norm']:.2f}",
        f"lr {record['lr']:.1e}",
        f"{format_count(record['tokens_per_second_per_device'])} tok/s/{unit}",
        f"{record['tflops_per_device']:#.3g}".rstrip(".") + " TFLOP/s",
        f"mfu {mfu}",
        f"mem {record['memory_gib']:.1f}/{record['memory_total_gib']:.0f} GiB",
        f"epoch {record['epoch']:.2f}",
        f"skipped {record['skipped']}",
        f"eta {format_duration(record['eta_seconds'])}",
    ]
    return " | ".join(fields)


def averaged(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The last record with the mean loss (of the steps that had one) and the rates of all of them."""
    last, seconds = records[-1], statistics.fmean(record["step_seconds"] for record in records)
    scale = last["step_seconds"] / seconds
    rates = ("tokens_per_second_per_device", "tflops_per_device", "mfu")
    mean = {key: None if last[key] is None else last[key] * scale for key in rates}
    losses = [record["loss"] for record in records if math.isfinite(record["loss"])]
    return last | mean | {"loss": statistics.fmean(losses) if losses else math.nan}


class Reporter:
    """Writes a run's records on one rank; on the others every method does nothing."""

    def __init__(self, config: Config, *, active: bool, steps: int, first_step: int) -> None:
        self.active = active
        self.steps = steps
        self.flops_before: float | None = None if first_step else 0.0
        """``training_flops`` on record after ``first_step`` steps; None where that is not known."""
        if not active:
            return
        folder = RunFolder(Path(config.run.directory))
        folder.path.mkdir(parents=True, exist_ok=True)
        self._evaluated: set[tuple[int, Any]] = set()
        for record in _drop_after(folder.metrics, first_step):
            if is_evaluation(record):
                self._evaluated.add(_evaluated(record))
            elif record["step"] == first_step:
                self.flops_before = record.get("training_flops")
        self._folder, self._samples = folder, folder.samples
        self._sampled = {record["step"] for record in _drop_after(self._samples, first_step)}
        self._recent: list[dict[str, Any]] = []
        self._file = folder.metrics.open("a", encoding="utf-8", buffering=1)
        self._board = _tensorboard(folder.tensorboard, first_step)
        kind = config.model.kind
        self._likelihood, self._at_most = kind.likelihood, "<= " if kind.is_bound else ""
        self._bar: tqdm | None = None  # begins with the first step, below the banner

    def step(self, record: dict[str, Any], *, show: bool) -> None:
        """Record one training step; ``show`` prints the line of the steps since the last one."""
        if not self.active:
            return
        self._write(record)
        self._recent.append(record)
        if self._bar is None:
            hidden = not sys.stderr.isatty()
            done = record["step"] - 1
            self._bar = tqdm(
                total=self.steps, initial=done, unit="step", dynamic_ncols=True, leave=False, disable=hidden
            )
        self._bar.set_postfix_str(f"loss {record['loss']:.3f}", refresh=False)
        self._bar.update(1)
        if show:
            self.say(format_line(averaged(self._recent), steps=self.steps))
            self._recent.clear()

    def configuration(self, step: int, changes: Sequence[Difference]) -> None:
        """Record the keys that the configuration has changed after ``step`` steps, and print a line for each."""
        if not self.active:
            return
        values = {key: {"before": before, "after": after} for key, before, after in changes}
        values = json.loads(json.dumps(values, default=str))  # YAML knows more kinds of values, binary ones and sets
        self._write({"step": step, "kind": "configuration", "changes": values})
        for key, change in values.items():
            self.say(f"changed    {key}: {json.dumps(change['before'])} -> {json.dumps(change['after'])}")

    def evaluation(self, record: dict[str, Any]) -> None:
        """Record one evaluation and print it."""
        if not self.active:
            return
        if _evaluated(record) not in self._evaluated:
            self._write(record)
        self.say(
            f"step {record['step']}/{self.steps} | valid {self._likelihood} {record['valid_nelbo']:.4f} +- "
            f"{record['valid_nelbo_ci95']:.4f} nats/tok | {record['valid_bits_per_byte']:.4f} +- "
            f"{record['valid_bits_per_byte_ci95']:.4f} bits/byte | perplexity {self._at_most}"
            f"{record['valid_perplexity_bound']:.5g} | unigram {record['valid_unigram']:.4f} nats/tok"
            + "".join(f" | {text}" for text in _accuracies(record))
        )

    def samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Record texts (prompt, what follows) in samples.jsonl and TensorBoard, and print them."""
        if not self.active:
            return
        if step not in self._sampled:
            lines = [json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n" for prompt, text in samples]
            with _naming(self._samples), self._samples.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
        for index, (prompt, text) in enumerate(samples):
            if self._board:
                with _naming(self._folder.tensorboard):
                    self._board.add_text(f"samples/{index}", _as_markdown(prompt + text), step)
            self.say(f"step {step}/{self.steps} | sample {index}: {shown(prompt)} -> {shown(text)}")

    def say(self, line: str) -> None:
        """Print a line, above the progress bar where there is one."""
        if self.active:
            # A sample may have what this stream cannot show, which is no reason to stop training.
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
            tqdm.write(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Close the files and the progress bar; lines can still be printed."""
        if self.active:
            if self._bar is not None:
                self._bar.close()
            with _naming(self._folder.metrics):
                self._file.close()
            if self._board:
                with _naming(self._folder.tensorboard):
                    self._board.close()

    def _write(self, record: dict[str, Any]) -> None:
        record = {key: _finite_or_none(value) for key, value in record.items()}
        with _naming(self._folder.metrics):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
        with _naming(self._folder.tensorboard):
            self._add_scalars(record)

    def _add_scalars(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            values = (
                {f"{key}/{i / 10:.1f}": v for i, v in enumerate(value)} if isinstance(value, list) else {key: value}
            )
            for name, number in values.items():
                if self._board and name != "step" and isinstance(number, (int, float)):
                    self._board.add_scalar(name, number, record["step"])


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Make a ``TrainingError`` that names what cannot be written, on a full disk, say."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"cannot write {path}: {error.strerror or error}; make room or correct that, and the same command goes on "
            "from the newest checkpoint, if there is one"
        ) from None


def _accuracies(record: dict[str, Any]) -> Iterator[str]:
    """``hellaswag acc 0.2710 +- 0.0104`` for every task of an evaluation; behind +- is the standard error."""
    for key, value in record.items():
        if key.startswith("task/") and key.endswith("/acc"):
            error = record[f"{key}_stderr"]
            figure = "n/a" if value is None else f"{value:.4f}"
            yield f"{key.split('/')[1]} acc {figure}" + (f" +- {error:.4f}" if error is not None else "")


def _as_markdown(text: str) -> str:
    """An indented block, which TensorBoard shows as it is."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _tensorboard(directory: Path, first_step: int) -> Any:
    """A TensorBoard writer that hides older events from ``first_step`` on; None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("TensorBoard is not installed, so there are no events: pip install 'megatron-dlm[log]'", file=sys.stderr)
        return None
    show = threading.excepthook

    def hook(ended: threading.ExceptHookArgs) -> None:
        """TensorBoard's writing thread hands its error to the next call, which says it in a line."""
        if not (isinstance(ended.exc_value, OSError) and "AsyncWriter" in type(ended.thread).__name__):
            show(ended)

    threading.excepthook = hook
    return SummaryWriter(str(directory), purge_step=first_step + 1)


def _finite_or_none(value: Any) -> Any:
    """JSON has no NaN and no infinity, and a step with a NaN loss must be recorded like any other."""
    if isinstance(value, list):
        return [_finite_or_none(item) for item in value]
    if isinstance(value, dict):
        return {key: _finite_or_none(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _evaluated(record: dict[str, Any]) -> tuple[int, Any]:
    """What an evaluation is of: the step, and the held-out data, which a resumed run may have exchanged."""
    return record["step"], record.get("valid_data")


def _drop_after(path: Path, first_step: int) -> Iterator[dict[str, Any]]:
    """Forget records after the step that a resumed run continues from, so that no step stands twice.

    So are changes of the configuration at that step: they are of the steps after it.

    Yields the others; the file is replaced when the last one has been taken.
    """
    if not path.exists():
        return
    with written_beside(path) as partial, partial.open("w", encoding="utf-8") as kept:
        for record in read_lines(path, skip_damaged=True):
            if record["step"] <= first_step - is_configuration(record):
                kept.write(json.dumps(record) + "\n")
                yield record
