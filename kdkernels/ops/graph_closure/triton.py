"""Triton kernels of soft shortest paths, and their launchers.

The entry points are the compiled extension's without the context. Vertices are let into the walks' interior a block at
a time, in two launches: the block's own walks with those into it, then every pair's. Numerics as in README.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kdkernels.ops.triton_util import long, on, signature

BLOCK = 16  # vertices at a time
TILE = 16  # pairs on a side of a program's tile


@triton.jit
def _at(i, j, row):
    return i[:, None].to(tl.int64) * row + j[None, :]


@triton.jit
def _weight(x):
    """e^x, of a float64 difference that is hardly above 0."""
    return tl.exp(x.to(tl.float32))


@triton.jit
def _sum(shortest, total):
    """-log of the sum of weights, its greatest term taken out."""
    return shortest - tl.log(total).to(tl.float64)


@triton.jit
def start_kernel(costs, d, n, B: tl.constexpr):
    """The costs in float64, without edges from a vertex to itself."""
    graph = tl.program_id(1).to(tl.int64) * n * n
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < long(n) * n
    cost = tl.load(costs + graph + at, mask=inside, other=0.0).to(tl.float64)
    tl.store(d + graph + at, tl.where(at % (n + 1) == 0, 1e30, cost), mask=inside)


@triton.jit
def panel_kernel(d, to, onward, n, k0, K: tl.constexpr, T: tl.constexpr):
    """Walks from T vertices into a block of K, through it as long as they like; and a copy of those out of it."""
    graph = tl.program_id(1).to(tl.int64)
    own = d + graph * n * n
    i = tl.program_id(0) * T + tl.arange(0, T)
    a = tl.arange(0, K)
    k = k0 + a
    p = tl.load(own + _at(k, k, n), mask=(k < n)[:, None] & (k < n)[None, :], other=1e30)
    # All walks within the block, one vertex after another: every program for itself.
    for v in range(K):
        row = (a == v)[:, None]
        column = (a == v)[None, :]
        arriving = tl.sum(tl.where(column, p, 0.0), 1)
        leaving = tl.sum(tl.where(row, p, 0.0), 0)
        pivot = tl.sum(tl.sum(tl.where(row & column, p, 0.0), 1), 0)
        x = (arriving + tl.log(1.0 - tl.exp(-pivot)))[:, None] + leaving[None, :]
        shortest = tl.minimum(p, x)
        p = _sum(shortest, 1.0 + _weight(shortest - tl.maximum(p, x)))
    itself = a[:, None] == a[None, :]
    p = tl.where(itself, -tl.log(1.0 + tl.exp(-tl.where(itself, p, 0.0))), p)

    rows = i < n
    direct = tl.load(own + _at(i, k, n), mask=rows[:, None] & (k < n)[None, :], other=1e30)
    x = direct[:, :, None] + p[None, :, :]
    shortest = tl.min(x, 1)
    arrived = _sum(shortest, tl.sum(_weight(shortest[:, None, :] - x), 1))
    tl.store(to + graph * n * K + _at(i, a, K), arrived, mask=rows[:, None])
    out = tl.load(own + _at(k, i, n), mask=(k < n)[:, None] & rows[None, :], other=1e30)
    tl.store(onward + graph * n * K + _at(a, i, n), out, mask=rows[None, :])


@triton.jit
def pairs_kernel(d, to, onward, n, K: tl.constexpr, T: tl.constexpr):
    """All pairs' walks, now also through the block."""
    graph = tl.program_id(2).to(tl.int64)
    own = d + graph * n * n
    i = tl.program_id(0) * T + tl.arange(0, T)
    j = tl.program_id(1) * T + tl.arange(0, T)
    a = tl.arange(0, K)
    inside = (i < n)[:, None] & (j < n)[None, :]
    before = tl.load(own + _at(i, j, n), mask=inside, other=1e30)
    first = tl.load(to + graph * n * K + _at(i, a, K), mask=(i < n)[:, None], other=1e30)
    then = tl.load(onward + graph * n * K + _at(a, j, n), mask=(j < n)[None, :], other=1e30)
    x = first[:, :, None] + then[None, :, :]
    shortest = tl.minimum(before, tl.min(x, 1))
    total = _weight(shortest - before) + tl.sum(_weight(shortest[:, None, :] - x), 1)
    tl.store(own + _at(i, j, n), _sum(shortest, total), mask=inside)


@triton.jit
def visits_kernel(d, visits, log_visits, n, B: tl.constexpr):
    """How often a walk that is at a vertex is there before it ends."""
    graph = tl.program_id(1).to(tl.int64) * n
    j = tl.program_id(0) * B + tl.arange(0, B)
    back = tl.load(d + (graph + j) * n + j, mask=j < n, other=0.0)
    often = 1.0 + tl.exp(-back)
    tl.store(visits + graph + j, often.to(tl.float32), mask=j < n)
    tl.store(log_visits + graph + j, tl.log(often), mask=j < n)


@triton.jit
def arrival_kernel(d, log_visits, n, B: tl.constexpr):
    """From all walks to those until the first arrival."""
    graph = tl.program_id(1).to(tl.int64) * n
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < long(n) * n
    x = tl.load(d + graph * n + at, mask=inside, other=0.0)
    x += tl.load(log_visits + graph + at % n, mask=inside, other=0.0)
    tl.store(d + graph * n + at, tl.where(at % (n + 1) == 0, 0.0, x), mask=inside)


