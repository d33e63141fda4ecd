"""The Triton kernel of the hinges between right and wrong classes, and its launcher: csrc/weighted_match/margin.h."""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.ops.triton_util import cast


@triton.jit
def _over(x, at, inside, right, margin):
    return (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - right) + margin


@triton.jit(do_not_specialize=["classes", "ignore"])
def margin_kernel(
    x, labels, upstream, values, dx, classes, by_row, margin, ignore, HARDEST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row: its value, or its gradient times upstream."""
    r = tl.program_id(0).to(tl.int64)
    y = tl.load(labels + r)
    known = (y >= 0) & (y < classes)
    kept = y != ignore
    row = x + r * by_row
    right = tl.load(row + tl.where(known, y, 0)).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    best = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float64)
    broken = tl.zeros([BLOCK], tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(0, classes, BLOCK):
        j = first + lanes
        wrong = (j < classes) & (j != y)
        over = _over(row, j, wrong, right, margin)
        if HARDEST:
            best = tl.maximum(best, tl.max(tl.where(wrong & (over == over), over, float("-inf")), 0))
            broken += tl.where(wrong & (over != over), 1, 0)
        else:
            total += tl.where(wrong, tl.where(over < 0.0, 0.0, over), 0.0).to(tl.float64)
            count += tl.where(wrong & (over >= 0.0), 1, 0)
    if HARDEST:
        best = tl.where(tl.sum(broken, 0) > 0, float("nan"), best)
    if values is not None:
        if HARDEST:
            value = tl.where(best < 0.0, 0.0, best)
        else:
            value = (tl.sum(total, 0) / tl.maximum(classes - 1, 1)).to(tl.float32)
        tl.store(values + r, tl.where(kept, tl.where(known, value, float("nan")), 0.0))
    if dx is not None:
        if HARDEST:
            for first in range(0, classes, BLOCK):
                j = first + lanes
                wrong = (j < classes) & (j != y)
                count += tl.where(wrong & (_over(row, j, wrong, right, margin) == best), 1, 0)
        opened = tl.sum(count, 0)
        if HARDEST:
            share = tl.where(best >= 0.0, opened, 0)
            least = best
        else:
            share = tl.where(opened > 0, classes - 1, 0)
            least = tl.full((), 0.0, tl.float32)
        g = tl.where(share > 0, tl.load(upstream + r) / tl.maximum(share, 1).to(tl.float32), 0.0)
        for first in range(0, classes, BLOCK):
            j = first + lanes
            inside = j < classes
            over = _over(row, j, inside, right, margin)
            made = tl.where(j == y, -g * opened.to(tl.float32), tl.where(over >= least, g, 0.0))
            made = tl.where(kept, tl.where(known, made, float("nan")), 0.0)
            tl.store(dx + r * classes + j, cast(made, dx.dtype.element_ty), mask=inside)


def margin_rows(x, labels, scalars, upstream, values, dx, hardest, ignore):
    _, rows, classes = x.shape
    block = min(1024, max(16, triton.next_power_of_2(classes)))
    margin_kernel[(rows,)](
        x, labels, upstream, values, dx, classes, x.stride(1), scalars.tolist()[0], ignore, hardest, block, num_warps=4
    )


def aot_rows() -> list[dict]:
    """Representative compilations, as triton.aot_signatures."""
    constexprs = {"HARDEST": False, "BLOCK": 1024, "values": None}
    types = {"x": "*bf16", "labels": "*i64", "upstream": "*fp32", "dx": "*bf16", "classes": "i32", "by_row": "i32",
             "margin": "fp32", "ignore": "i64"}  # fmt: skip
    return [{
        "name": "margins, bf16", "kernel": margin_kernel, "constexprs": constexprs,
        "signature": {n: types.get(n, "constexpr") for n in margin_kernel.arg_names},
        "divisible": ["x", "labels", "upstream", "dx", "by_row"], "num_warps": 4, "num_stages": 3,
    }]  # fmt: skip
