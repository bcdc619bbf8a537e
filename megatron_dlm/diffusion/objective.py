"""From clean tokens to what the model is fed and scored on: masked diffusion, and the autoregressive baseline.

Both score the same tokens of the same sequences. Everything random is a function of (seed, sample id) or of (seed,
step, position in the global batch), so a global batch may be split over micro-batches and ranks in any way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlm_kernels import noise_levels
from dlm_kernels.implementation import Implementation, mask_tokens
from dlm_kernels.philox import Purpose, Stream, random_bits, random_words, token_counter
from dlm_kernels.types import NoiseDraw
from megatron_dlm.config.check import check_diffusion
from megatron_dlm.config.kinds import AUTOREGRESSIVE
from megatron_dlm.config.tree import AutoregressiveConfig, Config, DiffusionConfig
from megatron_dlm.diffusion.schedule import levels_and_weights, pair_levels_and_weights
from megatron_dlm.diffusion.weighting import cart_weights
from megatron_dlm.shipped.sampler_plan import Vocabulary

# A GEMM likes it, and the lists of successive micro-batches then mostly have the same length.
_ROW_MULTIPLE = 128


@dataclass(frozen=True)
class Batch:
    """What the model is fed and scored on.

    Attributes:
        inputs: [batch, seq] int64.
        rows: [n] int64, ascending flat indices into [batch * seq] of the scored positions, batch * seq in padding; None
            = every position in order.
        targets: [n] int64, 0 in padding.
        weights: [n] float32, loss weights, 0 in padding.
        sample_index: [n] int64, which sequence of the batch a target belongs to.
        num_eligible: tokens that could be scored.
        divisor: [] int64, what the sum of the weighted losses is to be divided by, once, after both have been summed
            over all micro-batches and data-parallel ranks.
        lengths: [batch] int64 on the CPU, real tokens of each sequence; None = all are full.
    """

    inputs: Tensor
    rows: Tensor | None
    targets: Tensor
    weights: Tensor
    sample_index: Tensor
    num_eligible: int
    divisor: Tensor
    lengths: Tensor | None

    def is_scored(self) -> Tensor:
        """[n] bool: which rows are no padding. A scored token may still have the weight 0."""
        if self.rows is None:
            return torch.ones_like(self.targets, dtype=torch.bool)
        return self.rows < self.inputs.numel()


class MaskedDiffusion:
    """Masked (absorbing) diffusion. With the default weighting the expected loss is the negative ELBO.

    With `complementary`, sample ids 2j and 2j + 1 are two rows of sequence j: the second masks the eligible tokens
    that the first leaves visible. Validation has neither complements nor another weighting than the ELBO's: its figure
    is a NELBO, however the model was trained.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        *,
        seed: int,
        vocabulary: Vocabulary,
        sequence_length: int,
        implementation: Implementation = "auto",
    ) -> None:
        """
        Args:
            config: the `diffusion` section.
            seed: of the run, 64 bits.
            vocabulary: whose end-of-document fills up what is shorter than a sequence.
            sequence_length: tokens, below 2**22.
            implementation: of the masking; both mask the same tokens.

        Raises:
            ConfigError: a contradiction within the section.
            ValueError: the vocabulary has no end-of-document.
        """
        check_diffusion(config)
        self.config = config
        self.seed = seed
        self.mask_token_id = vocabulary.mask_token_id
        self.end_of_document_id = _end_of_document_id(vocabulary)
        self.sequence_length = sequence_length
        self.implementation = implementation

    def lengths(self, sample_ids: np.ndarray, purpose: Purpose = Purpose.TRAIN) -> Tensor | None:
        """Real tokens of each sequence: with a small probability uniform on 1..sequence_length, else all of them.

        Args:
            sample_ids: [batch] int64; the two rows of a complementary pair have the same length.
            purpose: validation never shortens.

        Returns:
            [batch] int64 on the CPU, or None if all sequences are full.
        """
        threshold = round(self.config.random_length_probability * 2**32)
        if threshold == 0 or purpose is Purpose.VALIDATION:
            return None
        sequences = self._sequences(sample_ids, purpose)
        # One counter gives four words: whether a row is shortened, and to which length.
        choice, size, _, _ = random_words(self.seed, Stream.RANDOM_LENGTH, sequences, 0, purpose)
        # Scaled by a product and a shift, in integers: the same on numpy, torch and a GPU.
        shortened = ((size * self.sequence_length) >> 32) + 1
        lengths = np.where(choice < threshold, shortened, self.sequence_length)
        return None if (lengths == self.sequence_length).all() else torch.from_numpy(lengths)

    def batch(
        self,
        tokens: Tensor,
        sample_ids: np.ndarray,
        *,
        step: int,
        global_batch_size: int,
        purpose: Purpose = Purpose.TRAIN,
    ) -> Batch:
        """Noised sequences and their scored positions. Positions beyond a sequence's length hold end-of-document.

        Args:
            tokens: [batch, seq] int64, clean; equal for the rows of a complementary pair.
            sample_ids: [batch] int64, any subset of the global batch; for validation, indices in the set.
            step: training step; ignored for validation, whose noise is fixed.
            global_batch_size: rows of the global batch, or sequences in the validation set.
            purpose: training or validation.

        Raises:
            ValueError: a sample id is not in the global batch of `step`, or `complementary` and an odd global batch.
        """
        batch, seq = tokens.shape
        device = tokens.device
        lengths = self.lengths(sample_ids, purpose)
        # Every sequence counts its own tokens; what fills it up is neither masked nor scored.
        counts = np.full(batch, seq) if lengths is None else lengths.numpy()
        eligible = None
        if lengths is not None:
            eligible = torch.arange(seq, device=device) < lengths.to(device, non_blocking=True)[:, None]
            tokens = torch.where(eligible, tokens, self.end_of_document_id)

        # The figure of a validation set must not depend on when it is computed: its noise is the same at every step.
        noise_step = 0 if purpose is Purpose.VALIDATION else step
        masked = mask_tokens(
            tokens,
            self._sequences(sample_ids, purpose),
            seed=self.seed,
            mask_token_id=self.mask_token_id,
            masking=self.config.masking,
            eligible=eligible,
            purpose=purpose,
            impl=self.implementation,
            **self._noise(sample_ids, counts, noise_step, global_batch_size, purpose, device),
        )
        # The list of masked positions is [n]: that of the whole micro-batch, row after row, and maybe some padding.
        rows = masked.rows.long()
        num_eligible = int(counts.sum())
        # Only the weighting of training may be another; the masks and the ELBO's weights are drawn in any case.
        weighting = self.config.weighting if purpose is Purpose.TRAIN else "elbo"
        # The NELBO is per token that could be masked, not per token that was: the weights L/k make up for it.
        weights, divisor = masked.weights, torch.full((), num_eligible, device=device)
        if weighting == "none":
            scored = rows < batch * seq
            # The plain mean over the masked tokens. Their number is on the device, and stays there.
            weights, divisor = scored.float(), scored.sum()
        elif weighting == "cart":
            weights = _cart(rows, batch, seq, eligible)
        return Batch(
            inputs=masked.tokens,
            rows=rows,
            targets=masked.targets,
            weights=weights,
            sample_index=(rows // seq).clamp(max=batch - 1),
            num_eligible=num_eligible,
            divisor=divisor,
            lengths=lengths,
        )

    def _complementary(self, purpose: Purpose) -> bool:
        return self.config.complementary and purpose is Purpose.TRAIN

    def _sequences(self, sample_ids: np.ndarray, purpose: Purpose) -> np.ndarray:
        """What names the token keys and the length of each row, [batch] int64."""
        return sample_ids >> 1 if self._complementary(purpose) else sample_ids

    def _noise(
        self,
        sample_ids: np.ndarray,
        counts: np.ndarray,
        step: int,
        global_batch_size: int,
        purpose: Purpose,
        device: torch.device,
    ) -> dict[str, Any]:
        """The arguments of `mask_tokens` that say how much is masked, with the weights of the ELBO.

        A linear schedule without complements is left to `mask_tokens`, which draws the same integers where the tokens
        are; the host then draws them for the number of rows only. The rest is evaluated here, in fp64.

        Args:
            sample_ids: [batch] int64.
            counts: [batch] int64, eligible tokens.
        """
        config, paired = self.config, self._complementary(purpose)
        noise = NoiseDraw(config.noise_levels, step, global_batch_size, config.eps)
        drawn_there = config.schedule == "linear" and not paired
        # There the list may be read back at no cost, so that no capacity has to be known.
        if drawn_there and device.type == "cpu":
            return {"draw": noise}
        draw = noise_levels.draw_pairs if paired else noise_levels.draw
        u_levels = draw(
            sample_ids,
            noise.mode,
            seed=self.seed,
            step=step,
            global_batch_size=global_batch_size,
            purpose=purpose,
        )
        # The second of a pair masks what the first leaves visible, so both come from one level and one set of keys.
        complement = sample_ids % 2 == 1
        if paired:
            levels, weights = pair_levels_and_weights(config, u_levels, counts, complement)
        else:
            levels, weights = levels_and_weights(config, u_levels, counts)
        arguments: dict[str, Any] = {}
        if device.type != "cpu":
            masked = np.where(complement, counts - levels, levels) if paired else levels
            # On a GPU reading a length back would wait for it, so the host says how many rows there can be.
            arguments["capacity"] = _capacity(masked, counts, config.masking == "exact_count")
        if drawn_there:
            return {**arguments, "draw": noise}
        if paired:
            arguments["complement"] = torch.from_numpy(complement).to(device, non_blocking=True)
        arguments["levels"] = torch.from_numpy(levels).to(device, non_blocking=True)
        arguments["weights"] = torch.from_numpy(weights).to(device, torch.float32, non_blocking=True)
        return arguments


class Autoregressive:
    """Next-token prediction of the same tokens: the input is shifted right and begins with end-of-document."""

    def __init__(
        self,
        config: AutoregressiveConfig,
        *,
        seed: int,
        vocabulary: Vocabulary,
        sequence_length: int,
    ) -> None:
        """
        Args:
            config: the `autoregressive` section.
            seed, sequence_length: as for `MaskedDiffusion`.
            vocabulary: whose end-of-document comes before every sequence.

        Raises:
            ValueError: the vocabulary has no end-of-document.
        """
        self.config = config
        self.seed = seed
        self.mask_token_id = vocabulary.mask_token_id
        self.end_of_document_id = _end_of_document_id(vocabulary)
        self.sequence_length = sequence_length

    def lengths(self, sample_ids: np.ndarray, purpose: Purpose = Purpose.TRAIN) -> Tensor | None:
        """None: sequences are never shortened."""
        return None

    def batch(
        self,
        tokens: Tensor,
        sample_ids: np.ndarray,
        *,
        step: int,
        global_batch_size: int,
        purpose: Purpose = Purpose.TRAIN,
    ) -> Batch:
        """Shifted inputs; in training a share `input_mask_ratio` of them, never of the targets, is [MASK].

        Args:
            tokens: [batch, seq] int64.
            sample_ids: [batch] int64.
            step, global_batch_size: not used; the interface is that of `MaskedDiffusion`.
            purpose: training or validation.
        """
        batch, seq = tokens.shape
        device = tokens.device
        # Position i reads the tokens before it and predicts token i, so that targets keep their places.
        inputs = torch.cat((tokens.new_full((batch, 1), self.end_of_document_id), tokens[:, :-1]), dim=1)
        threshold = round(self.config.input_mask_ratio * 2**32)
        if threshold and purpose is Purpose.TRAIN:
            counters = token_counter(sample_ids[:, None], np.arange(seq))
            if device.type == "cpu":
                # The same bits; numpy is faster on small arrays.
                bits = torch.from_numpy(random_bits(self.seed, Stream.INPUT_MASK, counters))
            else:
                bits = random_bits(self.seed, Stream.INPUT_MASK, torch.from_numpy(counters).to(device))
            inputs = inputs.masked_fill(bits < threshold, self.mask_token_id)
        return Batch(
            inputs=inputs,
            rows=None,
            targets=tokens.reshape(-1),
            weights=torch.ones(batch * seq, device=device),
            sample_index=torch.arange(batch * seq, device=device) // seq,
            num_eligible=batch * seq,
            divisor=torch.full((), batch * seq, device=device),
            lengths=None,
        )


def build_objective(config: Config, vocabulary: Vocabulary) -> MaskedDiffusion | Autoregressive:
    """The objective of `model.objective`.

    Raises:
        ConfigError: as `MaskedDiffusion`.
    """
    common: dict[str, Any] = {
        "seed": config.run.seed,
        "vocabulary": vocabulary,
        "sequence_length": config.data.sequence_length,
    }
    if config.model.kind is AUTOREGRESSIVE:
        return Autoregressive(config.autoregressive, **common)
    return MaskedDiffusion(config.diffusion, **common, implementation=config.kernels.implementation)


def _end_of_document_id(vocabulary: Vocabulary) -> int:
    if vocabulary.end_of_document_id is None:
        raise ValueError("training needs an end-of-document; give a vocabulary that has one")
    return vocabulary.end_of_document_id


def _cart(rows: Tensor, batch: int, seq: int, eligible: Tensor | None) -> Tensor:
    """CART weights [n] float32 of the masked tokens `rows`, 0 in padding; masked and not eligible tokens are unseen."""
    total = batch * seq
    # One element more than there are tokens: padding rows point there, and it is cut off.
    visible = torch.ones(total + 1, dtype=torch.bool, device=rows.device).index_fill_(0, rows, False)[:total]
    visible = visible.view(batch, seq)
    weights = cart_weights(visible if eligible is None else visible & eligible).float().view(-1)
    return torch.where(rows < total, weights[rows.clamp(max=total - 1)], 0.0)


def _capacity(levels: np.ndarray, counts: np.ndarray, exact: bool) -> int:
    """Rows that hold all masked tokens: known for exact counts, else exceeded with a probability below 1e-15."""
    if exact:
        needed = int(levels.sum())
    else:
        p = levels * 2.0**-32
        variance = float((counts * p * (1 - p)).sum())
        # Bernstein: P(sum - mean >= x) <= exp(-x**2 / (2 variance + 2 x / 3)).
        limit = -math.log(1e-15)
        excess = limit / 3 + math.sqrt((limit / 3) ** 2 + 2 * limit * variance)
        needed = min(math.ceil(float((counts * p).sum()) + excess), int(counts.sum()))
    return -(-needed // _ROW_MULTIPLE) * _ROW_MULTIPLE
