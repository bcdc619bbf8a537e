"""Records of files, and what is said about files that differ from them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from megatron_dlm.checkpoint import manifest
from megatron_dlm.checkpoint.manifest import FileRecord


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "large").write_bytes(b"0123456789")
    (tmp_path / "sub" / "small").write_bytes(b"abc")
    manifest.write(tmp_path, {"large": FileRecord(10, hashlib.sha256(b"0123456789").hexdigest())})
    return tmp_path


def test_records_are_size_and_sha256(directory: Path) -> None:
    records = manifest.read(directory)
    assert records == {name: manifest.record(directory / name) for name in ("large", "sub/small")}
    assert records["sub/small"][:2] == (3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    assert manifest.find_fault(directory) is None


def test_known_files_are_not_read_again(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"0123456789")
    manifest.write(tmp_path, {"large": FileRecord(10, "as it was given")})
    assert manifest.read(tmp_path)["large"].sha256 == "as it was given"


def test_a_file_that_is_asked_for_must_be_listed(directory: Path) -> None:
    assert manifest.find_fault(directory, ["large", "another"]) == "its manifest.json lacks another"


def test_faults_are_named(directory: Path) -> None:
    (directory / "large").write_bytes(b"0123456788")
    assert manifest.find_fault(directory, content=False) is None
    assert manifest.find_fault(directory, ["sub/small"]) is None
    fault = manifest.find_fault(directory)
    assert fault == "the content of large has changed since it was written (its SHA-256 differs)"
    (directory / "large").write_bytes(b"012")
    assert manifest.find_fault(directory, content=False) == "large has 3 bytes instead of 10"
    (directory / "large").unlink()
    assert manifest.find_fault(directory, content=False) == "large is missing"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"files": [1]}', '{"files": {"a": {"size": "x", "sha256": ""}}}', "\xff"]
)
def test_a_broken_manifest_is_a_fault(directory: Path, text: str) -> None:
    (directory / manifest.NAME).write_bytes(text.encode("latin-1"))
    assert manifest.find_fault(directory) == "its manifest.json is damaged"
    (directory / manifest.NAME).unlink()
    assert manifest.find_fault(directory) == "it has no manifest.json, so it was not completed"
