"""The tensors of a Hugging Face folder: *.safetensors, read one at a time. Pickles are not read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_dlm.errors import ConfigError
from megatron_dlm.files import read_json_object
from megatron_dlm.packages import optional_module

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What can be a weight; others are quantized, or no weights.
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Constants that old versions of transformers saved beside the weights.
_CONSTANTS = "rotary_emb.inv_freq"
_NAMED = 3  # tensors that an error names


class SourceTensors:
    """Weights by name.

    Attributes:
        shapes: of every tensor.
        dtypes: as stored.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def __init__(self, directory: Path) -> None:
        """Read the index and the headers.

        Raises:
            ConfigError: there are no such files, or one is missing, damaged, or has tensors of a type that is no
                weight's.
        """
        self._safetensors = optional_module("safetensors", "importing a model")
        self._directory, self._files = directory, dict[str, Path]()
        self.shapes, self.dtypes = {}, {}
        for path, announced in _find(directory).items():
            self._open(path, announced)

    def read(self, name: str) -> Tensor:
        """One tensor in fp32.

        Raises:
            ConfigError: its file cannot be read any more.
        """
        path = self._files[name]
        try:
            # Opened every time: what a file has mapped into memory is given back with it.
            with self._safetensors.safe_open(path, framework="pt") as file:
                return file.get_tensor(name).float()
        except (OSError, self._safetensors.SafetensorError) as error:
            raise _damaged(path, error) from None

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare with the tensors that a model has. Raises ``ConfigError`` naming those that differ."""
        missing = [name for name in expected if name not in self.shapes]
        unexpected = [name for name in self.shapes if name not in expected]
        other = [
            f"{name} {list(self.shapes[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if self.shapes.get(name, shape) != shape
        ]
        for what, names in (("lack", missing), ("have the unknown", unexpected), ("have the shapes", other)):
            if names:
                more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
                raise ConfigError(
                    f"the weights in {self._directory} {what} {', '.join(names[:_NAMED])}{more}; config.json is of "
                    "another model, or a file of this one is missing"
                )

    def _open(self, path: Path, announced: list[str] | None) -> None:
        try:
            with self._safetensors.safe_open(path, framework="pt") as file:
                names = set(file.keys())
                if lacking := sorted(set(announced or ()) - names):
                    raise ConfigError(f"{path} lacks {lacking[0]}, which {INDEX} has in it; get it again")
                for name in sorted(names):
                    header = file.get_slice(name)
                    if name.endswith(_CONSTANTS):
                        continue
                    if header.get_dtype() not in _DTYPES:
                        raise ConfigError(
                            f"{name} in {path} is {header.get_dtype()}; only weights in {', '.join(_DTYPES)} can be "
                            "imported, so save the model unquantized in one of them"
                        )
                    if name in self._files:
                        raise ConfigError(f"{name} is in {self._files[name].name} and {path.name}; remove one of them")
                    self._files[name] = path
                    self.shapes[name] = tuple(header.get_shape())
                    self.dtypes[name] = _DTYPES[header.get_dtype()]
        except (OSError, self._safetensors.SafetensorError) as error:
            raise _damaged(path, error) from None


def _find(directory: Path) -> dict[Path, list[str] | None]:
    """The files, and which tensors the index says that they have (None: there is no index)."""
    if (directory / SINGLE).is_file():
        return {directory / SINGLE: None}
    if not (directory / INDEX).is_file():
        pickles = sorted(
            path.name for pattern in ("*.bin", "*.bin.index.json", "*.pt*") for path in directory.glob(pattern)
        )
        found = (
            f", only {pickles[0]}; pickles are not read, so convert it: load and save_pretrained it" if pickles else ""
        )
        raise ConfigError(f"{directory} has no {SINGLE} or {INDEX}{found or '; give the folder of a model'}")
    weight_map = read_json_object(directory / INDEX, "get it again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{directory / INDEX} has no weight_map; get it again")
    files: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ConfigError(f"{directory / INDEX} has {name} in {file!r}, which is not beside it; get it again")
        files.setdefault(directory / file, []).append(name)  # type: ignore[union-attr]  # all are lists
    return files


def _damaged(path: Path, error: Exception) -> ConfigError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    if not path.exists():
        reason = "No such file"
    return ConfigError(f"cannot read {path}: {reason}; get it again")
