"""A checkpoint written under one megatron-core version continues under every other one.

The recorded ones are made by ``python -m tests.distributed.test_migration``, under the version that is installed.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

from megatron_dlm.config.tree import Config
from megatron_dlm.preparation.prepare import PrepareOptions, prepare
from megatron_dlm.training import saving as checkpoint
from tests.ranks import run_ranks
from tests.resuming import continue_run
from tests.runs import tiny_config

ROOT = Path(__file__).parents[2]
RECORDED = sorted((ROOT / "tests" / "golden").glob("checkpoint-*.tgz"))
SAVED_AT, STEPS = 6, 10


def config(folder: Path) -> Config:
    """A very small run on the licence text, which no Python version changes, at two pipeline stages."""
    prepare(PrepareOptions(output=folder / "data", inputs=[ROOT / "LICENSE"], tokenizer="byte"))
    train = [{"path": str(folder / "data" / "train")}]
    return tiny_config(
        folder,
        run={"directory": str(folder / "run"), "seed": 7},
        model={
            "num_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_query_groups": 1,
            "ffn_hidden_size": 24,
        },
        data={"train": train, "valid": []},
        parallel={"pipeline_model_parallel_size": 2},
    )


def test_two_versions_are_on_record() -> None:
    assert {path.stem for path in RECORDED} >= {"checkpoint-0.16.1", "checkpoint-0.19.2"}


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda path: path.stem)
def test_a_checkpoint_of_another_version_continues(recorded: Path, tmp_path: Path) -> None:
    settings = config(tmp_path)
    root = checkpoint.checkpoint_root(settings)
    with tarfile.open(recorded) as archive:
        archive.extractall(root, filter="data")
    here, _ = run_ranks(continue_run, 2, tmp_path, settings, SAVED_AT, STEPS, None)
    straight = json.loads(recorded.with_suffix(".json").read_text())
    worst = max(abs(a[0] - b[0]) / b[0] for a, b in zip(here, straight, strict=True))
    print(f"MIGRATION {recorded.stem} -> {version('megatron-core')}: loss {worst:.1e} over {STEPS - SAVED_AT} steps")
    assert worst < 1e-6
    assert [norm for _, norm in here] == pytest.approx([norm for _, norm in straight], rel=1e-5)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        made = config(Path(scratch))
        figures, _ = run_ranks(continue_run, 2, Path(scratch), made, 0, STEPS, SAVED_AT)
        output = ROOT / "tests" / "golden" / f"checkpoint-{version('megatron-core')}.tgz"
        with tarfile.open(output, "w:gz") as archive:
            for path in sorted(checkpoint.checkpoint_root(made).iterdir()):
                archive.add(path, path.name)
        output.with_suffix(".json").write_text(json.dumps(figures[SAVED_AT:], indent=0) + "\n")
