"""The configuration tree: reading, writing, and every contradiction it finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dlm.config.check import check_schedule, data_parallel_size, validate
from megatron_dlm.config.load import dump_yaml, from_dict, load_config, load_yaml, parse_config, read_stored, to_dict
from megatron_dlm.config.tree import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    SourceConfig,
    TaskConfig,
    TrainConfig,
)
from megatron_dlm.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
# A crossover's file holds a grid too (test_crossover_grid.py).
EXAMPLES = sorted(path for path in CONFIGS.glob("*.yaml") if not path.name.startswith("crossover"))
GEOMETRIC = {"diffusion__schedule": "geometric"}


def build(**changes: Any) -> Config:
    """A valid configuration with some keys (``model__num_layers=3``) changed."""
    config = Config(data=DataConfig(train=[SourceConfig("corpus")], tokenizer="byte"), train=TrainConfig(steps=100))
    for key, value in changes.items():
        section, name = key.split("__")
        assert hasattr(getattr(config, section), name)
        setattr(getattr(config, section), name, value)
    return config


@pytest.fixture
def file(tmp_path: Path):
    def write(text: str | bytes) -> str:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid(path):
    config = load_config(["--config", str(path)])
    world_size = config.parallel.model_parallel_size * (config.parallel.data_parallel_size or 1)
    validate(config, world_size=world_size, vocab_size=1026)


def test_examples_are_there():
    assert {path.name for path in EXAMPLES} >= {"tiny.yaml", "demo.yaml", "tiny_ar.yaml"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_reading_and_writing_are_inverse(path):
    config = load_config(["--config", str(path)])
    config.model.transformer_config = {"activation_func_clamp_value": 1e-7, "nested": {"a": [1, None]}}
    assert from_dict(load_yaml(dump_yaml(config), "written")) == config
    assert from_dict(to_dict(config)) == config


def test_a_stored_configuration_may_have_the_names_of_its_time(tmp_path):
    config = build(evaluate__prompts=["a", "b"], evaluate__tasks=[TaskConfig("piqa", "x", masks=3)])
    stored = to_dict(config)
    (stored["evaluate"]["tasks"][0])["samples"] = stored["evaluate"]["tasks"][0].pop("masks")
    stored["evaluate"]["samples"] = stored["evaluate"].pop("prompts")
    stored["model"]["transformer_config"] = {"samples": 3}  # of megatron-core, whose names are its own
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(stored))
    config.model.transformer_config = {"samples": 3}
    assert read_stored(path) == config
    path.write_text("evaluate: {sample: [a]}")
    with pytest.raises(ConfigError, match=f"{tmp_path} is of another version of megatron_dlm: unknown key eval"):
        read_stored(path)


def test_defaults_of_an_empty_mapping():
    assert from_dict({}) == Config()


def test_command_line_overrides_the_file(file):
    path = file("model: {num_layers: 2, transformer_config: {a: 1}}\ndata: {train: [{path: x}]}\ntrain: {steps: 9}")
    config = parse_config(
        ["--config", path, "--model.num_layers=8", "--model.transformer_config.b", "2"]
        + ["--data.train", "[{path: y}, {path: z, weight: 2}]", "--model.qk_norm", "false", "--model.head_dim", "null"]
    )
    assert config.model.num_layers == 8 and config.train.steps == 9
    assert config.model.transformer_config == {"a": 1, "b": 2}
    assert config.data.train == [SourceConfig("y"), SourceConfig("z", 2.0)]
    assert config.model.qk_norm is False and config.model.head_dim is None


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", ".001", "0.001", "1.e-3", "10e-4"])
def test_numbers_without_a_dot(file, text):
    assert parse_config(["--config", file(f"optimizer: {{lr: {text}}}")]).optimizer.lr == 0.001
    assert parse_config(["--optimizer.lr", text]).optimizer.lr == 0.001
    assert from_dict(load_yaml(f"optimizer: {{lr: {text}}}", "x")).optimizer.lr == 0.001


def test_words_that_look_like_numbers_stay_words():
    assert load_yaml("[e3, 1e, 1e-3x, -e3, 12e]", "x") == ["e3", "1e", "1e-3x", "-e3", "12e"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {lrr: 1}", "unknown key optimizer.lrr (did you mean lr?); the keys of optimizer are: lr, min_lr,"),
        ("optimiser: {lr: 1}", "unknown key optimiser (did you mean optimizer?); the keys at the top are: run, model,"),
        ("data: {train: [{pth: x}]}", "unknown key data.train[0].pth (did you mean path?)"),
        ("data: {train: [{weight: 1}]}", "data.train[0] has no path"),
        ("data: {train: x}", "data.train must be a list, not 'x'"),
        ("optimizer: {lr: fast}", "optimizer.lr must be a number, not 'fast'"),
        ("train: {steps: 1.5}", "train.steps must be an integer, not 1.5"),
        ("train: {steps: true}", "train.steps must be an integer, not True"),
        ("model: {qk_norm: 3}", "model.qk_norm must be true or false, not 3"),
        ("model: {num_layers: null}", "model.num_layers must be an integer, not None"),
        ("run: {directory: [3]}", "run.directory must be a string, not [3]"),
        ("run: {directory: true}", "run.directory must be a string, not True"),
        ("optimizer: {schedule: cosin}", "one of wsd, cosine, linear, constant, not 'cosin' (did you mean cosine?)"),
        ("model: {transformer_config: 3}", "model.transformer_config must be a mapping of keys to values, not 3"),
        ("model: 3", "model must be a mapping of keys to values, not 3"),
        ("evaluate: {samples: [a]}", "evaluate.samples is now evaluate.prompts; rename it"),
        ("evaluate: {tasks: [{name: piqa, path: x, samples: 3}]}", "tasks[0].samples is now evaluate.tasks[0].masks;"),
        ("data: {samples: 3}", "unknown key data.samples"),
        ("[1]", "the configuration must be a mapping of keys to values, not [1]"),
    ],
)
def test_unknown_keys_and_wrong_types_name_the_valid_ones(file, text, message):
    with pytest.raises(ConfigError) as from_file:
        parse_config(["--config", file(text)])
    with pytest.raises(ConfigError) as from_mapping:
        from_dict(load_yaml(text, "x"))
    for error in (from_file, from_mapping):
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.layers", "3"], "unknown key model.layers (did you mean num_layers?); the keys of model are:"),
        (["--model.num_l", "3"], "unknown key model.num_l (did you mean num_layers?)"),
        (["--mdl.num_layers=3"], "unknown key mdl (did you mean model?); the keys at the top are: run"),
        (["--run.directory", "2024", "--model.num_layers", "x"], "model.num_layers must be an integer, not 'x'"),
        (["--evaluate.samples", "[a]"], "evaluate.samples is now evaluate.prompts; rename it"),
        (["--train.steps"], "--train.steps"),
        (["stray"], "stray"),
        (["--config", "absent.yaml"], "cannot read the configuration file 'absent.yaml': No such file"),
        (["--model", "absent.yaml"], "model must be a mapping"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError) as error:
        parse_config(options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"\xff\xfe", "is not UTF-8"), (b"model: {a: [1\n", "config.yaml:2 is not valid YAML")],
)
def test_unreadable_files(file, content, message):
    with pytest.raises(ConfigError) as error:
        parse_config(["--config", file(content)])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_valid_configuration_is_accepted():
    validate(build(), world_size=2, vocab_size=1000)
    validate(build(train__steps=None, train__epochs=0.5))
    validate(
        build(
            parallel__tensor_model_parallel_size=2,
            parallel__pipeline_model_parallel_size=2,
            parallel__virtual_pipeline_model_parallel_size=2,
            parallel__sequence_parallel=True,
            parallel__data_parallel_size=2,
        ),
        world_size=8,
        vocab_size=1000,
    )


TP, PP = "parallel__tensor_model_parallel_size", "parallel__pipeline_model_parallel_size"
VPP, DP = "parallel__virtual_pipeline_model_parallel_size", "parallel__data_parallel_size"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__num_layers": 0}, "model.num_layers is 0; it must be from 1 to 10000"),
        ({"model__head_dim": -2}, "model.head_dim is -2"),
        ({"optimizer__lr": float("nan")}, "optimizer.lr is nan; it must be from 1e-30 to 1000.0"),
        ({"optimizer__weight_decay": -0.1}, "optimizer.weight_decay is -0.1; it must be from 0 to 1000.0"),
        ({"optimizer__beta2": 1.0}, "optimizer.beta2 is 1.0; it must be at least 0 and below 1"),
        ({"model__hidden_dropout": 1.0}, "model.hidden_dropout is 1.0"),
        ({"diffusion__random_length_probability": 1.1}, "diffusion.random_length_probability is 1.1; it must"),
        ({"autoregressive__input_mask_ratio": -0.1}, "autoregressive.input_mask_ratio is -0.1"),
        ({"diffusion__eps": 0.0}, "diffusion.eps is 0.0"),
        ({"diffusion__eps": 0.25}, "diffusion.eps is 0.25; it must be at least 0 and below 0.25"),
        ({"diffusion__polynomial_exponent": 0.0}, "diffusion.polynomial_exponent is 0.0; it must be from 1e-30"),
        ({"diffusion__sigma_min": 0.0}, "diffusion.sigma_min is 0.0; it must be from 1e-30"),
        (
            {**GEOMETRIC, "diffusion__sigma_min": 30.0},
            "diffusion.sigma_min (30) and diffusion.sigma_max (20) must be in",
        ),
        ({**GEOMETRIC, "diffusion__sigma_max": 1e9}, "must be in ascending order between 1e-8 and 1000"),
        (
            {**GEOMETRIC, "diffusion__sigma_max": 2.0},
            "leave out 14% of the mask probabilities, of which the loss needs",
        ),
        ({"diffusion__schedule": "cosine_mdlm", "diffusion__eps": 0.2}, "eps with the cosine_mdlm schedule and"),
        ({"diffusion__masking": "bernoulli", "diffusion__eps": 0.2}, "leave out 20% of the mask probabilities"),
        ({"diffusion__schedule": "polynomial", "diffusion__polynomial_exponent": 1e9}, "polynomial_exponent is 1e+09"),
        (
            {"diffusion__complementary": True, "diffusion__masking": "bernoulli"},
            "diffusion.complementary: true needs diffusion.masking exact_count, not bernoulli; change either",
        ),
        (
            {"diffusion__complementary": True, "train__global_batch_size": 9, "train__micro_batch_size": 3},
            "train.global_batch_size (9) must be even with diffusion.complementary: true",
        ),
        ({"run__seed": -1}, "run.seed is -1"),
        ({"run__seed": 2**64}, "run.seed is 18446744073709551616; it must be from 0 to 18446744073709551615"),
        ({"run__directory": " "}, "run.directory is empty"),
        ({"model__hidden_size": 250}, "is not a multiple of model.num_attention_heads (4)"),
        ({"model__head_dim": 33}, "the head dimension is 33 but rotary positions need an even one"),
        ({"model__num_query_groups": 3}, "must be a multiple of model.num_query_groups (3)"),
        ({TP: 8}, "model.num_attention_heads (4) must be a multiple of parallel.tensor_model_parallel_size (8)"),
        ({TP: 4, "model__num_query_groups": 2}, "model.num_query_groups (2) must be a multiple"),
        ({TP: 4, "model__ffn_hidden_size": 702}, "model.ffn_hidden_size (702) must be a multiple"),
        ({PP: 3}, "model.num_layers (4) cannot be divided over 3 pipeline stages; use a multiple of 3"),
        ({PP: 2, VPP: 3}, "over 2 pipeline stages x 3 model chunks; use a multiple of 6"),
        ({VPP: 2}, "needs parallel.pipeline_model_parallel_size > 1"),
        ({PP: 2, VPP: 1}, "interleaves nothing; set it to null"),
        ({PP: 2, VPP: 2, DP: 1, "train__global_batch_size": 12}, "number of micro-batches (3 here)"),
        ({"parallel__sequence_parallel": True}, "needs parallel.tensor_model_parallel_size > 1"),
        ({TP: 2, "parallel__sequence_parallel": True, "data__sequence_length": 255}, "data.sequence_length (255)"),
        ({"train__global_batch_size": 10}, "is not a multiple of train.micro_batch_size (4); use a multiple of 4"),
        ({DP: 8}, "is not a multiple of train.micro_batch_size (4) x 8 replicas; use a multiple of 32"),
        ({"data__train": []}, "data.train is empty"),
        ({"data__train": [SourceConfig("")]}, "data.train[0].path is empty"),
        ({"data__valid": [SourceConfig("x", 0.0)]}, "data.valid[0].weight is 0.0"),
        ({"data__tokenizer": ""}, "data.tokenizer is empty"),
        ({"data__sequence_length": 2**40}, "it must be from 1 to 4194303"),
        ({"data__train": [SourceConfig("a"), SourceConfig("./a")]}, "data.train names ./a twice; give it once"),
        ({"data__train": [SourceConfig("a" * 256)]}, "data.train[0].path has 256 bytes; a path has at most"),
        ({"data__tokenizer": "a\0b"}, "data.tokenizer is 'a\\x00b'; give a path without control characters"),
        ({"evaluate__prompts": ["\ud800"]}, "evaluate.prompts[0] has a character that UTF-8 has not"),
        ({"evaluate__prompts": ["a" * 10_000_000]}, "has 10,000,000 characters; it must have at most 100,000"),
        ({"train__global_batch_size": 2**63}, "train.global_batch_size is 9223372036854775808; it must be from 1 to"),
        ({"train__steps": 10**4000}, "train.steps is a number of more than 20 digits; it must be from 1 to"),
        ({"train__steps": 2**30, "train__global_batch_size": 2**20}, "are 2,199,023,255,552 sequences or more"),
        ({"optimizer__lr": 1e300}, "optimizer.lr is 1e+300; it must be from 1e-30 to 1000.0"),
        ({"model__hidden_size": 2**40}, "model.hidden_size is 1099511627776; it must be from 1 to 1048576"),
        ({"data__unique_tokens": 100}, "data.unique_tokens (100) is less than one sequence"),
        ({"train__steps": None}, "exactly one of train.steps and train.epochs (neither is set)"),
        ({"train__epochs": 1.0}, "exactly one of train.steps and train.epochs (both are set)"),
        ({"optimizer__min_lr": 1.0}, "optimizer.min_lr (1) is above optimizer.lr (0.001)"),
        ({"train__steps": 39}, "optimizer.decay_steps (20) is more than the 39 training steps"),
        ({"checkpoint__interval": 0}, "checkpoint.interval is 0"),
    ],
)
def test_contradictions(changes, message):
    with pytest.raises(ConfigError) as error:
        validate(build(**changes))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({TP: 2, PP: 2}, 6, "6 processes are no whole number of"),
        ({TP: 2, DP: 2}, 8, "needs 4 processes, not 8"),
        ({}, 3, "x 3 replicas; use a multiple of 12"),
        ({PP: 2, VPP: 2, "train__global_batch_size": 8}, 4, "number of micro-batches (1 here)"),
    ],
)
def test_contradictions_with_the_number_of_processes(changes, world_size, message):
    validate(build(**changes))
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        validate(build(**changes), world_size=world_size)


def test_contradiction_with_the_vocabulary():
    config = build(**{TP: 3}, model__num_attention_heads=6, model__hidden_size=252, model__ffn_hidden_size=702)
    validate(config, vocab_size=384)
    with pytest.raises(ConfigError, match="vocab_size_multiple"):
        validate(config, vocab_size=385)


def test_schedule_of_steps_that_data_decides():
    check_schedule(build(), 40)
    with pytest.raises(ConfigError, match="more than the 39"):
        check_schedule(build(), 39)
    check_schedule(build(optimizer__schedule="cosine"), 20)
    with pytest.raises(ConfigError, match=r"optimizer.warmup_steps \(20\) is more than the 19"):
        check_schedule(build(optimizer__schedule="cosine"), 19)


def test_derived_values():
    assert ModelConfig(hidden_size=96, num_attention_heads=4).resolved_head_dim == 24
    assert ModelConfig(head_dim=64).resolved_head_dim == 64
    assert ModelConfig(num_attention_heads=8).resolved_query_groups == 8
    assert ModelConfig(num_attention_heads=8, num_query_groups=2).resolved_query_groups == 2
    assert [ModelConfig().padded_vocab_size(size) for size in (1, 128, 129)] == [128, 128, 256]
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3)
    assert parallel.model_parallel_size == 6
    assert data_parallel_size(Config(parallel=parallel), 12) == 2
    assert data_parallel_size(Config(parallel=parallel), None) is None
    paired = Config()
    paired.diffusion.complementary = True
    assert (Config().rows_per_sequence, paired.rows_per_sequence) == (1, 2)
    paired.model.objective = "autoregressive"
    assert paired.rows_per_sequence == 1


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("model:\n  hidden_size: 3\n  hidden_size: 4\n")
    with pytest.raises(ConfigError, match="twice.yaml:3 .*'hidden_size' stands twice"):
        load_config(["--config", str(path)])


def test_lists_and_mappings_on_the_command_line() -> None:
    options = ["--evaluate.prompts", "[a, 'b: c', 1e3]", "--evaluate.prompts+", "[x]: y"]
    options += ["--model.transformer_config", "{add_qkv_bias: true}"]
    config = parse_config(options)
    assert config.evaluate.prompts == ["a", "b: c", "1e3", "[x]: y"]  # what is added is one text as it was typed
    assert config.model.transformer_config == {"add_qkv_bias": True}
