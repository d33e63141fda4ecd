"""Triton kernels of row_gather and their launchers, with the entry points of the compiled extension."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kdkernels.native import View
from kdkernels.ops.triton_util import cast, on

TILE = 4096  # classes a program holds at a time
GATHERED = 64  # indices that it takes at a time


@triton.jit
def _row(x, inner, row, o_stride, i_stride):
    return x + (row // inner).to(tl.int64) * o_stride + (row % inner).to(tl.int64) * i_stride


@triton.jit
def _scores(row, v, stride, mask):
    return tl.load(row + v.to(tl.int64) * stride, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _finite(x):
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit(do_not_specialize=["k"])
def forward_kernel(
    student, indices, edges, live, scalars, gathered, rest, total, stats, t, inner, V, k, tiles,
    s_o, s_c, s_i, OUTSIDE: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if scalars is not None:
        t = tl.load(scalars)
    index = indices + row * k
    out = gathered + row * k
    bad = (tl.load(index) < -1) | (tl.load(index + k - 1) >= V)
    alive = True
    if live is not None:
        alive = tl.load(live + row) != 0
    places = tl.arange(0, 8)
    if bad | (not alive):
        fill = tl.where(alive, float("nan"), 0.0)
        for j0 in range(0, k, K):
            j = j0 + tl.arange(0, K)
            v = tl.load(index + j, mask=j < k, other=-1)
            tl.store(out + j, tl.where(v == -1, float("-inf"), fill), mask=j < k)
        if OUTSIDE > 0:
            tl.store(rest + row, fill)
        if OUTSIDE > 1:
            tl.store(total + row, fill)
        tl.store(stats + row * 8 + places, tl.zeros([8], tl.float32) + fill)
    else:
        x_row = _row(student, inner, row, s_o, s_i)
        inv_t = 1.0 / t
        top = float("-inf")
        z = 0.0
        sum_x = 0.0
        base = 0.0
        unique = 0
        if OUTSIDE > 1:
            first = _scores(x_row, tl.load(index + k - 1), s_c, tl.load(index + k - 1) >= 0)
            base = tl.where(tl.abs(first) < float("inf"), first, 0.0)
        for tile in range(tiles):
            cols = tile * C + tl.arange(0, C)
            x = _scores(x_row, cols, s_c, cols < V)
            if OUTSIDE > 0:
                inside = cols >= V
                last = -1
                for j in range(
                    tl.load(edges + row * (tiles + 1) + tile), tl.load(edges + row * (tiles + 1) + tile + 1)
                ):
                    v = tl.load(index + j).to(tl.int32)
                    inside = inside | (cols == v)
                    unique += tl.where(v != last, 1, 0)
                    last = v
                if OUTSIDE > 1:
                    sum_x += tl.sum(tl.where(inside, 0.0, x - base))
                x = tl.where(inside, float("-inf"), x)
            new = tl.maximum(top, tl.max(x))
            at = _finite(new)
            z = tl.where(top == float("-inf"), 0.0, z * tl.exp((top - at) * inv_t)) + tl.sum(tl.exp((x - at) * inv_t))
            top = new
        ref_out = _finite(top)
        z_out = z
        ref = ref_out
        mass_out = 1.0
        if OUTSIDE > 0:
            largest = top
            for j0 in range(0, k, K):
                j = j0 + tl.arange(0, K)
                v = tl.load(index + j, mask=j < k, other=-1)
                largest = tl.maximum(largest, tl.max(_scores(x_row, v, s_c, v >= 0)))
            ref = _finite(largest)
            mass_out = tl.where(z_out > 0.0, tl.exp((ref_out - ref) * inv_t), z_out)
            z = z_out * mass_out
            for j0 in range(0, k, K):
                j = j0 + tl.arange(0, K)
                v = tl.load(index + j, mask=j < k, other=-1)
                before = tl.load(index + j - 1, mask=(j < k) & (j > 0), other=-1)
                z += tl.sum(tl.exp((_scores(x_row, v, s_c, (v >= 0) & (v != before)) - ref) * inv_t))
        log_z = tl.log(z)
        for j0 in range(0, k, K):
            j = j0 + tl.arange(0, K)
            v = tl.load(index + j, mask=j < k, other=-1)
            a = (_scores(x_row, v, s_c, v >= 0) - ref) * inv_t - log_z
            tl.store(out + j, tl.where(v >= 0, a, float("-inf")), mask=j < k)
        count = (V - unique).to(tl.float32)
        if OUTSIDE > 0:
            tl.store(rest + row, tl.log(z_out) + ((ref_out - ref) * inv_t - log_z))
        if OUTSIDE > 1:
            shift = (base - ref) * inv_t - log_z
            tl.store(total + row, tl.where(count == 0.0, 0.0, sum_x * inv_t + count * shift))
        inv_z_out = tl.where(z_out == 0.0, 0.0, 1.0 / tl.where(z_out == 0.0, 1.0, z_out))
        s = tl.where(places == 0, ref, 0.0)
        s = tl.where(places == 1, 1.0 / z, s)
        s = tl.where(places == 2, ref_out, s)
        s = tl.where(places == 3, inv_z_out, s)
        s = tl.where(places == 4, mass_out / z, s)
        s = tl.where(places == 5, count, s)
        tl.store(stats + row * 8 + places, s)


@triton.jit(do_not_specialize=["k"])
def backward_kernel(
    student, indices, edges, live, scalars, stats, g, g_rest, g_total, ds, t, inner, V, k, tiles,
    s_o, s_c, s_i, d_o, d_c, d_i, C: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if scalars is not None:
        t = tl.load(scalars)
    index = indices + row * k
    bad = (tl.load(index) < -1) | (tl.load(index + k - 1) >= V)
    alive = True
    if live is not None:
        alive = tl.load(live + row) != 0
    cols = tile * C + tl.arange(0, C)
    at = _row(ds, inner, row, d_o, d_i) + cols.to(tl.int64) * d_c
    if bad | (not alive):
        fill = tl.zeros([C], tl.float32) + tl.where(alive, float("nan"), 0.0)
        tl.store(at, cast(fill, ds.dtype.element_ty), mask=cols < V)
    else:
        inv_t = 1.0 / t
        own = 0.0
        for j0 in range(0, k, K):
            j = j0 + tl.arange(0, K)
            v = tl.load(index + j, mask=j < k, other=-1)
            own += tl.sum(tl.load(g + row * k + j, mask=v >= 0, other=0.0))
        r = 0.0
        if g_rest is not None:
            r = tl.load(g_rest + row)
        m = 0.0
        if g_total is not None:
            m = tl.load(g_total + row)
        stat = stats + row * 8
        ref = tl.load(stat)
        inv_z = tl.load(stat + 1)
        inside = -(own + r + m * tl.load(stat + 5))
        factor = (inside * tl.load(stat + 4) + r * tl.load(stat + 3)) * inv_t
        x_row = _row(student, inner, row, s_o, s_i)
        x = _scores(x_row, cols, s_c, cols < V)
        y = (x - tl.load(stat + 2)) * inv_t
        # Above 0 are only classes among the indices, which are replaced.
        d = tl.exp(tl.where(y > 0.0, 0.0, y)) * factor + m * inv_t
        last = -1
        for j in range(tl.load(edges + row * (tiles + 1) + tile), tl.load(edges + row * (tiles + 1) + tile + 1)):
            v = tl.load(index + j).to(tl.int32)
            p = tl.exp((tl.load(x_row + v.to(tl.int64) * s_c).to(tl.float32) - ref) * inv_t) * inv_z
            so_far = tl.where(v == last, d, p * inside * inv_t)
            d = tl.where(cols == v, so_far + tl.load(g + row * k + j) * inv_t, d)
            last = v
        tl.store(at, cast(d, ds.dtype.element_ty), mask=cols < V)


def _plan(classes: int) -> tuple[int, int, int]:
    """(classes of a tile, tiles, warps)."""
    tile = min(TILE, max(16, 1 << (classes - 1).bit_length()))
    return tile, -(-classes // tile), min(max(tile // 256, 1), 8)


def _edges(indices: torch.Tensor, tile: int, tiles: int) -> torch.Tensor:
    """Where the indices of each tile begin: int32 (rows, tiles + 1)."""
    bounds = torch.arange(tiles + 1, device=indices.device) * tile
    bounds = bounds.expand(indices.shape[0], tiles + 1).contiguous()
    return torch.searchsorted(indices, bounds, out_int32=True)


def _scalars(scalars: torch.Tensor, on_device: bool | None) -> tuple[torch.Tensor | None, float]:
    """(pointer, value): one of the two."""
    on_device = scalars.device.type == "cuda" if on_device is None else on_device
    return (scalars, 1.0) if on_device else (None, float(scalars[0]))


def forward(
    student: View,
    indices: torch.Tensor,
    live: torch.Tensor | None,
    scalars: torch.Tensor,
    gathered: torch.Tensor,
    rest: torch.Tensor | None,
    total: torch.Tensor | None,
    stats: torch.Tensor,
    outside: int,
    scalars_on_device: bool | None = None,
) -> None:
    """The entry row_gather_forward. Arguments as op.py's."""
    outer, classes, inner = student.shape
    tile, tiles, warps = _plan(classes)
    pointer, t = _scalars(scalars, scalars_on_device)
    with on(student.tensor.device):
        forward_kernel[(outer * inner,)](
            student.tensor, indices, _edges(indices, tile, tiles) if outside else None, live, pointer, gathered, rest,
            total, stats, t, inner, classes, indices.shape[1], tiles, *student.stride,
            OUTSIDE=outside, C=tile, K=GATHERED, num_warps=warps,
        )  # fmt: skip


