"""Triton kernels of the peer divergence and their launchers: the same entry points as the compiled extension.

A program has some rows of all learners: tiles are [learners, rows, classes], with the learners padded to a power of
two, so that a sum over peers is a sum along an axis. An optional argument that is None is left out at compile time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kdkernels.native import View
from kdkernels.ops.triton_util import cast, on, power

TILE = 4096  # elements of a tile
BLOCK = 1024


@triton.jit
def _row_weight(row, inside, labels, weight, V, ignore_index):
    """0 for a masked row, NaN for an impossible label."""
    w = tl.where(inside, 1.0, 0.0)
    if weight is not None:
        w = tl.load(weight + row, mask=inside, other=0.0)
    if labels is not None:
        y = tl.load(labels + row, mask=inside, other=0)
        wrong = ((y < 0) | (y >= V)) & (w != 0.0)
        w = tl.where(y == ignore_index, 0.0, tl.where(wrong, float("nan"), w))
    return w


@triton.jit
def count_kernel(labels, weight, divisor, rows, ignore_index, B: tl.constexpr):
    """divisor = the sum of the row weights, a row with an impossible label included as it is."""
    n = tl.zeros([B], tl.float32)
    for r0 in range(0, rows, B):
        r = (r0 + tl.arange(0, B)).to(tl.int64)
        inside = r < rows
        w = tl.where(inside, 1.0, 0.0)
        if weight is not None:
            w = tl.load(weight + r, mask=inside, other=0.0)
        if labels is not None:
            w = tl.where(tl.load(labels + r, mask=inside, other=0) == ignore_index, 0.0, w)
        n += w
    tl.store(divisor, tl.sum(n, 0))


@triton.jit
def total_kernel(losses, total, n, B: tl.constexpr):
    acc = tl.zeros([B], tl.float32)
    for k in range(0, n, B):
        at = (k + tl.arange(0, B)).to(tl.int64)
        acc += tl.load(losses + at, mask=at < n, other=0.0)
    tl.store(total, tl.sum(acc, 0))


@triton.jit
def peer_kernel(
    x, places, labels, weight, scalars, divisor, losses, upstream, d, t, factor, learners, rows, inner, V,
    x_l, x_o, x_c, x_i, d_l, d_o, d_c, d_i, per_row, ignore_index,
    LISTED: tl.constexpr, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Losses (where `losses` is given) and gradients (where `d` is) of R rows of all learners.

    places: where each learner of a list begins, in elements from x; used where LISTED.
    """
    if scalars is not None:
        t = tl.load(scalars)
        factor = tl.load(scalars + 1)
    if divisor is not None:
        n = tl.load(divisor)
        factor = tl.where(n == 0.0, 0.0, factor / tl.where(n == 0.0, 1.0, n))
    inv = 1.0 / t
    l = tl.arange(0, M)  # noqa: E741
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    inside = row < rows
    w = _row_weight(row, inside, labels, weight, V, ignore_index)
    live = inside & (w != 0.0)
    o = row // inner
    i = row % inner
    if LISTED:
        start = tl.zeros([M], tl.int64)
        for k in tl.static_range(len(places)):
            start = tl.where(l == k, places[k], start)
    else:
        start = l.to(tl.int64) * x_l
    x_row = x + start[:, None] + (o * x_o + i * x_i)[None, :]
    here = (l < learners)[:, None] & live[None, :]

    m = tl.full([M, R], float("-inf"), tl.float32)
    z = tl.zeros([M, R], tl.float32)
    for c0 in range(0, V, C):
        cols = c0 + tl.arange(0, C)
        mask = here[:, :, None] & (cols < V)[None, None, :]
        at = x_row[:, :, None] + cols.to(tl.int64)[None, None, :] * x_c
        s = tl.load(at, mask=mask, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        top = tl.maximum(m, tl.max(s, 2))
        ref = tl.where(top == float("-inf"), 0.0, top)
        z = z * tl.where(m == float("-inf"), 0.0, tl.exp((m - ref) * inv)) + tl.sum(
            tl.exp((s - ref[:, :, None]) * inv), 2
        )
        m = top
    m = tl.where(m == float("-inf"), 0.0, m)
    z = tl.where(here, z, 1.0)  # learners and rows that are padding have no mass
    log_z = tl.log(z)

    k = w * factor
    loss = tl.zeros([M, R], tl.float32)
    slot = l.to(tl.int64)[:, None] * rows + row[None, :]
    place = (l < learners)[:, None] & inside[None, :]
    if d is not None:
        up = 1.0
        if upstream is not None:
            up = tl.load(upstream + slot * per_row, mask=place, other=0.0)
        g_factor = k[None, :] * inv * up
        d_row = d + l.to(tl.int64)[:, None] * d_l + (o * d_o + i * d_i)[None, :]
    for c0 in range(0, V, C):
        cols = c0 + tl.arange(0, C)
        mask = here[:, :, None] & (cols < V)[None, None, :]
        at = x_row[:, :, None] + cols.to(tl.int64)[None, None, :] * x_c
        s = tl.load(at, mask=mask, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
        y = (s - m[:, :, None]) * inv
        a = y - log_z[:, :, None]
        p = tl.exp(y) / z[:, :, None]
        total = tl.sum(p, 0)
        if losses is not None:
            # Relative to the largest log-probability, so that terms are small where the learners agree.
            ref = tl.max(a, 0)
            a = a - ref[None, :, :]
            s_all = tl.sum(tl.where(p > 0.0, p * a, 0.0), 0)
            term = s_all[None, :, :] - total[None, :, :] * a
            loss += tl.sum(tl.where(total[None, :, :] == 0.0, 0.0, term), 2)
        if d is not None:
            g = g_factor[:, :, None] * (learners * p - total[None, :, :])
            to = d_row[:, :, None] + cols.to(tl.int64)[None, None, :] * d_c
            g = tl.where(live[None, :, None], g, 0.0)
            tl.store(to, cast(g, d.dtype.element_ty), mask=place[:, :, None] & (cols < V)[None, None, :],
                     eviction_policy="evict_first")  # fmt: skip
    if losses is not None:
        tl.store(losses + slot, tl.where(live[None, :], k[None, :] * loss, 0.0), mask=place)


def plan(learners: int, classes: int) -> dict[str, int]:
    """Tile and warps of a launch."""
    M = power(learners)
    C = min(power(classes), max(TILE // M, 32))
    R = max(TILE // (M * C) // 2, 1)
    return {"M": M, "R": R, "C": C, "num_warps": min(max(M * R * C // 256, 1), 16)}


def _run(parts: list[View], labels: Any, weight: Any, scalars: torch.Tensor, divisor: Any, losses: Any, upstream: Any,
         d: View | None, ignore_index: int) -> None:  # fmt: skip
    first = parts[0]
    x, listed = first.tensor, len(parts) > 1
    learners, outer, classes, inner = first.shape
    stride, places = first.stride, (0,)
    if listed:
        learners = len(parts)
        size = x.element_size()
        apart = [p.tensor.data_ptr() - x.data_ptr() for p in parts]
        if any(p.stride != first.stride for p in parts) or any(a % size for a in apart):
            x = torch.stack([p.materialise()[0] for p in parts])
            stride, listed = x.stride(), False
        else:
            places = tuple(a // size for a in apart)
    rows = outer * inner
    by_value = (1.0, 0.0) if scalars.device.type != "cpu" else tuple(scalars.tolist()[:2])
    tile = plan(learners, classes)
    with on(x.device):
        peer_kernel[(triton.cdiv(rows, tile["R"]),)](
            x, places, labels, weight, scalars if scalars.device.type != "cpu" else None, divisor, losses, upstream,
            d.tensor if d is not None else None, *by_value, learners, rows, inner, classes, *stride,
            *(d.stride if d is not None else (0, 0, 0, 0)), int(upstream is not None and upstream.numel() > 1),
            ignore_index, LISTED=listed, **tile,
        )  # fmt: skip


def forward(
    parts: list[View], labels: Any, weight: Any, scalars: torch.Tensor, divisor: Any, losses: Any, total: View, d: View | None,
    count: int, ignore_index: int,
) -> None:  # fmt: skip
    """The entry peer_divergence_forward. Arguments as in native.py, less the context."""
    rows = losses.shape[1]
    if rows == 0:
        total.tensor.zero_()
        return
    with on(losses.device):
        if count:
            count_kernel[(1,)](labels, weight, divisor, rows, ignore_index, B=BLOCK)
        _run(parts, labels, weight, scalars, divisor, losses, None, d, ignore_index)
        total_kernel[(1,)](losses, total.tensor, losses.numel(), B=BLOCK)


def backward(
    parts: list[View], labels: Any, weight: Any, scalars: torch.Tensor, divisor: Any, upstream: Any, d: View,
    ignore_index: int,
) -> None:  # fmt: skip
    """The entry peer_divergence_backward. Arguments as in native.py, less the context."""
    _run(parts, labels, weight, scalars, divisor, None, upstream, d, ignore_index)


def aot_signatures() -> list[dict]:
    """Representative compilations for kdkernels.bench.static."""

    def compiled(name: str, learners: int, classes: int, dtype: str, stored: bool) -> dict:
        tile = plan(learners, classes)
        types = dict.fromkeys(peer_kernel.arg_names, "i32")
        types |= {"x": f"*{dtype}", "d": f"*{dtype}", "divisor": "*fp32", "t": "fp32", "factor": "fp32"}
        types |= {"losses" if stored else "upstream": "*fp32"}
        constexprs: dict[str, Any] = {
            "LISTED": False,
            "M": tile["M"],
            "R": tile["R"],
            "C": tile["C"],
            "x_c": 1,
            "d_c": 1,
        }
        constexprs |= dict.fromkeys(("places", "labels", "weight", "scalars", "upstream" if stored else "losses"))
        types = {n: "constexpr" if n in constexprs else k for n, k in types.items()}
        loose = ("learners", "per_row", "ignore_index", "rows", "inner")
        return {
            "name": name, "kernel": peer_kernel, "signature": types, "constexprs": constexprs,
            "divisible": [n for n, k in types.items() if k not in ("constexpr", "fp32") and n not in loose],
            "num_warps": tile["num_warps"], "num_stages": 3,
        }  # fmt: skip

    return [
        compiled("4 peers of 1000", 4, 1000, "fp32", True),
        compiled("4 peers of 32000", 4, 32000, "bf16", True),
        compiled("16 peers of 32000", 16, 32000, "bf16", True),
        compiled("4 peers of 32000, backward", 4, 32000, "fp16", False),
    ]
