"""Operators in Triton, for NVIDIA GPUs from compute capability 8.0 on; made for Hopper."""

from __future__ import annotations

import os

# A multiplication and an addition as one instruction. Triton 3.9 does so and warns whoever has not
# said that he wants it; 3.10 does not unless told.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