def backward(
    student: View,
    indices: torch.Tensor,
    live: torch.Tensor | None,
    scalars: torch.Tensor,
    stats: torch.Tensor,
    g: torch.Tensor,
    g_rest: torch.Tensor | None,
    g_total: torch.Tensor | None,
    ds: View,
    scalars_on_device: bool | None = None,
) -> None:
    """The entry row_gather_backward. Arguments as op.py's."""
    outer, classes, inner = student.shape
    tile, tiles, warps = _plan(classes)
    pointer, t = _scalars(scalars, scalars_on_device)
    with on(student.tensor.device):
        backward_kernel[(outer * inner * tiles,)](
            student.tensor, indices, _edges(indices, tile, tiles), live, pointer, stats, g, g_rest, g_total, ds.tensor,
            t, inner, classes, indices.shape[1], tiles, *student.stride, *ds.stride,
            C=tile, K=GATHERED, num_warps=warps,
        )  # fmt: skip


def _compiled(name: str, kernel: Any, dtype: str, outside: int) -> dict:
    """One compilation, as a launch on long aligned rows makes it."""
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= {n: f"*{dtype}" for n in ("student", "ds") if n in types} | {
        "indices": "*i64",
        "edges": "*i32",
        "t": "fp32",
    }
    types |= {n: "*fp32" for n in ("gathered", "rest", "total", "stats", "g", "g_rest", "g_total") if n in types}
    constexprs: dict[str, Any] = {
        "C": TILE,
        "K": GATHERED,
        "live": None,
        "scalars": None,
        "s_c": 1,
        "d_c": 1,
        "OUTSIDE": outside,
    }
    constexprs |= dict.fromkeys(
        {0: ("edges", "rest", "total"), 1: ("total",)}.get(outside, ()) if "rest" in types else ()
    )
    constexprs |= dict.fromkeys({0: ("g_rest", "g_total"), 1: ("g_total",)}.get(outside, ()))
    constexprs = {n: v for n, v in constexprs.items() if n in types}
    types = {n: "constexpr" if n in constexprs else kind for n, kind in types.items()}
    loose = ("k", "tiles")
    return {
        "name": name,
        "kernel": kernel,
        "signature": types,
        "constexprs": constexprs,
        "divisible": [n for n, kind in types.items() if kind not in ("constexpr", "fp32") and n not in loose],
        "num_warps": _plan(128256)[2],
        "num_stages": 3,
    }


def aot_signatures() -> list[dict]:
    """Representative compilations for kdkernels.bench.static."""
    rows = [
        ("gather", forward_kernel, "bf16", 0), ("gather and rest", forward_kernel, "bf16", 1),
        ("gather, rest and total, f32", forward_kernel, "fp32", 2), ("gather backward", backward_kernel, "bf16", 0),
        ("gather and rest backward", backward_kernel, "bf16", 1),
    ]  # fmt: skip
    return [_compiled(*row) for row in rows]
