"""Triton kernels of what all rows have together: divisors, counted from labels and weights, and totals."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_rows(labels, weight, class_weight, first, last, step, V, ignore_index, B: tl.constexpr):
    """Sums of w and of w * class_weight[label] over the valid rows of [first, last), always in the same order."""
    n0 = tl.zeros([B], tl.float32)
    n1 = tl.zeros([B], tl.float32)
    for r0 in range(first, last, step):
        r = (r0 + tl.arange(0, B)).to(tl.int64)
        inside = r < last
        w = tl.where(inside, 1.0, 0.0)
        if weight is not None:
            w = tl.load(weight + r, mask=inside, other=0.0)
        c = w
        if labels is not None:
            y = tl.load(labels + r, mask=inside, other=0)
            w = tl.where(y == ignore_index, 0.0, w)
            c = w
            if class_weight is not None:
                c = w * tl.load(class_weight + y, mask=inside & (y >= 0) & (y < V), other=0.0)
                c = tl.where(w == 0.0, 0.0, c)
        n0 += w
        n1 += c
    return tl.sum(n0, 0), tl.sum(n1, 0)


@triton.jit(do_not_specialize=["rows", "V", "ignore_index", "count", "stride"])
def count_kernel(
    labels, weight, class_weight, out, rows, V, ignore_index, count, stride, B: tl.constexpr, FINAL: tl.constexpr
):
    """Divisors over all rows (FINAL, one program), or each program's part of them."""
    pid = tl.program_id(0)
    n0, n1 = count_rows(labels, weight, class_weight, pid * B, rows, stride, V, ignore_index, B)
    if FINAL:
        if (count & 1) != 0:
            tl.store(out, n0)
        if (count & 2) != 0:
            tl.store(out + 1, n1)
    else:
        tl.store(out + pid, n0)
        tl.store(out + tl.num_programs(0) + pid, n1)


@triton.jit(do_not_specialize=["n", "stride"])
def sum_kernel(x, out, n, stride, B: tl.constexpr):
    """out[p] = sum of x, every program its own blocks in a fixed order."""
    pid = tl.program_id(0)
    acc = tl.zeros([B], tl.float32)
    for k in range(pid * B, n, stride):
        at = (k + tl.arange(0, B)).to(tl.int64)
        acc += tl.load(x + at, mask=at < n, other=0.0)
    tl.store(out + pid, tl.sum(acc, 0))
