"""Sums by mask ratio against a loop over tokens."""

from __future__ import annotations

import numpy as np
import torch

from megatron_dlm.diffusion.objective import Batch
from megatron_dlm.model.pipeline import MicroBatch
from megatron_dlm.model.transformer import TokenLosses
from megatron_dlm.training.mask_ratio import means_by_mask_ratio, sums_by_mask_ratio
from megatron_dlm.training.step import _training_output
from megatron_dlm.training.sums import Sums


def test_sums_are_those_of_a_loop_and_padding_counts_for_nothing() -> None:
    torch.manual_seed(0)
    size, seq = 4, 20
    masked = torch.rand(size, seq) < torch.tensor([[0.05], [0.5], [0.93], [0.5]])
    masked[0, 3] = True  # at least one, so that the lowest bucket has a token
    lengths = torch.tensor([20, 20, 20, 11])
    masked[3, 11:] = False
    masked[2] = True
    rows = masked.flatten().nonzero().view(-1)
    padding = 7
    rows = torch.cat([rows, torch.full((padding,), size * seq)])
    weights = torch.cat([torch.rand(len(rows) - padding) + 0.1, torch.zeros(padding)])
    weights[:9:4] = 0.0  # scored, but their loss is not computed
    entropy, correct = torch.rand(len(rows)), torch.rand(len(rows)) < 0.5
    batch = Batch(
        inputs=torch.zeros(size, seq, dtype=torch.long),
        rows=rows,
        targets=torch.zeros_like(rows),
        weights=weights,
        sample_index=(rows // seq).clamp(max=size - 1),
        num_eligible=71,
        divisor=torch.tensor(40),
        lengths=lengths,
    )
    expected = [[0.0] * 10 for _ in range(3)]
    for i, row in enumerate(rows.tolist()[:-padding]):
        sample = row // seq
        ratio = int(masked[sample].sum()) / int(lengths[sample])
        bucket = min(int(ratio * 10), 9)
        for sums, value in zip(expected, (1.0, float(entropy[i]), float(correct[i])), strict=True):
            sums[bucket] += value * bool(weights[i])
    losses = TokenLosses(torch.tensor(6.5), entropy, correct)
    got = sums_by_mask_ratio(batch, losses)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    micro_batch = MicroBatch(np.arange(size), batch.inputs, lengths, batch)
    loss_sum, divisor, report = _training_output(micro_batch, losses)
    assert loss_sum is losses.loss_sum and divisor.dtype == torch.int32 and int(divisor) == 40
    assert [float(report.loss), float(report.divisor)] == [6.5, 40]
    assert [float(report.eligible_tokens), float(report.scored_tokens)] == [71, len(rows) - padding]
    assert torch.equal(report.by_mask_ratio, got)
    twice = Sums.unpack(Sums.total([report, report], "cpu").pack())
    assert float(twice.loss) == 13 and torch.equal(twice.by_mask_ratio, 2 * got) and not float(twice.stop_requests)
    means = means_by_mask_ratio(got.tolist())
    assert means["loss_by_mask_ratio"].count(None) == sum(n == 0 for n in expected[0]) > 0
    assert 0 < means["accuracy_by_mask_ratio"][9] < 1
