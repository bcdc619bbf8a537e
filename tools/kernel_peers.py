"""What the kernels are timed beside: each peer behind one signature, present where it can be imported.

A peer's note says what it does not do. Nobody else has row compaction, per-token weights and vocabulary parallelism
together, so some are given less to do than ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[..., Tensor]


class Peer(NamedTuple):
    """A function to time."""

    name: str
    function: Loss
    """Of (logits, targets, weights) or (hidden, weight, targets, weights); gives a scalar."""
    note: str = ""


def _eager_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()


def _eager_linear(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return _eager_cross_entropy(hidden @ weight.t(), targets, weights)


def _eager_mask(tokens: Tensor, mask_id: int) -> tuple[Tensor, ...]:
    """The usual operations: a level for each sequence, Bernoulli masks, replacement, weights, the masked positions."""
    t = torch.rand(tokens.shape[0], device=tokens.device)
    p = ((1 - 1e-3) * t + 1e-3)[:, None].expand(tokens.shape)
    masked = torch.rand(tokens.shape, device=tokens.device) < p
    noisy = torch.where(masked, mask_id, tokens)
    return noisy, torch.where(masked, 1 / p, 0.0), masked.flatten().cumsum(0)


def _compiled(function: Loss) -> Loss:
    """For the shape of the first call only: with earlier shapes in mind dynamo would compile for any."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def cross_entropy_peers(gpu: bool) -> list[Peer]:
    """Peers of K2."""
    peers = [Peer("torch eager", _eager_cross_entropy)]
    if not gpu:
        return peers
    peers.append(Peer("torch.compile", _compiled(_eager_cross_entropy)))

    def liger() -> Peer:
        from liger_kernel.transformers.functional import liger_cross_entropy

        def loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            return (liger_cross_entropy(logits, targets, reduction="none") * weights).sum()

        return Peer("Liger", loss, "weights by reduction='none'")

    def flash() -> Peer:
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

        def loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            return (cross_entropy_loss(logits, targets, inplace_backward=True)[0] * weights).sum()

        return Peer("flash-attn Triton", loss)

    def quack() -> Peer:
        from quack.cross_entropy import cross_entropy

        def loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            return (cross_entropy(logits, targets, reduction="none", inplace_backward=True) * weights).sum()

        return Peer("QuACK", loss)

    def fla() -> Peer:
        from fla.modules.fused_cross_entropy import cross_entropy_loss

        def loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            return (cross_entropy_loss(logits, targets, inplace_backward=True)[0] * weights).sum()

        return Peer("FLA", loss)

    return peers + _importable(liger, flash, quack, fla)


def linear_peers(gpu: bool) -> list[Peer]:
    """Peers of K3."""
    peers = [Peer("torch eager", _eager_linear)]
    if not gpu:
        return peers
    peers.append(Peer("torch.compile", _compiled(_eager_linear)))

    def liger(weighted: bool, chunks: int) -> Callable[[], Peer]:
        def make() -> Peer:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

            def loss(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
                if not weighted:
                    return fused(hidden, weight, targets, reduction="sum", chunk_mem_const=chunks)
                return (fused(hidden, weight, targets, reduction="none", chunk_mem_const=chunks) * weights).sum()

            name = f"Liger FLCE{' scaled' if weighted else ''}{f' chunks x{chunks}' if chunks > 1 else ''}"
            return Peer(name, loss, "" if weighted else "no per-token weights")

        return make

    def liger_sm90() -> Peer:
        from liger_kernel.ops.cutedsl.ops import fused_linear_cross_entropy_sm90 as sm90

        def loss(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            return sm90.liger_fused_linear_cross_entropy_sm90(hidden, weight, targets, reduction="sum")

        return Peer("Liger SM90", loss, "no per-token weights")

    def liger_scaled_sm90() -> Peer:
        from liger_kernel.ops.cutedsl.ops import fused_scaled_cross_entropy_sm90 as sm90

        def loss(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            result = sm90.LigerFusedScaledCrossEntropySM90Function.apply(hidden, weight, targets)
            return ((result[0] if isinstance(result, tuple) else result) * weights).sum()

        return Peer("Liger SM90 scaled", loss)

    def quack(scaled_exp: bool | None) -> Callable[[], Peer]:
        def make() -> Peer:
            from quack.linear_cross_entropy import chunked_linear_cross_entropy

            def loss(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
                options: dict[str, Any] = {"reduction": "sum", "tuned": False, "use_scaled_exp": scaled_exp}
                return chunked_linear_cross_entropy(hidden, weight, targets, **options)

            return Peer("QuACK" if scaled_exp is None else "QuACK base pipeline", loss, "no per-token weights")

        return make

    def fla() -> Peer:
        from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

        def loss(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            return fused_linear_cross_entropy_loss(hidden, targets, weight, reduction="sum")

        return Peer("FLA", loss, "no per-token weights")

    def cce() -> Peer:
        from cut_cross_entropy import linear_cross_entropy

        def loss(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            return (linear_cross_entropy(hidden, weight, targets, reduction="none") * weights).sum()

        return Peer("CCE", loss, "skips small gradients")

    return peers + _importable(
        liger(False, 1),
        liger(False, 32),
        liger(True, 32),
        liger_sm90,
        liger_scaled_sm90,
        quack(None),
        quack(False),
        fla,
        cce,
    )


def mask_peers(gpu: bool) -> list[Peer]:
    """Peers of K1: the usual eager operations; no fused kernel is public."""
    peers = [Peer("torch eager", _eager_mask, "Bernoulli, no compacted targets")]
    return peers + ([Peer("torch.compile", _compiled(_eager_mask), peers[0].note)] if gpu else [])


def _importable(*makers: Callable[[], Peer]) -> list[Peer]:
    """Peers whose package is there. A broken installation is left out too: it can raise anything."""
    found = []
    for make in makers:
        try:
            found.append(make())
        except Exception as error:
            print(f"without {make.__qualname__.split('.')[-1]}: {type(error).__name__}: {str(error)[:100]!r}")
    return found


def fp64_gradients(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of the weighted loss in fp64, computed from the same rounded inputs."""
    wide: list[Any] = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    loss = (F.cross_entropy(wide[0] @ wide[1].t(), targets, reduction="none") * weights.double()).sum()
    loss.backward()
    return loss.detach(), wide[0].grad, wide[1].grad
