"""A run's folder: records that are whole, cut short or damaged, the last ones alone, and how the run ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dlm.errors import DataError
from megatron_dlm.run_folder import DONE, STOPPED, RunFolder, Status, read_lines

STEPS = [{"step": step, "loss": 4.0 - step / 1000} for step in range(1, 4001)]
EVALUATIONS = [{"step": step, "valid_nelbo": None if step == 2000 else 3.0} for step in (2000, 4000)]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Of a run of 4000 steps, whose records are longer than the tail that is read alone."""
    rows = sorted([*STEPS, *EVALUATIONS], key=lambda record: record["step"])
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunFolder(tmp_path)


def append(folder: RunFolder, content: bytes) -> None:
    with folder.metrics.open("ab") as file:
        file.write(content)


def test_records_are_steps_and_evaluations(folder: RunFolder) -> None:
    assert folder.records() == (STEPS, EVALUATIONS)


@pytest.mark.parametrize("cut", [b'{"step": 4001, "lo', b'{"text": "\xc3', b"4", b'{"loss": 2.0}'])
def test_a_last_line_that_is_cut_short_is_left_out(folder: RunFolder, cut: bytes) -> None:
    append(folder, cut)
    assert folder.records() == (STEPS, EVALUATIONS)
    assert folder.last_records().steps[-1] == STEPS[-1]


@pytest.mark.parametrize("damage", [b"step 4001", b"[1]", b"\xff\xfe", b'{"loss": 2.0}', b'{"step": "one"}', b""])
def test_any_other_line_that_is_no_record_is_named(folder: RunFolder, damage: bytes) -> None:
    append(folder, damage + b'\n{"step": 4002, "loss": 1.0}\n')
    with pytest.raises(DataError, match="^[^\n]+$") as raised:
        folder.records()
    line = len(STEPS) + len(EVALUATIONS) + 1
    assert str(raised.value).startswith(f"{folder.metrics}:{line} is no record of a step; give ")
    assert list(read_lines(folder.metrics, skip_damaged=True))[-1] == {"step": 4002, "loss": 1.0}


def test_without_a_file_there_are_no_records(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"^cannot read .*metrics.jsonl: No such file or directory; give [^\n]+$"):
        folder.records()
    assert folder.last_records() == ([], [])


def test_the_last_records_are_read_without_the_others(folder: RunFolder) -> None:
    steps, evaluations = folder.last_records()
    assert 100 < len(steps) < len(STEPS) and steps == STEPS[-len(steps) :]
    assert evaluations[-1] == EVALUATIONS[-1]


def test_a_folder_is_found_by_itself_or_by_its_records(folder: RunFolder) -> None:
    assert RunFolder.at(folder.path) == RunFolder.at(str(folder.metrics)) == folder
    folder.config.write_text("")
    with pytest.raises(DataError, match="config.yaml is no run's record; give a run's directory"):
        RunFolder.at(folder.config)


def test_how_a_run_ended_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.status() is None and not folder.is_finished
    for status, finished in ((Status(STOPPED, "stopped"), False), (Status(DONE, "done"), True)):
        folder.write_status(status)
        assert folder.status() == status and folder.is_finished is finished


@pytest.mark.parametrize("text", ["", "{", "3", "[0]", '{"exit_code": 0}', '{"exit_code": null, "reason": ""}'])
def test_a_status_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    assert RunFolder(tmp_path).status() is None and not RunFolder(tmp_path).is_finished
