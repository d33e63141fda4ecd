"""Triton kernel and launcher of the in-place scale."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kdkernels.native import View
from kdkernels.ops.triton_util import cast, on

BLOCK = 4096
PROGRAMS = 1024  # few enough that leaving at once, when the factor is 1, costs one wave


@triton.jit(do_not_specialize=["step"])
def scale_kernel(x, factor, n, step, B: tl.constexpr):
    f = tl.load(factor)
    if f != 1.0:
        for at in range(tl.program_id(0).to(tl.int64) * B, n, step):
            i = at + tl.arange(0, B)
            mask = i < n
            y = tl.load(x + i, mask=mask, eviction_policy="evict_first").to(tl.float32) * f
            tl.store(x + i, cast(y, x.dtype.element_ty), mask=mask)


def scale_in_place(x: Any, factor: torch.Tensor) -> None:
    """x *= factor[0] for a dense x. The device decides whether there is anything to do."""
    n = 1
    for size in x.shape:
        n *= size
    x = x.tensor if isinstance(x, View) else x
    if n == 0:
        return
    programs = min(triton.cdiv(n, BLOCK), PROGRAMS)
    with on(x.device):
        scale_kernel[(programs,)](x, factor, n, programs * BLOCK, B=BLOCK, num_warps=8)
