"""What an objective is: all that other code asks about it, in one record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of language model."""

    name: str
    """The value of ``model.objective``."""
    label: str
    """In tables and figures."""
    words: str
    """In sentences."""
    causal: bool
    """A position sees those before it only, and its logits are of the next token; else it sees all, and they are of
    its own."""
    likelihood: str
    """Name of the held-out figure."""
    is_bound: bool
    """The held-out figure is an upper bound of the negative log-likelihood; else it is exact."""
    scored_share: float
    """Expected share of the tokens that have a loss."""
    complements: bool
    """``diffusion.complementary`` makes two rows of every sequence."""
    architectures: Mapping[bool, str]
    """Class of an export in transformers, by ``model.qk_norm``."""


MASKED_DIFFUSION = Kind(
    name="masked_diffusion",
    label="DLM",
    words="masked diffusion",
    causal=False,
    likelihood="NELBO",
    is_bound=True,
    scored_share=0.5,
    complements=True,
    architectures={True: "DLMForMaskedDiffusion", False: "DLMForMaskedDiffusion"},
)
AUTOREGRESSIVE = Kind(
    name="autoregressive",
    label="AR",
    words="autoregressive",
    causal=True,
    likelihood="NLL",
    is_bound=False,
    scored_share=1.0,
    complements=False,
    architectures={True: "Qwen3ForCausalLM", False: "LlamaForCausalLM"},
)
KINDS = {kind.name: kind for kind in (MASKED_DIFFUSION, AUTOREGRESSIVE)}
"""By the value of ``model.objective``."""
