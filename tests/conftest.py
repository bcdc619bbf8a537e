"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["tests.limits"]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``train`` and ``valid`` token files: some chapters of the language reference, in bytes."""
    from tests.runs import write_data

    return write_data(tmp_path_factory.mktemp("tiny-data"))


def pytest_configure(config: pytest.Config) -> None:
    """All tests but those of ``pytest tests/gpu`` are of the CPU backend: they fork more ranks than there are GPUs."""
    if not config.args or not all("tests/gpu" in argument for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork ranks come first: a rank hangs when it drops gloo groups that its parent has made."""
    items.sort(key=lambda item: "distributed" not in item.path.parts)


def pytest_collection_finish() -> None:
    """Imported modules are no garbage: looking through torch, megatron and transformers takes half a second."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """Forked ranks would inherit what a test on one process has started."""
    yield
    if dist.is_initialized():
        from megatron_dlm.parallel.topology import shutdown

        shutdown()
