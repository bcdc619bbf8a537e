"""Random configurations, good and bad, through all that reads one: each is a tree, or refused in one line, at once."""

from __future__ import annotations

import json
import random
import time
import types
import typing
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union

import pytest

from megatron_dlm.config.check import _BELOW_ONE, _RANGES, _leaves, validate
from megatron_dlm.config.load import dump_yaml, from_dict, load_yaml, parse_config, read_stored, to_dict
from megatron_dlm.config.tree import Config
from megatron_dlm.errors import ConfigError

CASES, SECONDS = 1000, 5.0
NUMBERS: list[Any] = [0, 1, 2, 3, 64, 255, -1, 2**31, 2**40, 2**63, 2**64, 10**30, 10**400, -(10**400)]
NUMBERS += [0.0, -0.0, 0.5, 1.0, 1e-3, -1e-3, 1e300, 1e-320, float("nan"), float("inf"), -float("inf")]
WORDS: list[Any] = [
    "",
    " ",
    "byte",
    "a",
    "../../x",
    "a\nb",
    "a\x00b",
    "\ud800",
    "\x1b[2J",
    "a" * 300,
    "a" * 20_000,
    "1e3",
]
ODD: list[Any] = [None, True, [], [1], [[[]]], {}, {"a": 1}, {"": None}, (), b"bytes", {1: 2}, {"a\nb": 1}]
# Text that is no configuration, or one that is meant to hurt; what follows is put into the middle of a good one.
TEXTS = ["[", "{", "&a [*a]", "<<: *x", "\t", "\x01", "!!python/name:os.system", "!!bool x", "? [a]\n: 1", "- " * 900]
TEXTS += [
    "a: &a [x]\nb: [*a, *a]",
    "'",
    '"\\x',
    "---\n---",
    "%YAML 9.9",
    "\ufeff",
    "run: {seed: 1, seed: 2}",
    "|",
    ">-",
]


def value(hint: Any, rng: random.Random, bad: float) -> Any:
    """A value of the type ``hint``, or with the probability ``bad`` any other."""
    if rng.random() < bad:
        return rng.choice(rng.choice((NUMBERS, WORDS, ODD)))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return value(rng.choice(arguments), rng, bad)
    if is_dataclass(hint):
        return section(hint, rng, bad)
    if origin is list:
        return [value(arguments[0], rng, bad) for _ in range(rng.randrange(3))]
    if origin is Literal:
        return rng.choice(arguments)
    if origin is dict:
        return {rng.choice(("softmax_scale", "bucket_size", "x")): rng.choice(NUMBERS)} if rng.random() < 0.3 else {}
    good: dict[Any, Callable[[], Any]] = {
        int: lambda: rng.choice((1, 2, 4, 8, 64)),
        float: lambda: rng.choice((0.0, 1e-3, 0.1, 0.5, 2.0)),
        bool: lambda: rng.random() < 0.5,
        str: lambda: rng.choice(("byte", "data/train", "runs/a", "text")),
        type(None): lambda: None,
    }
    return good[hint]()


def section(kind: type, rng: random.Random, bad: float) -> dict[Any, Any]:
    """Some of the keys of a section, and now and then one that it has not."""
    hints = typing.get_type_hints(kind)
    whole = kind is Config or rng.random() < 0.2
    tree = {f.name: value(hints[f.name], rng, bad) for f in fields(kind) if whole or rng.random() < 0.3}
    if rng.random() < bad / 4:
        tree[rng.choice((*WORDS, 7, None))] = rng.choice(ODD)
    return tree


def changed(rng: random.Random, bad: float) -> dict[Any, Any]:
    """A sound tree with other values at some places."""
    tree = to_dict(Config())
    tree["data"] |= {"train": [{"path": "data/train", "weight": 1.0}], "tokenizer": "byte"}
    tree["train"]["steps"] = 100
    hints = typing.get_type_hints(Config)
    for _ in range(rng.randrange(4)):
        name = rng.choice(list(tree))
        key, hint = rng.choice(list(typing.get_type_hints(hints[name]).items()))
        tree[name][key] = value(hint, rng, bad)
    return tree


def as_text(tree: Any, rng: random.Random) -> str:
    """YAML of a tree (JSON is, mostly), damaged in half of the cases."""
    text = json.dumps(tree, default=str)
    if rng.random() < 0.5:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(TEXTS) + text[at + rng.choice((0, 0, 1, 50)) :]
    return text


def through_everything(case: int, rng: random.Random, folder: Path) -> None:
    tree = changed(rng, 0.3) if rng.random() < 0.6 else section(Config, rng, rng.choice((0.003, 0.02, 0.2)))
    way = case % 4
    if way == 0:
        config = from_dict(tree)
    elif way == 1:
        config = from_dict(load_yaml(as_text(tree, rng), "a file"))
    elif way == 2:
        (folder / "config.yaml").write_bytes(
            as_text(tree, rng).encode("utf-8", rng.choice(("replace", "surrogatepass")))
        )
        config = rng.choice((lambda: parse_config(["--config", str(folder / "config.yaml")]),
                             lambda: read_stored(folder / "config.yaml")))()  # fmt: skip
    else:
        names = [f"{name}.{key}" for name, keys in to_dict(Config()).items() for key in keys]
        words = [f"--{rng.choice(names)}={rng.choice((*TEXTS, *map(str, NUMBERS + ODD), *WORDS))}" for _ in range(2)]
        config = parse_config(words)
    validate(config, world_size=rng.choice((None, 1, 8)), vocab_size=rng.choice((None, 258)))
    assert from_dict(load_yaml(dump_yaml(config), "written")) == config, "what is accepted can be kept"


def test_no_configuration_is_a_traceback_or_takes_long(tmp_path: Path) -> None:
    outcomes = Counter[str]()
    for case in range(CASES):
        rng, started = random.Random(case), time.process_time()
        try:
            through_everything(case, rng, tmp_path)
            outcomes["ok"] += 1
        except ConfigError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error) and len(str(error)) < 3000, f"case {case}: {error}"
        except BaseException as error:
            raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error
        assert time.process_time() - started < SECONDS, f"case {case}"
    print(f"FUZZ {CASES} configurations: {dict(outcomes)}")
    assert outcomes["refused"] > CASES // 2 and outcomes["ok"] > CASES // 50


def test_every_number_has_a_range() -> None:
    found = {key for key, kind in _kinds(Config).items() if {int, float} & set(kind)}
    assert found == {*_RANGES, *_BELOW_ONE} and found <= set(_leaves(Config()))


def _kinds(kind: type, prefix: str = "") -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}
    for name, hint in typing.get_type_hints(kind).items():
        found |= (
            _kinds(hint, f"{prefix}{name}.")
            if is_dataclass(hint)
            else {prefix + name: typing.get_args(hint) or (hint,)}
        )
    return found


@pytest.mark.parametrize("bound", [0, 1])
def test_numbers_beyond_a_bound_are_refused(bound: int) -> None:
    for key, bounds in _RANGES.items():
        part, name = key.split(".")
        config = Config()
        limit, up = bounds[bound], 2 * bound - 1
        beyond = limit + up * 0.001 * (abs(limit) or 1.0) if isinstance(limit, float) else limit + up
        setattr(getattr(config, part), name, beyond)
        with pytest.raises(ConfigError, match=f"{name} is .*; it must be from"):
            validate(config)
