"""What is kept of an evaluation that was killed: nothing is lost, mixed or believed without a check."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.evaluation.multiple_choice import Answer
from megatron_dlm.evaluation.partial_answers import PartialAnswers

ANSWERS = {2: Answer((-1.5, -math.inf), (0.25, None), None), 7: Answer((-2.0,), (0.0,), True)}


def in_a_child(action: Any, *arguments: Any) -> int | None:
    """Run ``action`` in a forked process, and return its exit code."""
    child = multiprocessing.get_context("fork").Process(target=action, args=arguments)
    child.start()
    child.join(60)
    return child.exitcode


def test_answers_come_back_until_the_output_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "x.json"
    for fingerprint in ("a", "b"):
        partial = PartialAnswers(output)
        partial.add(fingerprint, ANSWERS)
        assert partial.known(fingerprint) == ANSWERS
        partial.close()
        partial.close()
    partial = PartialAnswers(output)
    assert partial.known("a") == partial.known("b") == ANSWERS and partial.known("c") == {} and not partial.damaged
    partial.remove()
    assert list(tmp_path.iterdir()) == []
    PartialAnswers(output).close()
    assert list(tmp_path.iterdir()) == [], "an empty file says nothing"


def _add_and_die(output: Path) -> None:
    partial = PartialAnswers(output)
    partial.add("a", ANSWERS)
    os.kill(os.getpid(), signal.SIGKILL)


def _die_while_adding(output: Path) -> None:
    partial = PartialAnswers(output)
    partial._database.execute("PRAGMA cache_size = 2")  # so that the file is written to before the end
    for question in range(1000):
        values = ("b", question, "[[0.0], [0.0], null]", 0)
        partial._database.execute("INSERT INTO answers VALUES (?, ?, ?, ?)", values)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_loses_what_was_not_yet_added_and_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "x.json"
    path = tmp_path / "x.json.partial"
    assert in_a_child(_add_and_die, output) == -signal.SIGKILL
    before = path.stat().st_size
    assert in_a_child(_die_while_adding, output) == -signal.SIGKILL
    assert path.stat().st_size > before, "the kill has left half a transaction"
    partial = PartialAnswers(output)
    assert not partial.damaged and partial.known("a") == ANSWERS and partial.known("b") == {}
    partial.remove()
    assert list(tmp_path.iterdir()) == []


def _try_to_open(output: Path) -> None:
    try:
        PartialAnswers(output)
    except ConfigError as error:
        os._exit(3 if str(error).startswith(f"another evaluation is writing {output}.partial; wait") else 4)
    os._exit(0)


def test_one_process_has_the_file(tmp_path: Path) -> None:
    output = tmp_path / "a b%20?c.json"  # which a URI must escape
    partial = PartialAnswers(output)
    assert in_a_child(_try_to_open, output) == 3
    partial.add("a", ANSWERS)
    assert in_a_child(_try_to_open, output) == 3
    with pytest.raises(ConfigError, match="another evaluation is writing"):
        PartialAnswers(output)
    partial.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a b%20?c.json.partial"]
    assert in_a_child(_try_to_open, output) == 0


class WithoutLocks(sqlite3.Connection):
    """As on a file system that has none."""

    def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
        if statement.startswith("BEGIN"):
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_LOCK
            raise error
        return super().execute(statement, *arguments)


def test_a_file_system_may_have_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect

    def connect_without_locks(place: str, **options: Any) -> sqlite3.Connection:
        return connect(place, factory=sqlite3.Connection if place.endswith("?nolock=1") else WithoutLocks, **options)

    monkeypatch.setattr(sqlite3, "connect", connect_without_locks)
    partial = PartialAnswers(tmp_path / "x.json")
    partial.add("a", ANSWERS)
    assert partial.known("a") == ANSWERS and not partial.damaged
    partial.close()


def test_damage_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    """A bit that flips either does not matter, or the answers are gone: none is lost in silence, none is wrong."""
    output = tmp_path / "x.json"
    many = {question: Answer((-1.5 * question, -math.inf), (0.25, None), None) for question in range(30)}
    partial = PartialAnswers(output)
    partial.add("a" * 64, many)
    partial.close()
    sound, source = partial.path.read_bytes(), random.Random(0)
    verdicts = {True: 0, False: 0}
    for place in source.sample(range(len(sound)), 300) + [*range(100)]:
        content = bytearray(sound)
        content[place] ^= 1 << source.randrange(8)
        partial.path.write_bytes(content)
        partial = PartialAnswers(output)
        assert partial.known("a" * 64) == ({} if partial.damaged else many), place
        verdicts[partial.damaged] += 1
        partial.close()
        assert partial.path.exists() != partial.damaged
    assert min(verdicts.values()) > 20
    for content in (sound[:5000], b"01234567 [1, 2]\n", b"\0" * 4096):
        partial.path.write_bytes(content)
        partial = PartialAnswers(output)
        assert partial.damaged and partial.known("a" * 64) == {}
        partial.add("b", ANSWERS)
        partial.close()
        partial = PartialAnswers(output)
        assert partial.known("b") == ANSWERS and not partial.damaged
        partial.close()


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    output = tmp_path / "x.json"
    partial = PartialAnswers(output)
    partial.add("a", ANSWERS)
    partial._database.execute("PRAGMA max_page_count = 4")  # a full disk
    with pytest.raises(DataError, match="cannot write .*x.json.partial: database or disk is full; make that possible"):
        partial.add("b", {question: ANSWERS[2] for question in range(1000)})
    assert partial.known("a") == ANSWERS and partial.known("b") == {}
    partial.remove()
    with pytest.raises(DataError, match="cannot write .*/nowhere/x.json.partial: unable to open database file; make"):
        PartialAnswers(tmp_path / "nowhere" / "x.json")
    partial.path.symlink_to("elsewhere")
    with pytest.raises(DataError, match="x.json.partial: it is no regular file; remove it, or choose another --output"):
        PartialAnswers(output)
    assert not (tmp_path / "elsewhere").exists()
