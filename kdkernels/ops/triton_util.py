"""What every family's Triton kernels share."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 to dtype, to nearest even. Triton's interpreter cuts bfloat16 off, so it is given rounded values."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(tl.abs(x) <= 3.4e38, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
