"""What cannot be exported is refused in a line before anything is written; nothing is lost or left behind."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from megatron_dlm import cli, output_folder
from megatron_dlm.checkpoint import manifest
from megatron_dlm.checkpoint.whole_tensors import TensorInfo, WeightsReader, write_weights
from megatron_dlm.commands.export import size_in_bytes
from megatron_dlm.config.load import dump_yaml
from megatron_dlm.errors import ConfigError
from megatron_dlm.hf.export import export
from tests.exports import config, content, make_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "source")


def rewritten(source: Path, name: str, text: str) -> None:
    """The checkpoint with another small file, as if it had been saved with it."""
    (source / name).write_text(text)
    manifest.write(source, {})


def with_tensors(source: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    reader = WeightsReader(source)
    tensors = {key: reader.read(key) for key in reader.tensors}
    change(tensors)
    for name in ("__0_0.distcp", ".metadata", "manifest.json"):
        (source / name).unlink()
    infos = {key: TensorInfo(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    write_weights(source, infos, tensors.__getitem__)
    manifest.write(source, {})


def other_tokenizer(source: Path) -> None:
    info = json.loads((source / "checkpoint.json").read_text())
    rewritten(source, "checkpoint.json", json.dumps({**info, "tokenizer_fingerprint": "f" * 64}))


def no_tokenizer(source: Path) -> None:
    shutil.rmtree(source / "tokenizer")
    manifest.write(source, {})


def flipped(source: Path) -> None:
    path = source / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def passed_through(**fields: Any) -> Callable[[Path], None]:
    return lambda source: rewritten(source, "config.yaml", dump_yaml(config(transformer_config=fields)))


NORM, QUERIES = "decoder.final_layernorm.weight", "decoder.layers.1.self_attention.q_layernorm.weight"
CASES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "softmax scale": (passed_through(softmax_scale=0.5), ConfigError, r"transformer_config.softmax_scale = 0.5, which"),
    "interleaved": (
        passed_through(rotary_interleaved=True),
        ConfigError,
        "rotary_interleaved = True, which the Hugging",
    ),
    "clamp": (passed_through(activation_func_clamp_value=7.0), ConfigError, "activation_func_clamp_value = 7.0, which"),
    "offset": (passed_through(glu_linear_offset=1.0), ConfigError, "glu_linear_offset = 1.0, which"),
    "missing": (lambda s: with_tensors(s, lambda t: t.pop(NORM)), ConfigError, f"it lacks {NORM}; give another"),
    "unknown": (
        lambda s: with_tensors(s, lambda t: t.update(b=torch.ones(2), c=torch.ones(2))),
        ConfigError,
        "config.yaml: it also has b and 1 more; give another",
    ),
    "shape": (
        lambda s: with_tensors(s, lambda t: t.update({QUERIES: torch.ones(8)})),
        ConfigError,
        rf"{QUERIES} is \[8\] instead of \[12\]",
    ),
    "other tokenizer": (other_tokenizer, ConfigError, "tokenizer is not the tokenizer of its checkpoint; restore it"),
    "no tokenizer": (no_tokenizer, ConfigError, "cannot read the tokenizer of .*source: No such file"),
    "flipped bit": (
        flipped,
        ConfigError,
        "checkpoint .*source is damaged: the content of __0_0.distcp has changed .*; restore it or give another one$",
    ),
    "cut": (lambda s: (s / "__0_0.distcp").write_bytes(b"x"), ConfigError, "__0_0.distcp has 1 bytes instead of"),
    "index": (
        lambda s: rewritten(s, ".metadata", "nonsense"),
        ConfigError,
        r"cannot read .*\.metadata: .*; restore it",
    ),
    "configuration": (
        lambda s: rewritten(s, "config.yaml", "model: {layers: 3}"),
        ConfigError,
        "unknown key model.lay",
    ),
    "no checkpoint": (shutil.rmtree, ConfigError, "source is no directory; give a run directory"),
}


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_that_cannot_be_exported(case: str, source: Path, tmp_path: Path) -> None:
    change, kind, message = CASES[case]
    change(source)
    before = content(tmp_path)
    with pytest.raises(kind, match=message) as caught:
        export(source, tmp_path / "deep" / "out")
    assert "\n" not in str(caught.value)
    assert content(tmp_path) == before and not (tmp_path / "deep").exists()


def test_fields_at_their_defaults_are_no_obstacle(source: Path, tmp_path: Path) -> None:
    passed_through(rotary_interleaved=False, glu_linear_offset=0.0)(source)
    assert export(source, tmp_path / "out").parameters


def folder_with(name: str) -> Callable[[Path], None]:
    def make(output: Path) -> None:
        output.mkdir()
        (output / name).write_text("mine")

    return make


OUTPUTS: dict[str, tuple[Callable[[Path], Any], bool, str]] = {
    "file": (lambda out: out.write_text(""), True, "out is a file; choose another"),
    "not empty": (folder_with("config.json"), False, "out is not empty; use --overwrite or"),
    "not ours": (folder_with("thesis.tex"), True, "out has thesis.tex in it, which is not what would be replaced"),
    "a tokenizer": (folder_with("tokenizer.json"), True, "out has tokenizer.json in it, which is not what"),
    "killed": (
        lambda out: out.with_name(".out.partial").mkdir(),
        False,
        r"\.out\.partial is left from a command that was",
    ),
    "put aside": (
        lambda out: out.with_name(".out.old").mkdir(),
        True,
        r"\.out\.old is what .*out was when its replacement",
    ),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs_that_are_not_to_be_written(case: str, source: Path, tmp_path: Path) -> None:
    make, overwrite, message = OUTPUTS[case]
    make(tmp_path / "out")
    before = content(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        export(source, tmp_path / "out", overwrite=overwrite)
    assert "\n" not in str(caught.value) and content(tmp_path) == before


def test_other_places_that_cannot_be_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="/ is a mount point"):
        export(source, Path("/"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file, so .*out cannot be made"):
        export(source, tmp_path / "file" / "out")
    with pytest.raises(ConfigError, match="--max-shard-size is 0; give at least one byte"):
        export(source, tmp_path / "out", max_shard_size=0)

    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: Usage(1000))
    with pytest.raises(ConfigError, match="out needs .* bytes and its disk has 1,000; make room"):
        export(source, tmp_path / "out")
    monkeypatch.setattr(output_folder.os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="cannot be written to; allow it"):
        export(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "source"]


def test_an_earlier_export_is_replaced_only_on_request(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export(source, output, max_shard_size=20_000)
    (output / "__pycache__").mkdir()
    with pytest.raises(ConfigError, match="use --overwrite"):
        export(source, output)
    (tmp_path / ".out.partial").mkdir()
    exported = export(source, output, overwrite=True)
    assert {path.name for path in output.iterdir()} == set(exported.files) and "model.safetensors" in exported.files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_link_is_followed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    assert export(source, tmp_path / "out").directory == tmp_path / "out"
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "model.safetensors").exists()


FULL = OSError(errno.ENOSPC, "No space left on device")
FAULTS: list[tuple[Any, str, int, BaseException]] = [
    (safetensors.torch, "save_file", 0, SafetensorError("I/O error: No space left on device (os error 28)")),
    (safetensors.torch, "save_file", 2, FULL),
    (safetensors.torch, "save_file", 1, KeyboardInterrupt()),
    (WeightsReader, "read", 3, KeyboardInterrupt()),
    (Path, "write_text", 1, FULL),
    (output_folder, "flush", 0, FULL),
    (os, "rename", 0, FULL),
    (os, "rename", 1, FULL),
    (os, "rename", 1, KeyboardInterrupt()),
]


@pytest.mark.parametrize(
    ("exists", "owner", "name", "after", "fault"),
    [
        pytest.param(
            exists, *fault, id=f"{fault[1]}-{fault[2]}-{type(fault[3]).__name__}-{'replaced' if exists else 'new'}"
        )
        for exists in (False, True)
        for fault in FAULTS
        if exists or fault[1:3] != ("rename", 1)  # where nothing is replaced there is one only
    ],
)
def test_faults_leave_everything_as_it_was(
    exists: bool,
    owner: Any,
    name: str,
    after: int,
    fault: BaseException,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "deep" / "out" if not exists else tmp_path / "out"
    if exists:
        export(source, output, dtype="bf16")
    before, original, calls = content(tmp_path), getattr(owner, name), 0

    def failing(*args: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == after + 1:
            raise fault
        return original(*args, **keywords)

    monkeypatch.setattr(owner, name, failing)
    expected = KeyboardInterrupt if isinstance(fault, KeyboardInterrupt) else ConfigError
    with pytest.raises(
        expected, match=None if expected is KeyboardInterrupt else "cannot write .*No space.*; make room"
    ):
        export(source, output, max_shard_size=20_000, overwrite=exists)
    monkeypatch.undo()
    assert calls > after
    assert content(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"][not exists :]
    assert export(source, output, overwrite=exists).parameters, "and it works the next time"


def test_the_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", "--checkpoint", str(source), "--output", str(tmp_path / "out"), "--max-shard-size", "20KB"]
    assert cli.main([*arguments, "--dtype", "bf16"]) == 0
    printed = capsys.readouterr().out
    assert "DLMForMaskedDiffusion, " in printed and "weights in " in printed and "config.json" in printed
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main([*arguments, "--max-shard-size", "much"]) == 2
    assert "'much' is not a size; give one such as 500MB" in capsys.readouterr().err
    assert cli.main([*arguments, "--dtype", "fp8"]) == 2


def test_sizes() -> None:
    sizes = {"5GB": 5 * 10**9, "500MB": 5 * 10**8, "2GiB": 2 * 2**30, "1.5kb": 1500, " 7 mib": 7 * 2**20, "123": 123}
    assert {text: size_in_bytes(text) for text in sizes} == sizes
    for text in ("", "GB", "5XB", "-5GB", "0GB", "1e3", "5GBs"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
            size_in_bytes(text)
