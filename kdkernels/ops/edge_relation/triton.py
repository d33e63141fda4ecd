"""Triton kernels of relations along edges, and their launchers: the compiled extension's entries without the context."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kdkernels.ops.triton_util import on, signature

EDGES, FEATURES = 32, 32  # of a program's tile
NEIGHBOURS, WIDTH = 8, 128  # edges of a node at a time, features of a program


@triton.jit
def _rows(x, node, f, nodes, features, mask):
    """Features f of some nodes; NaN where there is no such node."""
    known = (node >= 0) & (node < nodes)
    found = tl.load(
        x + node[:, None] * features + f[None, :], mask=(mask & known)[:, None] & (f < features)[None, :], other=0.0
    )
    return tl.where((mask & ~known)[:, None], float("nan"), found)


@triton.jit
def values_kernel(
    x, source, target, out, edges, nodes, features, E: tl.constexpr, F: tl.constexpr, PRODUCTS: tl.constexpr
):
    e = tl.program_id(0).to(tl.int64) * E + tl.arange(0, E)
    inside = e < edges
    i = tl.load(source + e, mask=inside, other=0)
    j = tl.load(target + e, mask=inside, other=0)
    total = tl.zeros([E], tl.float32)
    for f0 in range(0, features, F):
        f = f0 + tl.arange(0, F)
        a = _rows(x, i, f, nodes, features, inside)
        b = _rows(x, j, f, nodes, features, inside)
        if PRODUCTS:
            total += tl.sum(a * b, 1)
        else:
            total += tl.sum((a - b) * (a - b), 1)
    tl.store(out + e, total, mask=inside)


@triton.jit
def _gather(
    total, x, own, weights, other, order, begin, end, f, nodes, features, R: tl.constexpr, PRODUCTS: tl.constexpr
):
    """Adds what a node gets from its edges begin to end, through their other nodes."""
    for k0 in range(begin, end, R):
        k = k0 + tl.arange(0, R)
        inside = k < end
        e = k
        if order is not None:
            e = tl.load(order + k, mask=inside, other=0)
        w = tl.load(weights + e, mask=inside, other=0.0)
        y = _rows(x, tl.load(other + e, mask=inside, other=0), f, nodes, features, inside)
        if PRODUCTS:
            total += tl.sum(w[:, None] * y, 0)
        else:
            total += tl.sum((2.0 * w)[:, None] * (own[None, :] - y), 0)
    return total


@triton.jit
def gradient_kernel(
    x, weights, source, target, arriving, leaving, by_source, dx, nodes, features, R: tl.constexpr, W: tl.constexpr,
    PRODUCTS: tl.constexpr,
):  # fmt: skip
    """W features of one node's gradient, edge by edge in their order."""
    i = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * W + tl.arange(0, W)
    own = tl.load(x + i * features + f, mask=f < features, other=0.0)
    total = tl.zeros([W], tl.float32)
    begin = tl.load(arriving + i)
    end = tl.load(arriving + i + 1)
    total = _gather(total, x, own, weights, source, None, begin, end, f, nodes, features, R, PRODUCTS)
    begin = tl.load(leaving + i)
    end = tl.load(leaving + i + 1)
    total = _gather(total, x, own, weights, target, by_source, begin, end, f, nodes, features, R, PRODUCTS)
    tl.store(dx + i * features + f, total, mask=f < features)


def values(x: torch.Tensor, source: torch.Tensor, target: torch.Tensor, out: torch.Tensor, products: bool) -> None:
    """The entry edge_values."""
    nodes, features = x.shape
    edges = source.numel()
    with on(x.device):
        values_kernel[(triton.cdiv(edges, EDGES),)](
            x, source, target, out, edges, nodes, features, E=EDGES, F=FEATURES, PRODUCTS=products, num_warps=4
        )


def gradient(
    x: torch.Tensor,
    weights: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    arriving: torch.Tensor,
    leaving: torch.Tensor,
    by_source: torch.Tensor,
    dx: torch.Tensor,
    products: bool,
) -> None:
    """The entry edge_gradient."""
    nodes, features = x.shape
    with on(x.device):
        gradient_kernel[(nodes, triton.cdiv(features, WIDTH))](
            x, weights, source, target, arriving, leaving, by_source, dx, nodes, features, R=NEIGHBOURS, W=WIDTH,
            PRODUCTS=products, num_warps=4,
        )  # fmt: skip


def aot_signatures() -> list[dict]:
    """Representative compilations for kdkernels.bench.static."""
    indices = dict.fromkeys(("source", "target", "arriving", "leaving", "by_source"), "*i64")
    floats = dict.fromkeys(("x", "out", "weights", "dx"), "*fp32")
    rows = []
    for products in (False, True):
        for name, kernel, constants in (
            ("values", values_kernel, {"E": EDGES, "F": FEATURES}),
            ("gradient", gradient_kernel, {"R": NEIGHBOURS, "W": WIDTH}),
        ):
            pointers = {n: t for n, t in (indices | floats).items() if n in kernel.arg_names}
            what = f"{name}, {'products' if products else 'distances'}"
            rows.append(signature(what, kernel, pointers, (), **constants, PRODUCTS=products))
    return rows
