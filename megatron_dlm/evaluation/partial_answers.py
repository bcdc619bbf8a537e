"""Answers of an evaluation that is not finished, in a database beside its output: a kill loses seconds of work."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Mapping
from pathlib import Path

from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.evaluation.multiple_choice import Answer

_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    fingerprint TEXT, question INTEGER, answer TEXT, checksum INTEGER, PRIMARY KEY (fingerprint, question)
)
"""
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_WITHOUT_LOCKS = {sqlite3.SQLITE_IOERR_LOCK, sqlite3.SQLITE_IOERR_RDLOCK}
# Faults of the place that the file is in; whatever else SQLite says of a file, its content is wrong.
_OF_THE_PLACE = {
    *_BUSY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_NOMEM,
}


class _Damaged(Exception):
    """What is in the file is not what was written."""


class PartialAnswers:
    """Answers by fingerprint and index of the question, in an SQLite file. One process has it at a time.

    Attributes:
        path: of the file, ``FILE.partial`` beside the output ``FILE``.
        damaged: the file was, so its answers are gone.
    """

    def __init__(self, output: Path) -> None:
        """Open the file, made if need be, and check what is in it.

        Raises:
            ConfigError: another evaluation has it open; one line.
            DataError: it cannot be read or written; one line.
        """
        self.path = output.with_name(f"{output.name}.partial")
        self.damaged = False
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_file()):
            raise DataError(f"cannot write {self.path}: it is no regular file; remove it, or choose another --output")
        try:
            try:
                self._database = self._open()
            except _Damaged:
                self.damaged = True
                self._delete()
                self._database = self._open()
        except sqlite3.Error as error:
            if _primary(error) in _BUSY:
                raise ConfigError(
                    f"another evaluation is writing {self.path}; wait for its end, or choose another --output"
                ) from None
            raise self._unwritable(error) from None

    def known(self, fingerprint: str) -> dict[int, Answer]:
        """The answers that were given under this fingerprint, by index of the question."""
        rows = self._database.execute("SELECT question, answer FROM answers WHERE fingerprint = ?", (fingerprint,))
        found = {}
        for question, text in rows:
            values, errors, greedy = json.loads(text)
            found[question] = Answer(tuple(values), tuple(errors), greedy)
        return found

    def add(self, fingerprint: str, answers: Mapping[int, Answer]) -> None:
        """Write answers down; when this returns the disk has them. Raises ``DataError``, one line."""
        rows = []
        for question, answer in answers.items():
            # Of an answer's numbers JSON has every digit, and Python's Infinity too.
            text = json.dumps(answer)
            rows.append((fingerprint, question, text, _checksum(fingerprint, question, text)))
        try:
            with self._database:  # one transaction: all of them or none
                self._database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise self._unwritable(error) from None

    def close(self) -> None:
        """Leave the file for the next evaluation, but an empty one."""
        try:
            empty = self._database.execute("SELECT 1 FROM answers LIMIT 1").fetchone() is None
        except sqlite3.ProgrammingError:  # closed already
            return
        if empty:
            self.remove()
        else:
            self._database.close()

    def remove(self) -> None:
        """The output is complete."""
        self._database.close()
        self._delete()

    def _open(self, *, locks: bool = True) -> sqlite3.Connection:
        """The database, locked until it is closed. Raises ``_Damaged`` and ``sqlite3.Error``."""
        # timeout=0: a lock that is held is another evaluation's, and waiting would not help.
        uri = f"{self.path.absolute().as_uri()}?nolock={int(not locks)}"
        database = sqlite3.connect(uri, uri=True, timeout=0)
        try:
            # In this mode the lock of the first transaction stays; a kill gives it back.
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
            database.execute("PRAGMA synchronous = FULL")
            database.execute("BEGIN EXCLUSIVE")
            database.execute(_TABLE)
            database.commit()
            _check(database)
        except sqlite3.Error as error:
            database.close()
            if locks and getattr(error, "sqlite_errorcode", None) in _WITHOUT_LOCKS:  # the file system has none
                return self._open(locks=False)
            if _primary(error) not in _OF_THE_PLACE:
                raise _Damaged from None
            raise
        except (_Damaged, UnicodeDecodeError):  # the latter of messages that quote what is damaged
            database.close()
            raise _Damaged from None
        return database

    def _delete(self) -> None:
        for suffix in ("", "-journal"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def _unwritable(self, error: sqlite3.Error) -> DataError:
        return DataError(f"cannot write {self.path}: {error}; make that possible, and run the command again")


def _check(database: sqlite3.Connection) -> None:
    """Raises ``_Damaged``. SQLite knows the structure of its file; whether the content is what it was, we know."""
    # Damaged text must come as far as its checksum.
    database.text_factory = lambda content: content.decode(errors="replace")
    rows = database.execute("SELECT fingerprint, question, answer, checksum FROM answers")
    if any(_checksum(*row[:3]) != row[3] for row in rows):
        raise _Damaged
    if database.execute("PRAGMA integrity_check").fetchone() != ("ok",):
        raise _Damaged


def _checksum(fingerprint: object, question: object, answer: object) -> int:
    return zlib.crc32(f"{fingerprint} {question} {answer}".encode())


def _primary(error: sqlite3.Error) -> int | None:
    """SQLite's kind of error, without the details in the higher bits; None where it is Python's own."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
