"""A sequence and its complement mask as two rows of one sample."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from dlm_kernels.noise_levels import draw, draw_pairs, linear_pair_count
from dlm_kernels.philox import MASK32, Purpose
from dlm_kernels.types import NoiseMode
from megatron_dlm.config.tree import Config, DiffusionConfig
from megatron_dlm.diffusion.objective import Batch, MaskedDiffusion
from megatron_dlm.errors import ConfigError
from megatron_dlm.shipped.sampler_plan import Vocabulary
from megatron_dlm.training.batches import BatchStream
from megatron_dlm.training.progress import Progress
from megatron_dlm.training.setup import total_steps
from tests.enumeration import MASK_ID as TINY_MASK
from tests.enumeration import SEQ as TINY_SEQ
from tests.enumeration import TinyPredictor

MODES = get_args(NoiseMode)
SCHEDULES = ["linear", "cosine", "cosine_mdlm", "polynomial", "geometric"]
EOD, MASK, SEQ = 100, 101, 32


def objective(sequence_length: int = SEQ, mask: int = MASK, **options: Any) -> MaskedDiffusion:
    settings = DiffusionConfig(**{"complementary": True, "random_length_probability": 0.3, **options})
    return MaskedDiffusion(settings, seed=5, vocabulary=Vocabulary(mask, EOD), sequence_length=sequence_length)


def rows_of_step(step: int, size: int, rows: list[int] | None = None, **options: Any) -> Batch:
    ids = step * size + np.arange(size)
    ids = ids if rows is None else ids[rows]
    tokens = torch.from_numpy(((ids >> 1)[:, None] * 31 + np.arange(SEQ) * 7) % 100)
    return objective(**options).batch(tokens, ids, step=step, global_batch_size=size)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_pair_mask_every_eligible_token_once(schedule: str, mode: NoiseMode) -> None:
    for step in range(4):
        batch = rows_of_step(step, 8, schedule=schedule, noise_levels=mode)
        assert batch.lengths is not None
        masked, eligible = batch.inputs == MASK, torch.arange(SEQ) < batch.lengths[:, None]
        assert torch.equal(batch.lengths[::2], batch.lengths[1::2])
        assert torch.equal(masked[::2] ^ masked[1::2], eligible[::2])
        assert batch.num_eligible == int(eligible.sum()) == 2 * batch.targets.numel(), "both rows count"


def test_weights_are_those_of_the_definition() -> None:
    batch, ids = rows_of_step(2, 8, random_length_probability=0.0), 16 + np.arange(8)
    u = (draw(ids, "stratified_antithetic", seed=5, step=2, global_batch_size=8)[::2] + 0.5) / 2**32
    k = np.floor(u * (SEQ + 1)).astype(int)
    masked = np.stack([k, SEQ - k], axis=1).reshape(-1)
    assert (batch.inputs == MASK).sum(1).tolist() == masked.tolist()
    expected = ((SEQ + 1) / np.maximum(masked, 1))[batch.sample_index.numpy()]
    np.testing.assert_allclose(batch.weights.numpy(), expected, rtol=1e-6)


def test_a_row_with_nothing_masked_contributes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for level, empty in ((0, 0), (MASK32, 1)):
        monkeypatch.setattr(
            "dlm_kernels.noise_levels.draw", lambda ids, *_, level=level, **__: np.full(len(ids), level)
        )
        for schedule in SCHEDULES:
            if schedule == "cosine_mdlm" and empty:
                continue  # its mask probability ends at 1 - eps
            batch = rows_of_step(0, 2, schedule=schedule, random_length_probability=0.0)
            assert (batch.inputs == MASK).sum(1).tolist() == ([0, SEQ] if empty == 0 else [SEQ, 0])
            assert batch.weights.isfinite().all() and batch.sample_index.unique().tolist() == [1 - empty]


@pytest.mark.parametrize("options", [{}, {"schedule": "cosine"}, {"noise_levels": "stratified"}, {"weighting": "none"}])
def test_any_split_of_the_global_batch_gives_the_same_masks(options: dict[str, Any]) -> None:
    whole = rows_of_step(3, 8, **options)
    for part in ([0], [1], [5, 2], [7, 6, 4]):
        batch = rows_of_step(3, 8, part, **options)
        assert torch.equal(batch.inputs, whole.inputs[part])
        for row, source in enumerate(part):
            mine, theirs = batch.sample_index == row, whole.sample_index == source
            assert torch.equal(batch.targets[mine], whole.targets[theirs])
            assert torch.equal(batch.weights[mine], whole.weights[theirs])


@pytest.mark.parametrize("options", [{}, {"schedule": "cosine"}, {"noise_levels": "iid"}], ids=str)
def test_expected_loss_is_the_negative_elbo(options: dict[str, Any]) -> None:
    """400 global batches of 8 rows of the same sequence, within 5 standard errors of the enumerated value."""
    predictor, steps, size = TinyPredictor(), 400, 8
    noising = objective(TINY_SEQ, TINY_MASK, random_length_probability=0.0, **options)
    losses = []
    for step in range(steps):
        ids = step * size + np.arange(size)
        batch = noising.batch(predictor.clean.expand(size, TINY_SEQ), ids, step=step, global_batch_size=size)
        entropy = predictor.cross_entropy(batch.inputs).view(-1)[batch.rows]
        losses.append(float((entropy * batch.weights).sum()) / size)
    error = np.std(losses) / np.sqrt(steps)
    assert abs(np.mean(losses) - predictor.negative_elbo()) < 5 * error
    assert error < 0.05 * predictor.negative_elbo()


@pytest.mark.parametrize("mode", MODES)
def test_counts_of_both_rows_are_uniform_from_none_to_all(mode: NoiseMode) -> None:
    eligible, steps, size = 7, 900, 6
    counts = np.stack(
        [
            linear_pair_count(
                draw_pairs(np.arange(size) + s * size, mode, seed=3, step=s, global_batch_size=size),
                np.full(size, eligible),
            )
            for s in range(steps)
        ]
    )
    np.testing.assert_array_equal(counts[:, ::2], counts[:, 1::2])
    for row in range(0, size, 2):
        observed = np.bincount(counts[:, row], minlength=eligible + 1)
        expected = steps / (eligible + 1)
        assert ((observed - expected) ** 2 / expected).sum() < eligible + 5 * np.sqrt(2 * eligible)


def test_levels_of_pairs_are_those_of_even_rows_or_of_half_a_batch() -> None:
    ids, arguments = 12 + np.arange(6), {"seed": 3, "step": 2}
    for mode in ("stratified_antithetic", "antithetic"):
        pairs = draw_pairs(ids, mode, global_batch_size=6, **arguments)
        np.testing.assert_array_equal(pairs, draw(ids, mode, global_batch_size=6, **arguments)[[0, 0, 2, 2, 4, 4]])
    for mode in ("stratified", "iid"):
        pairs = draw_pairs(ids, mode, global_batch_size=6, **arguments)
        half = draw(6 + np.arange(3), mode, global_batch_size=3, **arguments)
        np.testing.assert_array_equal(pairs, half.repeat(2))
        assert [draw_pairs(int(i), mode, global_batch_size=6, **arguments) for i in ids] == pairs.tolist()
        torch_pairs = draw_pairs(torch.from_numpy(ids), mode, global_batch_size=6, **arguments)
        np.testing.assert_array_equal(torch_pairs.numpy(), pairs)


def test_counts_are_floor_of_u_times_length_plus_one() -> None:
    edge = np.array([0, 1, 2**31 - 1, 2**31, MASK32 - 1, MASK32])
    for eligible in (0, 1, 2, 3, 1000, 2**22 - 1):
        exact = [(2 * u + 1) * (eligible + 1) // 2**33 for u in edge.tolist()]
        assert linear_pair_count(edge, np.full(6, eligible)).tolist() == exact
        assert min(exact) == 0 and max(exact) == eligible


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="complementary: true needs diffusion.masking exact_count"):
        objective(masking="bernoulli")
    with pytest.raises(ValueError, match="need an even global batch, not 5 rows"):
        rows_of_step(0, 5)


def test_number_of_rows_is_known_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator the list of masked rows has a length that nothing is read back for."""
    monkeypatch.setattr("megatron_dlm.diffusion.objective._ROW_MULTIPLE", 1)
    device, noising = torch.device("meta"), objective(random_length_probability=0.0)
    for rows, expected in ((np.arange(8), 4 * SEQ), (np.arange(7), None), (np.array([3]), None)):
        masked = int((rows_of_step(0, 8, rows.tolist(), random_length_probability=0.0).inputs == MASK).sum())
        assert expected in (None, masked)
        counts = np.full(len(rows), SEQ)
        arguments = noising._noise(rows, counts, 0, 8, Purpose.TRAIN, device)
        assert arguments["capacity"] == masked
        assert arguments["complement"].shape == arguments["levels"].shape == (len(rows),)


