"""Reading and writing the configuration: YAML files, mappings, and `--section.key value` on the command line."""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

from megatron_dlm.config import yaml_flavour
from megatron_dlm.config.check import check_values, validate
from megatron_dlm.config.tree import Config
from megatron_dlm.config.yaml_flavour import Integer, Real, load_yaml, plain
from megatron_dlm.errors import ConfigError
from megatron_dlm.files import read_bytes

if TYPE_CHECKING:
    import jsonargparse

T = TypeVar("T")
_LARGEST = 2**19  # bytes of a configuration file

RENAMED = {"evaluate.samples": "prompts", "evaluate.tasks[].samples": "masks"}
"""Keys that had another name once, and the last part of their names now; [] stands for every place of a list."""


def load_config(argv: Sequence[str]) -> Config:
    """The checked configuration of a command line such as ``["--config", "tiny.yaml", "--train.steps", "5"]``.

    Raises ``ConfigError``. ``--help`` and ``--print_config`` print and raise ``SystemExit(0)``.
    """
    config = parse_config(argv)
    validate(config)
    return config


def parse_config(argv: Sequence[str]) -> Config:
    """As ``load_config``, but only keys and types are checked, not whether the values fit together."""
    if not argv:
        raise ConfigError("no configuration is given; name one with --config FILE, see megatron-dlm train --help")
    if helped := [word for word in argv if word in ("-h", "--help") or word.endswith(".help")]:
        build_parser().parse_args(helped[:1])  # ends the program
    options = _options([word for word in argv if word != "--print_config"])
    tree: dict[str, Any] = {}
    for path in (text for name, text in options if name == "config"):
        _merge(tree, read_yaml(path))
    for name, text in ((name, text) for name, text in options if name != "config"):
        _set(tree, name, text)
    config = from_dict(tree)
    if "--print_config" in argv:
        print(dump_yaml(config), end="")
        raise SystemExit(0)
    return config


def build_parser() -> jsonargparse.ArgumentParser:
    """The help of `megatron-dlm train`, which is the documentation of the tree."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="megatron-dlm train",
        usage="%(prog)s --config FILE [--section.key VALUE ...]",
        description=f"{Config.__doc__} Options override the file; lists and mappings are given as YAML.",
    )
    parser.add_argument("--config", action="config", help="Configuration file (YAML); a later one overrides.")
    parser.add_class_arguments(Config)
    return parser


def _options(argv: Sequence[str]) -> list[tuple[str, str]]:
    """(name, text) of `--name text` and `--name=text`, in order."""
    found: list[tuple[str, str]] = []
    words = iter(argv)
    for word in words:
        if not word.startswith("--"):
            hint = f"; name the configuration with --config {word}" if not found else ""
            raise ConfigError(f"{word!r} is not an option{hint}; see megatron-dlm train --help")
        name, given, text = word[2:].partition("=")
        following = text if given else next(words, None)
        if following is None or (not given and following.startswith("--")):
            raise ConfigError(f"--{name} has no value; give one, see megatron-dlm train --help")
        found.append((name, following))
    return found


def _merge(tree: dict[str, Any], other: Any) -> None:
    """Put the values of ``other`` over those of ``tree``, mapping by mapping."""
    if not isinstance(other, Mapping):
        raise ConfigError(f"the configuration must be a mapping of keys to values, not {_show(other)}")
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = dict(value) if isinstance(value, Mapping) else value


def _set(tree: dict[str, Any], name: str, text: str) -> None:
    """Set one value of ``tree``, or, for a name that ends in +, add it to a list."""
    *sections, key = name.removesuffix("+").split(".")
    # What is a string stays as it was typed, whatever YAML would make of it.
    typed = _is_text(sections, key, added=name.endswith("+")) and text not in ("null", "~")
    value = text if typed else load_yaml(text, f"--{name}")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):  # of a file that is refused for it
            inner = tree[section] = {}
        tree = inner
    if name.endswith("+"):
        before = tree.get(key)
        value = [*(before if isinstance(before, list) else []), *(value if isinstance(value, list) else [value])]
    tree[key] = value


def _is_text(sections: Sequence[str], key: str, *, added: bool) -> bool:
    """Whether the tree has a string at this place, or with ``added`` a list of strings."""
    cls: Any = Config
    for section in sections:
        cls = typing.get_type_hints(cls).get(section) if is_dataclass(cls) else None
    hint = typing.get_type_hints(cls).get(key) if is_dataclass(cls) else None
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType) or (added and origin is list):
        return str in typing.get_args(hint)
    return hint is str


def to_dict(config: Config) -> dict[str, Any]:
    """The tree as nested dictionaries of plain values."""
    return asdict(config)


def dump_yaml(config: Config) -> str:
    """The tree as YAML, with every key; ``from_dict(load_yaml(...))`` gives it back."""
    return yaml_flavour.dump_yaml(to_dict(config))


def from_dict(mapping: Mapping[str, Any]) -> Config:
    """The tree of nested dictionaries; absent keys take their defaults.

    Raises ``ConfigError`` for an unknown key (naming the valid ones) or a value of another type.
    """
    return build(Config, mapping, "")


def read_stored(path: Path) -> Config:
    """The configuration that a run has left at ``path``, with keys renamed that had other names when it was written.

    Raises:
        ConfigError: it cannot be read, or has keys that no version of these names had; one line.
    """
    try:
        config = from_dict(_renamed(read_yaml(str(path)), ""))
    except ConfigError as error:
        raise ConfigError(f"{path.parent} is of another version of megatron_dlm: {error}") from None
    try:
        check_values(config)
    except ConfigError as error:
        raise ConfigError(f"{path} is damaged: {error}; restore it") from None
    return config


def _renamed(value: Any, key: str) -> Any:
    """``value``, which stands at ``key`` of the tree, with today's names for the keys in it."""
    if isinstance(value, list):
        return [_renamed(item, f"{key}[]") for item in value]
    if not isinstance(value, Mapping):
        return value
    prefix = f"{key}." if key else ""
    return {RENAMED.get(f"{prefix}{name}", name): _renamed(item, f"{prefix}{name}") for name, item in value.items()}


