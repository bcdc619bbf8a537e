"""The files of a prepared folder: their names, which are there, and how staged ones take their place."""

from __future__ import annotations

from pathlib import Path

from dlm_kernels.philox import Purpose

SPLITS = {"train": Purpose.TRAIN, "valid": Purpose.VALIDATION}
"""Names of the token files, and what their documents are for."""
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "tokenizer.byte")
"""What a saved tokenizer consists of: one or two of them."""
_SUFFIXES = ("bin", "idx", "json")


def output_names() -> list[str]:
    """All files that a preparation may write, those of the tokenizer last."""
    return [f"{name}.{suffix}" for name in SPLITS for suffix in _SUFFIXES] + list(TOKENIZER_FILES)


def existing(folder: Path, names: list[str]) -> list[Path]:
    """Those of `names` that are in `folder`."""
    return [folder / name for name in names if (folder / name).exists()]


def tokenizer_spec(output: Path) -> str:
    """What a configuration names to get the tokenizer saved in `output`."""
    files = existing(output, ["tokenizer.json", "tokenizer.model"])
    return str(files[0]) if files else "byte"


def move_into_place(staging: Path, output: Path) -> list[Path]:
    """Put the staged files in place of what an earlier run left.

    The .json of the splits go first and come last: data without it is refused, whenever this is interrupted.

    Returns:
        The files in their new places.

    Raises:
        OSError: one could not be moved; those that replaced nothing are removed again.
    """
    last = [f"{name}.json" for name in SPLITS]
    for path in existing(output, last):
        path.unlink()
    staged = sorted(staging.iterdir(), key=lambda path: (path.name in last, path.name))
    for path in existing(output, output_names()):
        if not (staging / path.name).exists():
            path.unlink()
    moved, fresh = [], [not (output / path.name).exists() for path in staged]
    try:
        for path in staged:
            moved.append(path.replace(output / path.name))
        staging.rmdir()
    except BaseException:
        for path, is_fresh in zip(moved, fresh, strict=False):
            if is_fresh:
                path.unlink()
        raise
    return moved
