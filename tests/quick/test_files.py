"""Files: whole or untouched, and refused early where they cannot be written; versions of packages."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.figures.style import check_figure_output
from megatron_dlm.files import check_file_output, write_json
from megatron_dlm.packages import installed_version, versions


def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]

    def full(*unused: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="cannot write .*: No space left on device; make that possible, or choose"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_outputs_are_refused_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, folder, link = tmp_path / "there.png", tmp_path / "folder.png", tmp_path / "link.png"
    there.touch()
    folder.mkdir()
    link.symlink_to(tmp_path / "nowhere")
    for check in (lambda path: check_file_output(path, "--output"), check_figure_output):
        check(there)
        check(tmp_path / "new.png")
        for path, said in (
            (folder, "folder.png: it is a directory; choose another --output"),
            (link, "link.png: it is no regular file; choose another --output"),
            (tmp_path / "no" / "x.png", "no is no directory; make it first"),
            (there / "x.png", "there.png is no directory; make it first"),
        ):
            with pytest.raises(DataError, match=f"cannot write .*{said}") as refused:
                check(path)
            assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="there.png is there already; use --overwrite, or choose another --json"):
        check_file_output(there, "--json", overwrite=False)
    check_file_output(tmp_path / "new", "--json", overwrite=False)
    with pytest.raises(ConfigError, match="--output x.txt is no figure; name it with one of .png, .svg, .pdf"):
        check_figure_output(Path("x.txt"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(DataError, match=f"{tmp_path} cannot be written to; choose another --json"):
        check_file_output(tmp_path / "new", "--json")
    monkeypatch.setattr("megatron_dlm.figures.style.find_spec", lambda name: None)
    with pytest.raises(DataError, match="a figure needs the package matplotlib"):
        check_figure_output(tmp_path / "new.png")


def test_versions_are_of_what_is_installed() -> None:
    assert installed_version("no-such-package") is None and installed_version("pytest") == pytest.__version__
    found = versions(("megatron_dlm", "no-such-package"))
    assert found == {"megatron_dlm": installed_version("megatron-dlm"), "python": platform.python_version()}
