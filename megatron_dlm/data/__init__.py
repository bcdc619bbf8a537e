"""Text to tokens to training sequences: tokenizers, preparation of token files, the resumable data order."""

from __future__ import annotations

from megatron_dlm.data.errors import DataError

__all__ = ["DataError"]
