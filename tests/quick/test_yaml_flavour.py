"""What is written is read back, and a word means the same in a file and on the command line."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.config.check import validate
from megatron_dlm.config.load import dump_yaml, from_dict, load_yaml, parse_config, to_dict
from megatron_dlm.config.tree import Config, SourceConfig
from megatron_dlm.config.yaml_flavour import Integer, plain
from megatron_dlm.config.yaml_flavour import dump_yaml as dump
from megatron_dlm.errors import ConfigError

# What YAML 1.1, YAML 1.2 or we ourselves might take for something else than a string.
TRICKY = (
    "1e3 5e17781 1E3 -1e-3 .5 5. 1_000 017 0o17 0x1F 0b1 1:30 190:20:30 12:30:45.5 true True yes no on off y null ~ "
    "Null nan .nan .inf -.INF inf 2024-05-01 2001-12-14t21:59:43.10-05:00 << = - -- --- ... ? : & * ! | > % @ ` # a#b "
    "{} [] [a {a: a: a:b !!int '1' \"1\" + - +1 1+ 0 00 -0"
).split()
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40))
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}, *a{i}], y{i}: 1}}\n" for i in range(60)
)
words = st.one_of(st.sampled_from(TRICKY), st.text(st.characters(codec="utf-8"), max_size=20))
trees = st.recursive(
    st.one_of(words, st.integers(), st.floats(allow_nan=False), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(trees)
def test_reading_is_the_inverse_of_writing(tree: Any) -> None:
    assert plain(load_yaml(dump(tree), "written")) == tree


@settings(max_examples=200, deadline=None)
@given(words.filter(str.strip), st.lists(words, max_size=3), words.filter(str.strip))
def test_a_configuration_with_any_strings_is_read_back(directory: str, prompts: list[str], path: str) -> None:
    config = Config()
    config.run.directory, config.evaluate.prompts, config.data.tokenizer = directory, prompts, path
    config.data.train = [SourceConfig(path)]
    config.checkpoint.initialize_from = path
    assert from_dict(load_yaml(dump_yaml(config), "written")) == config
    assert from_dict(plain(load_yaml(dump_yaml(config), "written"))) == from_dict(to_dict(config))


@pytest.mark.parametrize("word", [word for word in TRICKY if word not in ("~", "null", "Null")])
def test_an_option_that_is_a_string_stays_as_typed(word: str) -> None:
    assert parse_config([f"--run.directory={word}"]).run.directory == word


@pytest.mark.parametrize("word", ["1e3", "5e17781", "017", "1:30", "0x1F", "yes", "2024-05-01", "1_000", "-7", ".5"])
def test_a_word_is_the_same_in_a_file_and_on_the_command_line(word: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for key in ("run.directory", "optimizer.lr", "train.steps"):
        section, name = key.split(".")
        file.write_text(f"{section}:\n  {name}: {word}\n")
        found = []
        for argv in (["--config", str(file)], [f"--{key}", word]):
            try:
                found.append(getattr(getattr(parse_config(argv), section), name))
            except ConfigError as error:
                found.append(str(error))
        assert found[0] == found[1] and type(found[0]) is type(found[1]) in (str, int, float), key


def test_numbers_are_plain_in_the_tree() -> None:
    config = from_dict(load_yaml("train: {steps: 017, epochs: 1e1}\nmodel: {transformer_config: {a: [1, 2.5]}}", "x"))
    assert (config.train.steps, config.train.epochs) == (17, 10.0)
    values = [config.train.steps, config.train.epochs, *config.model.transformer_config["a"]]
    assert [type(value) for value in values] == [int, float, int, float]
    assert isinstance(load_yaml("7", "x"), Integer) and math.isinf(load_yaml("-.inf", "x"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "write fewer aliases"),
        ("&a [*a]", "write fewer aliases"),
        ("[" * 5000, "is nested too deeply"),
        ("{" * 5000, "is nested too deeply"),
        ("{[a]: 1}", "a key must be a word"),
        ("{{a: 1}: 1}", "a key must be a word"),
        ("a: 1\na: 2", "the key 'a' stands twice"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("a: " + "9" * 5000, "cannot be read"),
        (MERGES, "unknown key a0"),
        ("[" + "a, " * 100_000 + "]", "has more than 10,000 values"),
        ("!!bool maybe", "cannot be read"),
        ("!!timestamp never", "could not determine a constructor"),
        ("!!set {a, b}", "could not determine a constructor"),
        ("a:\n\tb: 1", "cannot start any token"),
        ("a: \x01", "unacceptable character"),
        ('"a\\nb": 1', "unknown key a\\nb;"),
        ("k" * 100 + ": 1", "unknown key kkk"),
        ("optimizer: {lr: 1" + "0" * 400 + "}", "optimizer.lr is inf; it must be"),
    ],
    ids=range(19),
)
def test_hostile_documents_are_one_line_at_once(text: str, message: str) -> None:
    started = time.process_time()
    with pytest.raises(ConfigError) as error:
        validate(from_dict(load_yaml(text, "file")))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert time.process_time() - started < 5


def test_files_that_are_no_configurations(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for make, message in (
        (lambda: os.mkfifo(file), "it is no regular file"),
        (file.mkdir, "Is a directory"),
        (lambda: file.symlink_to(file), "symbolic links"),
        (lambda: file.write_bytes(b"\xff\xfe"), "is not UTF-8 text"),
        (lambda: file.touch() or os.truncate(file, 10**8), "it has more than 524,288 bytes"),
        (lambda: file.write_text("\ufeffrun: {seed: 1}"), None),
    ):
        make()
        if message is None:
            assert parse_config(["--config", str(file)]).run.seed == 1
            break
        with pytest.raises(ConfigError, match=message) as error:
            parse_config(["--config", str(file)])
        assert str(file) in str(error.value)
        file.rmdir() if file.is_dir() else file.unlink()


def test_merges_and_aliases_work() -> None:
    text = "base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}\nlist: [*base]"
    assert plain(load_yaml(text, "x"))["other"] == {"a": 1, "b": 3}
