"""These tests run Triton kernels in its interpreter, which has to be chosen before the kernels are defined."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
