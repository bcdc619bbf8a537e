"""What the model is fed and scored on, in both arms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dlm_kernels import noise_levels
from dlm_kernels.philox import Purpose
from megatron_dlm.config.tree import AutoregressiveConfig, Config, DiffusionConfig
from megatron_dlm.diffusion.objective import Autoregressive, Batch, MaskedDiffusion, _capacity, build_objective
from megatron_dlm.diffusion.schedule import levels_and_weights
from megatron_dlm.errors import ConfigError
from megatron_dlm.shipped.sampler_plan import Vocabulary
from tests.enumeration import MASK_ID as TINY_MASK
from tests.enumeration import SEQ as TINY_SEQ
from tests.enumeration import TinyPredictor

EOD, MASK, SEQ = 100, 101, 32


def diffusion(sequence_length: int = SEQ, mask_token_id: int = MASK, **options: Any) -> MaskedDiffusion:
    return MaskedDiffusion(
        DiffusionConfig(**options),
        seed=5,
        vocabulary=Vocabulary(mask_token_id, EOD),
        sequence_length=sequence_length,
    )


def autoregressive(**options: Any) -> Autoregressive:
    config = AutoregressiveConfig(**options)
    return Autoregressive(config, seed=5, vocabulary=Vocabulary(MASK, EOD), sequence_length=SEQ)


def tokens_of(sample_ids: np.ndarray) -> Tensor:
    """Clean tokens [batch, 32] that belong to the sample ids."""
    return torch.from_numpy((sample_ids[:, None] * 31 + np.arange(SEQ) * 7) % 100)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"random_length_probability": 0.5},
        {"masking": "bernoulli"},
        {"schedule": "cosine", "random_length_probability": 0.5},
        {"schedule": "geometric", "masking": "bernoulli"},
        {"noise_levels": "iid"},
    ],
)
def test_any_split_of_the_global_batch_gives_the_same_masks(options: dict[str, Any]) -> None:
    objective = diffusion(**options)
    ids = 3 * 8 + np.arange(8)
    whole = objective.batch(tokens_of(ids), ids, step=3, global_batch_size=8)
    eligible = 0
    for part in ([0, 1, 2], [3], [4, 7, 5, 6]):
        batch = objective.batch(tokens_of(ids[part]), ids[part], step=3, global_batch_size=8)
        eligible += batch.num_eligible
        assert torch.equal(batch.inputs, whole.inputs[part])
        for row, source in enumerate(part):
            mine, theirs = batch.sample_index == row, whole.sample_index == source
            assert torch.equal(batch.targets[mine], whole.targets[theirs])
            assert torch.equal(batch.weights[mine], whole.weights[theirs])
    assert eligible == whole.num_eligible


@pytest.mark.parametrize("schedule", ["linear", "polynomial"])
@pytest.mark.parametrize("masking", ["exact_count", "bernoulli"])
def test_batch_is_what_the_schedule_says(schedule: Any, masking: Any) -> None:
    objective = diffusion(schedule=schedule, masking=masking, random_length_probability=0.0)
    ids = np.arange(6)
    clean = tokens_of(ids)
    batch = objective.batch(clean, ids, step=0, global_batch_size=6)
    u_levels = noise_levels.draw(ids, "stratified_antithetic", seed=5, step=0, global_batch_size=6)
    levels, weights = levels_and_weights(objective.config, u_levels, np.full(6, SEQ))
    masked = batch.inputs == MASK
    if masking == "exact_count":
        assert masked.sum(1).tolist() == levels.tolist()
    assert batch.rows is not None and batch.rows.dtype == torch.int64
    assert torch.equal(batch.rows, masked.view(-1).nonzero().view(-1))
    assert torch.equal(batch.sample_index, batch.rows // SEQ)
    assert torch.equal(batch.targets, clean[masked])
    assert batch.weights.dtype == torch.float32
    np.testing.assert_allclose(batch.weights.numpy(), weights[batch.sample_index.numpy()], rtol=1e-6)
    assert batch.num_eligible == 6 * SEQ and batch.lengths is None


def test_weights_of_every_sequence_sum_to_its_length() -> None:
    objective = diffusion(random_length_probability=0.7)
    ids = np.arange(20)
    batch = objective.batch(tokens_of(ids), ids, step=0, global_batch_size=20)
    assert batch.lengths is not None and batch.num_eligible == batch.lengths.sum()
    sums = torch.zeros(20).index_add_(0, batch.sample_index, batch.weights)
    torch.testing.assert_close(sums, batch.lengths.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "options", [{}, {"masking": "bernoulli"}, {"schedule": "cosine"}, {"noise_levels": "iid"}], ids=str
)
def test_expected_loss_is_the_negative_elbo(options: dict[str, Any]) -> None:
    """400 global batches of 8 of the same sequence, within 5 standard errors of the enumerated value."""
    predictor, steps, size = TinyPredictor(), 400, 8
    objective = diffusion(TINY_SEQ, TINY_MASK, random_length_probability=0.0, **{"eps": 1e-4, **options})
    losses = []
    for step in range(steps):
        ids = step * size + np.arange(size)
        batch = objective.batch(predictor.clean.expand(size, TINY_SEQ), ids, step=step, global_batch_size=size)
        assert batch.rows is not None
        entropy = predictor.cross_entropy(batch.inputs).view(-1)[batch.rows]
        losses.append(float((entropy * batch.weights).sum()) / size)
    error = np.std(losses) / np.sqrt(steps)
    assert abs(np.mean(losses) - predictor.negative_elbo()) < 5 * error
    assert error < 0.05 * predictor.negative_elbo()


def test_random_lengths_have_the_right_share_and_are_uniform() -> None:
    probability, ids = 0.25, np.arange(20_000)
    lengths = diffusion(random_length_probability=probability).lengths(ids)
    assert lengths is not None and lengths.dtype == torch.int64 and lengths.device.type == "cpu"
    counts = np.bincount(lengths.numpy(), minlength=SEQ + 1)
    assert counts[0] == 0 and len(counts) == SEQ + 1
    share = probability * (SEQ - 1) / SEQ  # a length of SEQ is not shorter
    sigma = np.sqrt(len(ids) * share * (1 - share))
    assert abs(counts[:-1].sum() - len(ids) * share) < 5 * sigma
    expected = len(ids) * probability / SEQ
    assert np.abs(counts[1:-1] - expected).max() < 5 * np.sqrt(expected)


def test_random_lengths_are_a_function_of_the_sample_id() -> None:
    objective = diffusion(random_length_probability=0.5)
    ids = np.arange(64)
    whole = objective.lengths(ids)
    assert whole is not None
    for start in range(0, 64, 8):
        part = objective.lengths(ids[start : start + 8])
        expected = whole[start : start + 8]
        assert torch.equal(torch.full((8,), SEQ) if part is None else part, expected)
    assert objective.lengths(ids, Purpose.VALIDATION) is None
    assert diffusion(random_length_probability=0.0).lengths(ids) is None
    full = ids[whole.numpy() == SEQ]
    assert objective.lengths(full) is None
    everywhere = diffusion(random_length_probability=1.0).lengths(ids)
    assert everywhere is not None and (everywhere < SEQ).sum() > 50


def test_positions_beyond_the_length_are_neither_masked_nor_visible() -> None:
    objective = diffusion(random_length_probability=1.0)
    ids = np.arange(16)
    batch = objective.batch(tokens_of(ids), ids, step=0, global_batch_size=16)
    lengths = objective.lengths(ids)
    assert lengths is not None and batch.lengths is not None and batch.rows is not None
    assert torch.equal(batch.lengths, lengths)
    beyond = torch.arange(SEQ) >= lengths[:, None]
    assert beyond.any() and (batch.inputs[beyond] == EOD).all()
    assert not beyond.view(-1)[batch.rows].any()
    assert batch.num_eligible == lengths.sum()


def test_validation_noise_is_fixed_and_its_own() -> None:
    objective = diffusion(random_length_probability=1.0)
    ids = np.arange(6)
    arguments: dict[str, Any] = {"global_batch_size": 6, "purpose": Purpose.VALIDATION}
    first = objective.batch(tokens_of(ids), ids, step=0, **arguments)
    later = objective.batch(tokens_of(ids), ids, step=900, **arguments)
    train = diffusion().batch(tokens_of(ids), ids, step=0, global_batch_size=6)
    assert torch.equal(first.inputs, later.inputs) and torch.equal(first.weights, later.weights)
    assert first.lengths is None and first.num_eligible == 6 * SEQ
    masked, train_masked = first.inputs == MASK, train.inputs == MASK
    nested = (masked <= train_masked).all(1) | (masked >= train_masked).all(1)
    assert not nested.all()  # with the same token keys, the smaller set would always be part of the larger one


def test_noise_is_fresh_every_step() -> None:
    objective = diffusion()
    patterns = set()
    for step in range(5):
        ids = step * 4 + np.arange(4)
        batch = objective.batch(tokens_of(np.arange(4)), ids, step=step, global_batch_size=4)
        patterns.add(tuple((batch.inputs == MASK).view(-1).tolist()))
    assert len(patterns) == 5


def test_autoregressive_inputs_are_shifted_and_everything_is_scored() -> None:
    ids = np.arange(3)
    clean = tokens_of(ids)
    batch = autoregressive().batch(clean, ids, step=0, global_batch_size=3)
    assert (batch.inputs[:, 0] == EOD).all() and torch.equal(batch.inputs[:, 1:], clean[:, :-1])
    assert batch.rows is None and batch.lengths is None and batch.num_eligible == 3 * SEQ
    assert torch.equal(batch.targets, clean.reshape(-1))
    assert batch.weights.dtype == torch.float32 and torch.equal(batch.weights, torch.ones(3 * SEQ))
    assert torch.equal(batch.sample_index, torch.arange(3).repeat_interleave(SEQ))
    assert autoregressive().lengths(ids) is None


def test_input_masking_has_the_right_share_and_leaves_the_targets() -> None:
    ids = np.arange(500)
    clean = tokens_of(ids)
    objective = autoregressive(input_mask_ratio=0.3)
    batch = objective.batch(clean, ids, step=0, global_batch_size=500)
    masked = batch.inputs == MASK
    assert abs(int(masked.sum()) - 0.3 * 500 * SEQ) < 5 * np.sqrt(0.21 * 500 * SEQ)
    shifted = autoregressive().batch(clean, ids, step=0, global_batch_size=500)
    assert torch.equal(batch.inputs[~masked], shifted.inputs[~masked])
    assert torch.equal(batch.targets, shifted.targets) and torch.equal(batch.weights, shifted.weights)
    part = objective.batch(clean[7:9], ids[7:9], step=0, global_batch_size=500)
    assert torch.equal(part.inputs, batch.inputs[7:9])
    validation = objective.batch(clean, ids, step=0, global_batch_size=500, purpose=Purpose.VALIDATION)
    assert torch.equal(validation.inputs, shifted.inputs)
    everything = autoregressive(input_mask_ratio=1.0).batch(clean, ids, step=0, global_batch_size=500)
    assert (everything.inputs == MASK).all()


def test_capacity_holds_the_masked_rows() -> None:
    """Exact counts: their sum, rounded up to 128. Bernoulli: hardly ever too few, not more than there are."""
    counts = np.full(4, 1000)
    assert _capacity(np.array([1, 2, 3, 122]), counts, exact=True) == 128
    assert _capacity(np.array([1, 2, 3, 123]), counts, exact=True) == 256
    generator = np.random.default_rng(0)
    for p in (1e-3, 0.1, 0.5, 0.999, 1.0):
        capacity = _capacity(np.full(4, round(p * 2**32)), counts, exact=False)
        drawn = generator.binomial(4000, p, 100_000)
        assert capacity % 128 == 0 and drawn.max() <= capacity <= 4000 + 127
        assert capacity < 4000 * p + 9 * np.sqrt(4000 * p * (1 - p)) + 30 + 128


def test_build_objective_follows_the_config() -> None:
    config = Config()
    config.run.seed, config.data.sequence_length = 5, SEQ
    built = build_objective(config, Vocabulary(MASK, EOD))
    assert isinstance(built, MaskedDiffusion)
    ids = np.arange(4)
    expected = diffusion().batch(tokens_of(ids), ids, step=0, global_batch_size=4)
    _require_equal(built.batch(tokens_of(ids), ids, step=0, global_batch_size=4), expected)
    config.model.objective, config.autoregressive.input_mask_ratio = "autoregressive", 0.5
    built = build_objective(config, Vocabulary(MASK, EOD))
    assert isinstance(built, Autoregressive)
    expected = autoregressive(input_mask_ratio=0.5).batch(tokens_of(ids), ids, step=0, global_batch_size=4)
    _require_equal(built.batch(tokens_of(ids), ids, step=0, global_batch_size=4), expected)


def test_eps_out_of_range_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="diffusion.eps is 0.3"):
        diffusion(eps=0.3)


def _require_equal(batch: Batch, expected: Batch) -> None:
    assert torch.equal(batch.inputs, expected.inputs)
    assert torch.equal(batch.targets, expected.targets)
    assert torch.equal(batch.weights, expected.weights)
