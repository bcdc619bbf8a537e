"""Configuration of an exported masked diffusion language model; a copy of this file ships inside every export."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3Config


class DLMConfig(Qwen3Config):
    """Qwen3's fields, and what masked diffusion adds.

    Attributes:
        mask_token_id: id of [MASK].
        qk_norm: RMSNorm on every head's queries and keys.
    """

    model_type = "megatron_dlm"

    def __init__(self, mask_token_id: int | None = None, qk_norm: bool = True, **kwargs: Any) -> None:
        kwargs.setdefault("use_cache", False)  # every position sees every other: there is nothing to keep
        super().__init__(**kwargs)
        self.mask_token_id = mask_token_id
        self.qk_norm = qk_norm
