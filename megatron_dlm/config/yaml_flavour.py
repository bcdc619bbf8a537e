"""The YAML of configurations: what is written is read back, and a word means in a file what it means on a command line.

It is YAML 1.2's idea of a number, not YAML 1.1's: 1e-3 is one, 017 is seventeen, and 1:30, 0x1F, yes and 2024-05-01 are
words. A number remembers its text, so that a path or a prompt may look like one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from megatron_dlm.errors import ConfigError

_MAX_VALUES = 100_000  # of a document with its aliases written out; ours have hundreds
_MAX_NODES, _MAX_DEPTH = 10_000, 50  # of a document as it is written
_TAG = "tag:yaml.org,2002:"
_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)


class Integer(int):
    """A whole number and how it was written."""

    text: str


class Real(float):
    """A number and how it was written."""

    text: str


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}
    nodes = depth = merged = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As yaml's, but it ends with an error before a document takes seconds."""
        self.nodes += 1
        if self.nodes > _MAX_NODES:
            problem = f"it has more than {_MAX_NODES:,} values"
            raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
        if self.depth > _MAX_DEPTH:
            raise RecursionError
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """As yaml's, but of equal keys that are merged one remains: copies of copies would be endlessly many."""
        super().flatten_mapping(node)
        self.merged += len(node.value)
        if self.merged > _MAX_VALUES:
            problem = f"it merges more than {_MAX_VALUES:,} values"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        node.value = list({key.value: (key, value) for key, value in node.value if _is_word(key)}.values())


class _Dumper(yaml.SafeDumper):
    """Quotes every string that ``_Loader`` would take for something else."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _kind in (_Loader, _Dumper):
    for _name, _pattern, _first in _RESOLVERS:
        # An empty string is told by its first character, which it has not.
        first = [character.replace("\0", "") for character in _first]
        _kind.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), first)


def _number(kind: type[Integer] | type[Real]) -> Any:
    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        text = str(loader.construct_scalar(node))
        value = kind(re.sub(r"\.(inf|nan)$", r"\1", text.lower()).replace("_", ""))
        value.text = text
        return value

    return construct


def _is_word(key: yaml.Node) -> bool:
    """Raises yaml's error for a key that is something else."""
    if not isinstance(key, yaml.ScalarNode):
        raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
    return True


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> Any:
    """YAML lets the last of equal keys win, silently."""
    seen = set()
    for key_node, _ in node.value:
        if _is_word(key_node) and key_node.value in seen:
            problem = f"the key {key_node.value!r} stands twice"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        seen.add(key_node.value)
    loader.flatten_mapping(node)
    return {str(key.value): loader.construct_object(value, deep=True) for key, value in node.value}


# Of the tags that a document can give itself, the plain ones.
_Loader.yaml_constructors = {
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag in (None, *(_TAG + name for name in ("null", "bool", "str", "seq")))
}
_Loader.add_constructor(_TAG + "int", _number(Integer))
_Loader.add_constructor(_TAG + "float", _number(Real))
_Loader.add_constructor(_TAG + "map", _mapping_without_duplicates)


def load_yaml(text: str, name: str) -> Any:
    """Parse YAML; keys are strings, numbers are ``Integer`` or ``Real``.

    Raises ``ConfigError``, which names ``name`` and the line of a fault.
    """
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = " ".join((getattr(error, "problem", None) or str(error)).split())
        raise ConfigError(f"{where} is not valid YAML: {problem}; correct it") from None
    except RecursionError:
        raise ConfigError(f"{name} is nested too deeply; write fewer brackets") from None
    except (ValueError, KeyError) as error:  # a number of thousands of digits; a word that is tagged as something else
        raise ConfigError(f"{name} has a value that cannot be read: {error}; correct it") from None
    if _size(content, {}) > _MAX_VALUES:
        raise ConfigError(f"{name} stands for more than {_MAX_VALUES:,} values; write fewer aliases")
    return content


def dump_yaml(content: Any) -> str:
    """Plain values as YAML; ``load_yaml`` gives them back."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)


def plain(value: Any) -> Any:
    """A value of ``load_yaml`` in Python's own types."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, Integer):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _size(value: Any, known: dict[int, int]) -> int:
    """Values in a tree, what stands in several places counted in each; in one visit of each."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = _MAX_VALUES + 1  # of one that contains itself
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(item, known) for item in items)
    return known[id(value)]