def build(cls: type[T], mapping: Any, prefix: str) -> T:
    """A dataclass of nested dictionaries; ``prefix`` ("model.") stands before its keys in messages.

    Raises ``ConfigError`` as ``from_dict``.
    """
    if not isinstance(mapping, Mapping):
        where = prefix.rstrip(".") or "the configuration"
        raise ConfigError(f"{where} must be a mapping of keys to values, not {_show(mapping)}")
    hints = typing.get_type_hints(cls)
    for key in mapping:
        if key not in hints:
            raise ConfigError(_unknown(str(key), prefix, list(hints)))
    values = {key: _convert(value, hints[key], prefix + key) for key, value in mapping.items()}
    for item in fields(cls):  # type: ignore[arg-type]  # every cls here is a dataclass
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{prefix.rstrip('.')} has no {item.name}; add it")
    return cls(**values)


def _convert(value: Any, hint: Any, key: str) -> Any:
    """``value`` as the type ``hint``; ``ConfigError`` names ``key`` if it is none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _convert(value, inner, key)
    if is_dataclass(hint):
        return build(hint, value, f"{key}.")  # type: ignore[arg-type]
    if origin is list:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key} must be a list, not {_show(value)}")
        return [_convert(item, arguments[0], f"{key}[{index}]") for index, item in enumerate(value)]
    if origin is Literal:
        if value not in arguments:
            names = ", ".join(arguments)
            raise ConfigError(f"{key} must be one of {names}, not {_show(value)}{_closest(value, arguments)}")
        return value
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} must be a mapping of keys to values, not {_show(value)}")
        return plain(value)
    if hint is str and isinstance(value, Integer | Real):
        return value.text
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**1000 else math.inf if value > 0 else -math.inf
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        kind = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[hint]
        raise ConfigError(f"{key} must be {kind}, not {_show(value)}")
    return plain(value)


def _unknown(key: str, prefix: str, valid: list[str]) -> str:
    if name := RENAMED.get(re.sub(r"\[\d+\]", "[]", prefix + key)):
        return f"{prefix}{key} is now {prefix}{name}; rename it"
    where = f"of {prefix.rstrip('.')}" if prefix else "at the top"
    return f"unknown key {prefix}{key}{_closest(key, valid)}; the keys {where} are: {', '.join(valid)}"


def _closest(key: Any, valid: Sequence[str]) -> str:
    matches = difflib.get_close_matches(str(key)[:100], valid, n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""


def _show(value: Any) -> str:
    text = repr(value[:40] if isinstance(value, str | list) else value)
    return text if len(text) <= 40 else text[:37] + "..."


def read_yaml(path: str) -> Any:
    """The content of a YAML file. Raises ``ConfigError`` naming the file."""
    try:
        text = read_bytes(path, _LARGEST).decode()
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path!r}: {error.strerror}; check --config") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the configuration file {path!r} is not UTF-8 text; save it as UTF-8") from None
    content = load_yaml(text, path)
    if content is None:
        raise ConfigError(f"the configuration file {path!r} is empty; write the keys that differ from the defaults")
    return content
