"""From clean tokens to what the model is fed and scored on: masked diffusion, and the autoregressive baseline.

Both score the same tokens of the same sequences. Everything random is a function of (seed, sample id) or of (seed,
step, position in the global batch), so a global batch may be split over micro-batches and ranks in any way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dlm_kernels import noise_levels
from dlm_kernels.philox import Purpose, Stream, random_bits, random_words, token_counter
from dlm_kernels.reference import mask_tokens
from dlm_kernels.types import NoiseDraw
from megatron_dlm.config import AutoregressiveConfig, Config, ConfigError, DiffusionConfig
from megatron_dlm.diffusion.schedule import levels_and_weights

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
        num_eligible: tokens that the sum of the weighted losses is to be divided by.
        lengths: [batch] int64 on the CPU, real tokens of each sequence; None = all are full.
    """

    inputs: Tensor
    rows: Tensor | None
    targets: Tensor
    weights: Tensor
    sample_index: Tensor
    num_eligible: int
    lengths: Tensor | None


class MaskedDiffusion:
    """Masked (absorbing) diffusion, weighted so that the expected loss is the negative ELBO."""

    def __init__(
        self,
        config: DiffusionConfig,
        *,
        seed: int,
        mask_token_id: int,
        end_of_document_id: int,
        sequence_length: int,
    ) -> None:
        """
        Args:
            config: the `diffusion` section.
            seed: of the run, 64 bits.
            mask_token_id, end_of_document_id: control symbols of the vocabulary.
            sequence_length: tokens, below 2**22.

        Raises:
            ConfigError: eps is out of range.
        """
        if not 0 <= config.eps < 0.25:
            raise ConfigError(f"diffusion.eps is {config.eps}: choose a value in [0, 0.25)")
        self.config = config
        self.seed = seed
        self.mask_token_id = mask_token_id
        self.end_of_document_id = end_of_document_id
        self.sequence_length = sequence_length

    def lengths(self, sample_ids: np.ndarray, purpose: Purpose = Purpose.TRAIN) -> Tensor | None:
        """Real tokens of each sequence: with a small probability uniform on 1..sequence_length, else all of them.

        Args:
            sample_ids: [batch] int64.
            purpose: validation never shortens.

        Returns:
            [batch] int64 on the CPU, or None if all sequences are full.
        """
        threshold = round(self.config.random_length_probability * 2**32)
        if threshold == 0 or purpose is Purpose.VALIDATION:
            return None
        choice, size, _, _ = random_words(self.seed, Stream.RANDOM_LENGTH, sample_ids, 0, purpose)
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
            tokens: [batch, seq] int64, clean.
            sample_ids: [batch] int64, any subset of the global batch; for validation, indices in the set.
            step: training step; ignored for validation, whose noise is fixed.
            global_batch_size: sequences in the global batch, or in the validation set.
            purpose: training or validation.

        Raises:
            ValueError: a sample id is not in the global batch of `step`.
        """
        batch, seq = tokens.shape
        device = tokens.device
        lengths = self.lengths(sample_ids, purpose)
        counts = np.full(batch, seq) if lengths is None else lengths.numpy()
        eligible = None
        if lengths is not None:
            eligible = torch.arange(seq, device=device) < lengths.to(device, non_blocking=True)[:, None]
            tokens = torch.where(eligible, tokens, self.end_of_document_id)

        config = self.config
        noise = NoiseDraw(
            config.noise_levels, 0 if purpose is Purpose.VALIDATION else step, global_batch_size, config.eps
        )
        draw: NoiseDraw | None = noise
        levels = weights = capacity = None
        if config.schedule != "linear" or device.type != "cpu":
            u_levels = noise_levels.draw(
                sample_ids,
                noise.mode,
                seed=self.seed,
                step=noise.step,
                global_batch_size=global_batch_size,
                purpose=purpose,
            )
            host_levels, host_weights = levels_and_weights(config, u_levels, counts)
            if device.type != "cpu":
                capacity = _capacity(host_levels, counts, config.masking == "exact_count")
            if config.schedule != "linear":
                draw = None
                levels = torch.from_numpy(host_levels).to(device, non_blocking=True)
                weights = torch.from_numpy(host_weights).to(device, torch.float32, non_blocking=True)
        masked = mask_tokens(
            tokens,
            sample_ids,
            seed=self.seed,
            mask_token_id=self.mask_token_id,
            masking=config.masking,
            draw=draw,
            levels=levels,
            weights=weights,
            eligible=eligible,
            capacity=capacity,
            purpose=purpose,
        )
        rows = masked.rows.long()
        return Batch(
            inputs=masked.tokens,
            rows=rows,
            targets=masked.targets,
            weights=masked.weights,
            sample_index=(rows // seq).clamp(max=batch - 1),
            num_eligible=int(counts.sum()),
            lengths=lengths,
        )


class Autoregressive:
    """Next-token prediction of the same tokens: the input is shifted right and begins with end-of-document."""

    def __init__(
        self,
        config: AutoregressiveConfig,
        *,
        seed: int,
        mask_token_id: int,
        end_of_document_id: int,
        sequence_length: int,
    ) -> None:
        """
        Args:
            config: the `autoregressive` section.
            seed, mask_token_id, end_of_document_id, sequence_length: as for `MaskedDiffusion`.
        """
        self.config = config
        self.seed = seed
        self.mask_token_id = mask_token_id
        self.end_of_document_id = end_of_document_id
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
        inputs = torch.cat((tokens.new_full((batch, 1), self.end_of_document_id), tokens[:, :-1]), dim=1)
        threshold = round(self.config.input_mask_ratio * 2**32)
        if threshold and purpose is Purpose.TRAIN:
            counters = token_counter(sample_ids[:, None], np.arange(seq))
            if device.type == "cpu":
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
            lengths=None,
        )


def build_objective(config: Config, *, mask_token_id: int, end_of_document_id: int) -> MaskedDiffusion | Autoregressive:
    """The objective of `model.objective`.

    Raises:
        ConfigError: as `MaskedDiffusion`.
    """
    common = {
        "seed": config.run.seed,
        "mask_token_id": mask_token_id,
        "end_of_document_id": end_of_document_id,
        "sequence_length": config.data.sequence_length,
    }
    if config.model.objective == "masked_diffusion":
        return MaskedDiffusion(config.diffusion, **common)
    return Autoregressive(config.autoregressive, **common)


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
