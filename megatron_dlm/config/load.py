"""Reading and writing the configuration: YAML files, mappings, and `--section.key value` on the command line."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

import yaml

from megatron_dlm.config.check import validate
from megatron_dlm.config.tree import Config
from megatron_dlm.errors import ConfigError

if TYPE_CHECKING:
    import jsonargparse

T = TypeVar("T")

RENAMED = {"evaluate.samples": "prompts", "evaluate.tasks[].samples": "masks"}
"""Keys that had another name once, and the last part of their names now; [] stands for every place of a list."""


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number (YAML 1.1 asks for a dot, and would read it as a string)."""


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> Any:
    """YAML lets the last of equal keys win, silently."""
    seen = set()
    for key_node, _ in node.value:
        key = key_node.value
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)
_Loader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(argv: Sequence[str]) -> Config:
    """The checked configuration of a command line such as ``["--config", "tiny.yaml", "--train.steps", "5"]``.

    Raises ``ConfigError``. ``--help`` and ``--print_config`` print and raise ``SystemExit(0)``.
    """
    config = parse_config(argv)
    validate(config)
    return config


def parse_config(argv: Sequence[str]) -> Config:
    """As ``load_config``, but only keys and types are checked, not whether the values fit together."""
    import jsonargparse

    if not argv:
        raise ConfigError("no configuration is given; name one with --config FILE, see megatron-dlm train --help")
    if not argv[0].startswith("-"):
        raise ConfigError(f"{argv[0]!r} is not an option; name the configuration with --config {argv[0]}")
    for option, value in zip(argv, [*argv[1:], ""], strict=True):
        if option == "--config" or option.startswith("--config="):
            read_yaml(option.partition("=")[2] or value)  # jsonargparse would not see that a key stands twice
    parser = build_parser()
    try:
        namespace = parser.parse_args(list(argv))
    except (jsonargparse.ArgumentError, UnicodeDecodeError) as error:
        _explain(parser, argv)
        raise ConfigError(_one_line(str(error)) + "; see megatron-dlm train --help") from None
    mapping = namespace.as_dict()
    mapping.pop("config", None)
    mapping.pop("print_config", None)
    return from_dict(mapping)


def build_parser() -> jsonargparse.ArgumentParser:
    """The parser of `megatron-dlm train`; its help is the documentation of the tree."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="megatron-dlm train",
        usage="%(prog)s --config FILE [--section.key VALUE ...]",
        description=f"{Config.__doc__} Options override the file; lists and mappings are given as YAML.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="Configuration file (YAML).")
    parser.add_class_arguments(Config)
    return parser


def load_yaml(text: str, name: str) -> Any:
    """Parse YAML; ``ConfigError`` names ``name`` and the line of a syntax error."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = _one_line(getattr(error, "problem", None) or str(error))
        raise ConfigError(f"{where} is not valid YAML: {problem}; correct it") from None


def to_dict(config: Config) -> dict[str, Any]:
    """The tree as nested dictionaries of plain values."""
    return asdict(config)


def dump_yaml(config: Config) -> str:
    """The tree as YAML, with every key; ``from_dict(load_yaml(...))`` gives it back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=120)


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
        return from_dict(_renamed(read_yaml(str(path)), ""))
    except ConfigError as error:
        raise ConfigError(f"{path.parent} is of another version of megatron_dlm: {error}") from None


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
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        kind = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[hint]
        raise ConfigError(f"{key} must be {kind}, not {_show(value)}")
    return value


def _unknown(key: str, prefix: str, valid: list[str]) -> str:
    if name := RENAMED.get(re.sub(r"\[\d+\]", "[]", prefix + key)):
        return f"{prefix}{key} is now {prefix}{name}; rename it"
    where = f"of {prefix.rstrip('.')}" if prefix else "at the top"
    return f"unknown key {prefix}{key}{_closest(key, valid)}; the keys {where} are: {', '.join(valid)}"


def _closest(key: Any, valid: Sequence[str]) -> str:
    matches = difflib.get_close_matches(str(key), valid, n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _explain(parser: jsonargparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Find the option that ``parser`` refused in ``argv`` and raise our own ``ConfigError`` for it.

    jsonargparse's messages depend on where the fault is and do not name the valid keys. Returns if every
    option passes alone.
    """
    import jsonargparse

    for index, option in enumerate(argv):
        name, given, text = option[2:].partition("=")
        if not option.startswith("--") or name in ("help", "print_config") or name.endswith("+"):
            continue
        pair = list(argv[index : index + (1 if given else 2)])
        try:
            parser.parse_args(pair)
        except (jsonargparse.ArgumentError, UnicodeDecodeError):
            text = text if given or len(pair) == 1 else pair[1]
            value = read_yaml(text) if name == "config" else load_yaml(text, f"--{name}")
            for part in reversed([] if name == "config" else name.split(".")):
                value = {part: value}
            from_dict(value)


def read_yaml(path: str) -> Any:
    """The content of a YAML file. Raises ``ConfigError`` naming the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path!r}: {error.strerror}; check --config") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the configuration file {path!r} is not UTF-8 text; save it as UTF-8") from None
    content = load_yaml(text, path)
    if content is None:
        raise ConfigError(f"the configuration file {path!r} is empty; write the keys that differ from the defaults")
    return content