class Sequences:
    """A data set whose sequence i holds the number i."""

    sequence_length, samples_per_epoch = SEQ, 10

    def sequences(self, sample_ids: np.ndarray) -> np.ndarray:
        return np.repeat(sample_ids[:, None] % 100, SEQ, axis=1)


def test_data_is_read_and_counted_by_the_sequence() -> None:
    config = Config()
    config.diffusion.complementary, config.data.sequence_length = True, SEQ
    config.train.global_batch_size, config.train.micro_batch_size = 6, 3
    topology = SimpleNamespace(data_size=1, data_rank=0, device=torch.device("cpu"), pipeline_size=1)
    stream = BatchStream(config, Sequences(), objective(random_length_probability=0.0), topology)  # type: ignore
    micro_batches = list(stream.training(Progress(2, 12), reads_tokens=True))
    assert np.concatenate([m.sample_ids for m in micro_batches]).tolist() == list(range(12, 18))
    inputs = torch.cat([m.inputs for m in micro_batches])
    sequence = torch.tensor([6, 6, 7, 7, 8, 8])[:, None].expand(6, SEQ)
    assert torch.equal(inputs, torch.where(inputs == MASK, MASK, sequence))
    held_out = torch.cat([m.inputs for m in stream.validation(3, reads_tokens=True)])
    assert torch.equal(held_out, torch.where(held_out == MASK, MASK, torch.arange(3)[:, None].expand(3, SEQ)))
    config.train.steps, config.train.epochs = None, 3.0
    assert total_steps(config, Sequences()) == 10  # type: ignore[arg-type]  # 30 sequences of two rows each
    config.diffusion.complementary = False
    assert total_steps(config, Sequences()) == 5  # type: ignore[arg-type]