@triton.jit
def expected_kernel(f, upstream, visits, expected, n, R: tl.constexpr, T: tl.constexpr):
    """Visits of a on the walks to j, times the walks' upstream gradients: T x T pairs (a, j)."""
    graph = tl.program_id(2).to(tl.int64)
    own = f + graph * n * n
    a = tl.program_id(0) * T + tl.arange(0, T)
    j = tl.program_id(1) * T + tl.arange(0, T)
    inside = (a < n)[:, None] & (j < n)[None, :]
    onward = tl.load(own + _at(a, j, n), mask=inside, other=0.0)
    back = tl.load(own + j[None, :].to(tl.int64) * n + a[:, None], mask=inside, other=0.0)
    passing = _weight(-back - onward)
    total = tl.zeros([T, T], tl.float32)
    for i0 in range(0, n, R):
        i = i0 + tl.arange(0, R)
        rows = i < n
        to = tl.load(own + i[None, :].to(tl.int64) * n + a[:, None], mask=rows[None, :] & (a < n)[:, None], other=0.0)
        mask = rows[:, None] & (j < n)[None, :]
        all_the_way = tl.load(own + _at(i, j, n), mask=mask, other=0.0)
        g = tl.load(upstream + graph * n * n + _at(i, j, n), mask=mask, other=0.0)
        x = (all_the_way[None, :, :] - to[:, :, None]) - onward[:, None, :]
        total += tl.sum(g[None, :, :] * (_weight(tl.minimum(x, 1.0)) - passing[:, None, :]), 1)
    often = tl.load(visits + graph * n + a, mask=a < n, other=0.0)
    tl.store(expected + graph * n * n + _at(a, j, n), total * often[:, None], mask=inside)


@triton.jit
def edges_kernel(f, costs, expected, d_costs, n, R: tl.constexpr, T: tl.constexpr):
    """The gradient of T x T edges from a to b, over all j that they lead to."""
    graph = tl.program_id(2).to(tl.int64) * n * n
    own = f + graph
    a = tl.program_id(0) * T + tl.arange(0, T)
    b = tl.program_id(1) * T + tl.arange(0, T)
    inside = (a < n)[:, None] & (b < n)[None, :]
    cost = tl.load(costs + graph + _at(a, b, n), mask=inside, other=0.0).to(tl.float64)
    total = tl.zeros([T, T], tl.float32)
    for j0 in range(0, n, R):
        j = j0 + tl.arange(0, R)
        goal = (a < n)[:, None] & (j < n)[None, :]
        whole = tl.load(own + _at(a, j, n), mask=goal, other=0.0)
        often = tl.load(expected + graph + _at(a, j, n), mask=goal, other=0.0)
        rest = tl.load(
            own + b[None, :].to(tl.int64) * n + j[:, None], mask=(j < n)[:, None] & (b < n)[None, :], other=0.0
        )
        x = (whole[:, :, None] - rest[None, :, :]) - cost[:, None, :]
        total += tl.sum(often[:, :, None] * _weight(tl.minimum(x, 1.0)), 1)
    total = tl.where(a[:, None] == b[None, :], 0.0, total)
    tl.store(d_costs + graph + _at(a, b, n), total, mask=inside)


def forward(costs: torch.Tensor, distances: torch.Tensor, visits: torch.Tensor) -> None:
    """The entry graph_closure_forward."""
    graphs, n, _ = costs.shape
    tiles, blocks = triton.cdiv(n, TILE), triton.cdiv(n * n, 1024)
    to = distances.new_empty(graphs, n, BLOCK)
    onward, log_visits = torch.empty_like(to), distances.new_empty(graphs, n)
    options = {"K": BLOCK, "T": TILE, "num_warps": 4}
    with on(costs.device):
        start_kernel[(blocks, graphs)](costs, distances, n, B=1024)
        for k0 in range(0, n, BLOCK):
            panel_kernel[(tiles, graphs)](distances, to, onward, n, k0, **options)
            pairs_kernel[(tiles, tiles, graphs)](distances, to, onward, n, **options)
        visits_kernel[(triton.cdiv(n, 256), graphs)](distances, visits, log_visits, n, B=256)
        arrival_kernel[(blocks, graphs)](distances, log_visits, n, B=1024)


def backward(
    costs: torch.Tensor, distances: torch.Tensor, visits: torch.Tensor, upstream: torch.Tensor, d_costs: torch.Tensor
) -> None:
    """The entry graph_closure_backward."""
    graphs, n, _ = costs.shape
    tiles = triton.cdiv(n, TILE)
    expected = torch.empty_like(costs)
    options = {"R": BLOCK, "T": TILE, "num_warps": 4}
    with on(costs.device):
        expected_kernel[(tiles, tiles, graphs)](distances, upstream, visits, expected, n, **options)
        edges_kernel[(tiles, tiles, graphs)](distances, costs, expected, d_costs, n, **options)


def aot_signatures() -> list[dict]:
    """Representative compilations for kdkernels.bench.static."""
    single = {"costs", "visits", "upstream", "expected", "d_costs"}
    rows = []
    for name, kernel, constants in (
        ("start", start_kernel, {"B": 1024}),
        ("walks into a block", panel_kernel, {"K": BLOCK, "T": TILE}),
        ("walks through a block", pairs_kernel, {"K": BLOCK, "T": TILE}),
        ("visits", visits_kernel, {"B": 256}),
        ("arrival", arrival_kernel, {"B": 1024}),
        ("expected visits", expected_kernel, {"R": BLOCK, "T": TILE}),
        ("gradient of edges", edges_kernel, {"R": BLOCK, "T": TILE}),
    ):
        pointers = {
            a: "*fp32" if a in single else "*fp64"
            for a in kernel.arg_names
            if a not in constants and a not in ("n", "k0")
        }
        rows.append(signature(name, kernel, pointers, (), **constants))
    return rows
