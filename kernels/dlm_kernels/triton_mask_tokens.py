"""`mask_tokens` on a GPU: the results of `dlm_kernels.reference.mask_tokens`, in few launches and without a sync.

Exact count takes one launch, and one more to count the eligible tokens of each row if there are such; rows that are too
long for one program take three. Bernoulli masking takes two.
"""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import torch
import triton
from torch import Tensor

from dlm_kernels import noise_levels
from dlm_kernels import triton_mask_tokens_kernels as kernels
from dlm_kernels.philox import MASK32, TOKEN_POSITION_BITS, Purpose
from dlm_kernels.types import MaskedTokens, Masking, NoiseDraw, NoiseMode, require_consistent

# Exact count: longer rows do not stay in the registers of one program, of 512 threads with 16 tokens each.
MAX_ROW = 8192
_TOKENS_PER_THREAD = 16
# Longer rows: tokens that their program looks at at a time.
SELECT_BLOCK = 4096
# Bernoulli, and longer rows: tokens per program. 32 x 4096 of them are about one program per SM.
BLOCK = 1024


def mask_tokens(
    tokens: Tensor,
    sample_ids: np.ndarray | Tensor,
    *,
    seed: int,
    mask_token_id: int,
    masking: Masking = "exact_count",
    draw: NoiseDraw | None = None,
    levels: Tensor | None = None,
    weights: Tensor | None = None,
    complement: Tensor | None = None,
    eligible: Tensor | None = None,
    capacity: int | None = None,
    purpose: Purpose = Purpose.TRAIN,
) -> MaskedTokens:
    """Replace a random subset of the eligible tokens by [MASK] and list the replaced positions.

    The specification is `reference.mask_tokens`: same arguments, same bits.

    Args:
        tokens: [batch, seq] int64; seq < 2**22, batch * seq < 2**31.
        sample_ids: [batch] int64. Consecutive ids on the host become one number; other ones are copied to the device.
        seed, mask_token_id, masking, draw, levels, weights, complement, eligible, purpose: as there; tensors are on the
            device of `tokens`.
        capacity: length of the list of positions, below 2**31; None = as many as were masked, which waits for the
            device to read the number back. Nothing else does.

    Raises:
        ValueError: as there, or the tokens or the capacity are too many. Ids in device memory are not checked: those
            outside the global batch of `draw` get the level of another row.
    """
    batch, seq = tokens.shape
    require_consistent(seq, draw, levels, weights, complement)
    total = batch * seq
    length = total if capacity is None else capacity
    if max(total, length) >= 2**31:
        raise ValueError(f"{batch} x {seq} tokens, or a capacity of {length}, are too many: the list holds int32")
    device = tokens.device
    host_ids = _on_host(sample_ids)
    drawing = _drawing(draw, masking, host_ids)
    if total == 0:
        return _nothing(tokens, length)
    # Consecutive ids, which a training step has, are one number and no copy.
    ids, first_id = _device_ids(sample_ids, host_ids, device)
    # Where the caller gives no capacity, the kernel leaves the number of rows here, to be read at the end.
    count = torch.empty((), dtype=torch.int32, device=device) if capacity is None else None
    result = MaskedTokens(
        tokens=torch.empty((batch, seq), dtype=torch.int64, device=device),
        rows=torch.empty(length, dtype=torch.int32, device=device),
        targets=torch.empty(length, dtype=torch.int64, device=device),
        weights=torch.empty(length, dtype=torch.float32, device=device),
        overflow=torch.empty((), dtype=torch.bool, device=device),
    )
    # By the kernels' names: of the tokens, of the noise levels, and of the results.
    common: dict[str, Any] = {
        "ELIGIBLE": None if eligible is None else eligible.contiguous(),
        "SAMPLE_IDS": ids,
        "first_id": first_id,
        "seq": seq,
        "seed_low": seed & MASK32,
        "seed_high": (seed >> 32) & MASK32,
        "PURPOSE": int(purpose),
    }
    noise: dict[str, Any] = {
        "LEVELS": None if levels is None else levels.contiguous(),
        "WEIGHTS": None if weights is None else weights.float().contiguous(),
        "COMPLEMENT": None if complement is None else complement.contiguous(),
    }
    output: dict[str, Any] = {
        "TOKENS": tokens.contiguous(),
        "NOISED": result.tokens,
        "ROWS": result.rows,
        "TARGETS": result.targets,
        "ROW_WEIGHTS": result.weights,
        "OVERFLOW": result.overflow,
        "COUNT": count,
        "batch": batch,
        "capacity": length,
        "mask_token_id": mask_token_id,
        "EVEN": seq % 2 == 0,
    }
    if masking != "exact_count":
        _mask_blocks(common, noise, drawing, output, TOKEN_POSITION_BITS)
    elif seq <= (MAX_ROW // 2 if seq % 2 and complement is not None else MAX_ROW):  # odd rows take more registers
        _mask_rows(common, noise, drawing, output)
    else:
        _mask_long_rows(common, noise, drawing, output)
    if count is None:
        return result
    # The one wait for the device, and only where no capacity was given.
    found = int(count)
    return MaskedTokens(
        result.tokens, result.rows[:found], result.targets[:found], result.weights[:found], result.overflow
    )


def _mask_rows(common: dict[str, Any], noise: dict[str, Any], drawing: dict[str, Any], output: dict[str, Any]) -> None:
    """Exact count of rows that fit into one program."""
    batch, seq = output["NOISED"].shape
    # The whole row in registers: a power of 2, as Triton's ranges are.
    block = max(triton.next_power_of_2(seq), 32)
    warps = _warps(block)
    counts = None
    if common["ELIGIBLE"] is not None:
        # Where a row's part of the list begins depends on the masks of all rows before it. This launch reads each mask
        # once; without it every program would have to read those of all rows.
        counts = torch.empty(batch, dtype=torch.int32, device=output["NOISED"].device)
        kernels.count_eligible[(batch,)](common["ELIGIBLE"], counts, seq, BLOCK=block, num_warps=warps)
    drawing = {name: drawing[name] for name in ("MODE", "ODD", "step", "size")}
    kernels.mask_rows[(batch,)](
        **common,
        **noise,
        **drawing,
        **output,
        ELIGIBLE_COUNTS=counts,
        BATCH_BLOCK=min(max(triton.next_power_of_2(batch), 32), 1024),
        BLOCK=block,
        num_warps=warps,
        # By itself the assembler would rather spill some than leave no room for a second program of 256 threads.
        maxnreg=255 if warps <= 8 else None,
    )


def _mask_long_rows(
    common: dict[str, Any], noise: dict[str, Any], drawing: dict[str, Any], output: dict[str, Any]
) -> None:
    """Exact count of longer rows: their limits first, and then as for thresholds."""
    batch = output["batch"]
    device = output["NOISED"].device
    # (key, position) as one integer, so that ties are settled by the limit itself.
    limits = torch.empty(batch, dtype=torch.int64, device=device)
    weights = noise["WEIGHTS"]
    if weights is None:
        weights = torch.empty(batch, dtype=torch.float32, device=device)
    kernels.select_rows[(batch,)](
        **common,
        **{name: drawing[name] for name in ("MODE", "ODD", "step", "size")},
        LEVELS=noise["LEVELS"],
        LIMITS=limits,
        WEIGHTS=weights,
        BLOCK=SELECT_BLOCK,
        num_warps=_warps(SELECT_BLOCK),
    )
    noise = {**noise, "LEVELS": limits, "WEIGHTS": weights}
    _mask_blocks(common, noise, {**drawing, "MODE": None}, output, 0)


def _mask_blocks(
    common: dict[str, Any], noise: dict[str, Any], drawing: dict[str, Any], output: dict[str, Any], shift: int
) -> None:
    """Mask the tokens whose (key, position), as one integer, is below the level of their row times 2**shift."""
    batch, seq = output["NOISED"].shape
    device = output["NOISED"].device
    # A block never reaches into the next row, so each has one sample id and one limit.
    block = min(max(triton.next_power_of_2(seq), 32), BLOCK)
    programs = batch * triton.cdiv(seq, block)
    if noise["LEVELS"] is None:
        levels = torch.empty(batch, dtype=torch.int64, device=device)
        weights = torch.empty(batch, dtype=torch.float32, device=device)
        noise = {**noise, "LEVELS": levels, "WEIGHTS": weights}
    counts = torch.empty(programs, dtype=torch.int32, device=device)
    options = {"COUNTS": counts, "SHIFT": shift, "BLOCK": block, "num_warps": max(block // 256, 1)}
    # Two launches, because where a block's part of the list begins needs the counts of all before it.
    kernels.count_blocks[(programs,)](**common, **noise, **drawing, **options)
    kernels.apply_blocks[(programs,)](**common, **noise, **output, **options)


def _warps(block: int) -> int:
    return min(max(block // (32 * _TOKENS_PER_THREAD), 1), 16)


def _on_host(sample_ids: np.ndarray | Tensor) -> np.ndarray | None:
    """The ids if they are in host memory: looking at those of a device would stall the step."""
    if isinstance(sample_ids, Tensor):
        return sample_ids.numpy() if sample_ids.device.type == "cpu" else None
    return sample_ids


def _device_ids(
    sample_ids: np.ndarray | Tensor, host_ids: np.ndarray | None, device: torch.device
) -> tuple[Tensor | None, int]:
    """The ids in device memory and 0, or, for consecutive ids, None and the first one, which saves a copy per step."""
    if host_ids is not None:
        first = int(host_ids[0])
        if np.array_equal(host_ids, np.arange(first, first + len(host_ids))):
            return None, first
    return torch.as_tensor(sample_ids).to(device, non_blocking=True).contiguous(), 0


def _drawing(draw: NoiseDraw | None, masking: Masking, host_ids: np.ndarray | None) -> dict[str, Any]:
    """What the kernels need to draw noise levels, by their names.

    Raises:
        ValueError: as `noise_levels.draw` and `noise_levels.linear_threshold`.
    """
    if draw is None:
        return {"MODE": None, "ODD": False, "step": 0, "size": 1, "floor": 0}
    size = draw.global_batch_size
    if draw.mode not in get_args(NoiseMode):
        raise ValueError(f"unknown noise level mode {draw.mode!r}")
    if host_ids is not None:
        noise_levels._require_inside(host_ids - draw.step * size, size, draw.step)
    # The threshold of level 0 is the floor that eps puts under all of them.
    floor = 0 if masking == "exact_count" else noise_levels.linear_threshold(0, draw.eps)
    # Only this mode needs another kernel for an odd batch.
    odd = draw.mode == "stratified_antithetic" and size % 2 == 1
    return {"MODE": draw.mode, "ODD": odd, "step": draw.step, "size": size, "floor": floor}


def _nothing(tokens: Tensor, length: int) -> MaskedTokens:
    """The result for no tokens: all of the list is padding."""
    device = tokens.device
    return MaskedTokens(
        tokens=torch.empty_like(tokens),
        rows=torch.zeros(length, dtype=torch.int32, device=device),
        targets=torch.zeros(length, dtype=torch.int64, device=device),
        weights=torch.zeros(length, dtype=torch.float32, device=device),
        overflow=torch.zeros((), dtype=torch.bool, device=device),
    )
