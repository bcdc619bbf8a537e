"""Digests of what the code computes, to be compared before and after a change that should change nothing.

    OMP_NUM_THREADS=1 python -m tests.fingerprints

Prints the beginning of a SHA-256 for the fifty losses and gradient norms of either golden run, and for every file of
the export of a recorded checkpoint. Equal digests on one machine are equal bits.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.distributed.test_golden import GOLDEN, OBJECTIVES, curve


def main() -> None:
    """Print one line a digest."""
    with tempfile.TemporaryDirectory() as scratch:
        for objective in OBJECTIVES:
            (folder := Path(scratch, objective)).mkdir()
            print(f"{_digest(json.dumps(curve(objective, folder)).encode())}  curve of {objective}", flush=True)
        for name, digest in _export(Path(scratch)):
            print(f"{digest}  export/{name}")


def _export(scratch: Path) -> Iterator[tuple[str, str]]:
    """Name and digest of every file that the recorded checkpoint exports to."""
    from megatron_dlm.hf.export import export

    with tarfile.open(GOLDEN / "checkpoint-0.16.1.tgz") as archive:
        archive.extractall(scratch / "recorded", filter="data")
    (checkpoint,) = (path.parent for path in (scratch / "recorded").rglob("manifest.json"))
    export(checkpoint, scratch / "export")
    for path in sorted((scratch / "export").iterdir()):
        yield path.name, _digest(path.read_bytes())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


if __name__ == "__main__":
    main()
