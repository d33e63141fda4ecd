"""What every family's Triton kernels share."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
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


@triton.jit
def apart(s, t):
    """s - t of two products, and exactly 0 where these are equal: fused with one of them it would be what its rounding took."""
    return tl.where(s == t, 0.0, s - t)


@triton.jit
def long(n):
    """A size in 64 bits. It has no `to` of its own where it is 1: Triton compiles that in as a constant."""
    return tl.full((), 0, tl.int64) + n


def power(n: int) -> int:
    """The least power of two from n on, at least 1: what tiles are."""
    return 1 << max(n - 1, 0).bit_length()


def on(device: torch.device) -> Any:
    """A context in which kernels are launched on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def signature(
    name: str, kernel: Any, pointers: dict[str, str | None], floats: tuple[str, ...], warps: int = 4, **constexprs: Any
) -> dict[str, Any]:
    """One compilation for kdkernels.bench.static: pointers by type (None leaves one out), the rest int32."""
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(floats, "fp32")
    types |= {n: t for n, t in pointers.items() if t}
    constexprs |= {n: None for n, t in pointers.items() if t is None}
    types |= dict.fromkeys(constexprs, "constexpr")
    return {
        "name": name,
        "kernel": kernel,
        "signature": types,
        "constexprs": constexprs,
        "divisible": [n for n, t in types.items() if t.startswith("*") or n in ("n", "features", "row", "out_row")],
        "num_warps": warps,
        "num_stages": 3,
    }
