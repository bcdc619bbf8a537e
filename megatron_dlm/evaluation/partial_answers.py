"""Answers of an evaluation that is not finished, in a file beside its output: a kill loses seconds of work."""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.evaluation.multiple_choice import Answer
from megatron_dlm.files import flush, written_beside


class PartialAnswers:
    """Answers by fingerprint and index of the question. One process has the file at a time.

    Every line is a CRC-32 of the rest, and JSON: fingerprint, index, values, errors, greedy.

    Attributes:
        path: of the file, ``FILE.partial`` beside the output ``FILE``.
        damaged: the file was, so its answers are gone.
    """

    def __init__(self, output: Path) -> None:
        """Open the file, made if need be, and read what is in it.

        Raises:
            ConfigError: another evaluation has it open; one line.
            DataError: it cannot be read or written; one line.
        """
        self.path = output.with_name(f"{output.name}.partial")
        self.damaged = False
        self._answers: dict[str, dict[int, Answer]] = {}
        try:
            self._file: IO[bytes] = self.path.open("a+b")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise ConfigError(
                    f"another evaluation is writing {self.path}; wait for its end, or choose another --output"
                ) from None
            except OSError:  # a file system without locks
                pass
            self._read()
        except OSError as error:
            raise self._unwritable(error) from None

    def known(self, fingerprint: str) -> dict[int, Answer]:
        """The answers that were given under this fingerprint, by index of the question."""
        return dict(self._answers.get(fingerprint, {}))

    def add(self, fingerprint: str, answers: Mapping[int, Answer]) -> None:
        """Write answers down; when this returns the disk has them. Raises ``DataError``, one line."""
        lines = b"".join(_line([fingerprint, index, *answer]) for index, answer in answers.items())
        try:
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None

    def close(self) -> None:
        """Leave the file for the next evaluation, but an empty one."""
        if not self._file.closed:
            empty = os.fstat(self._file.fileno()).st_size == 0
            self._file.close()
            if empty:
                self.path.unlink(missing_ok=True)

    def remove(self) -> None:
        """The output is complete."""
        self.path.unlink(missing_ok=True)
        self._file.close()

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        complete = content.rfind(b"\n") + 1  # a kill may have cut the last line short
        try:
            for line in content[:complete].splitlines():
                fingerprint, index, values, errors, greedy = _content(line)
                self._answers.setdefault(fingerprint, {})[index] = Answer(tuple(values), tuple(errors), greedy)
        except (ValueError, TypeError):
            self.damaged, complete = True, 0
            self._answers.clear()
        if complete < len(content):
            self._file.truncate(complete)

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(f"cannot write {self.path}: {error.strerror}; make that possible, and run the command again")


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, flushed to the disk: complete or not at all. Raises ``DataError``, one line."""
    try:
        with written_beside(path) as partial:
            partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            flush(partial)
        flush(path.parent)
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror}; make that possible, and run the command again"
        ) from None


def _line(content: list[object]) -> bytes:
    text = json.dumps(content).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _content(line: bytes) -> list:
    """Raises ``ValueError`` where the line is not what was written."""
    check, _, text = line.partition(b" ")
    if check != b"%08x" % zlib.crc32(text):
        raise ValueError("damaged")
    return json.loads(text)
