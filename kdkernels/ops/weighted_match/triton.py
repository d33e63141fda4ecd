"""Triton kernels of weighted_match, and their launchers: the entries of csrc/weighted_match, by name.

A program takes one tile of a map, ROWS x LANES elements at a time, and writes its own share of each sum.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

from kdkernels.ops.triton_util import cast

TILE_ROWS, MOST_LANES, ELEMENTS = 64, 512, 2048  # of a tile, and of what a program holds at a time
SQUARED, ABSOLUTE, SMOOTH_L1 = 0, 1, 2


def tile(lanes: int) -> tuple[int, int]:
    """Rows and lanes of a tile, of a map with this many lanes."""
    return TILE_ROWS, min(MOST_LANES, max(16, triton.next_power_of_2(lanes)))


@triton.jit
def _tile(height, width, tile_rows, LANES: tl.constexpr):
    """This program's place: its piece of the rows and of the lanes, image, first row, end of its rows, lanes."""
    across = tl.cdiv(width, LANES)
    down = tl.cdiv(height, tile_rows)
    i = tl.program_id(0)
    lane_piece = i % across
    row_piece = (i // across) % down
    b = (i // (across * down)).to(tl.int64)
    row = row_piece * tile_rows
    lane = lane_piece * LANES + tl.arange(0, LANES)
    return lane_piece, row_piece, b, row, tl.minimum(row + tile_rows, height), lane


@triton.jit
def _load(x, b, r, lane, inside, by_batch, by_row):
    at = b * by_batch + r[:, None].to(tl.int64) * by_row + lane[None, :]
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _share(out, piece, field, fields, b, batch, kept):
    """Where a tile's share of a field begins."""
    return out + ((piece.to(tl.int64) * fields + field) * batch + b) * kept


@triton.jit
def _sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x * 0.0))


@triton.jit
def _any_power(a, p):
    # In float64: in float32 p log(a) would lose digits.
    return tl.where(a > 0.0, tl.exp(p * tl.log(tl.where(a > 0.0, a, 1.0).to(tl.float64))), 0.0).to(
        tl.float32
    ) + tl.where(a == a, 0.0, a)


@triton.jit
def _power(x, p, EXPONENT: tl.constexpr, ODD: tl.constexpr):
    a = x if ODD else tl.abs(x)
    if EXPONENT == 1:
        y = a
    elif EXPONENT == 2:
        y = x * x
    elif EXPONENT == 3:
        y = a * (x * x)
    elif EXPONENT == 4:
        y = (x * x) * (x * x)
    else:
        y = _any_power(tl.abs(x), p)
        if ODD:
            y = tl.where(x < 0.0, -y, y)
    return y


@triton.jit
def _power_slope(x, p, EXPONENT: tl.constexpr, ODD: tl.constexpr):
    if EXPONENT == 1:
        y = x * 0.0 + 1.0 if ODD else _sign(x)
    elif EXPONENT == 2:
        y = 2.0 * x
    elif EXPONENT == 3:
        y = 3.0 * (x if ODD else tl.abs(x)) * x
    elif EXPONENT == 4:
        y = 4.0 * x * (x * x)
    else:
        y = p * _any_power(tl.abs(x), p - 1.0)
        if not ODD:
            y = tl.where(x < 0.0, -y, y)
    return y


@triton.jit
def _weights(weight, at, mask, SIZE: tl.constexpr):
    """Weights from an optional tensor: 1 where there is none."""
    # One return: the compiler goes on behind another.
    if weight is None:
        weights = tl.full([SIZE], 1.0, tl.float32)
    else:
        weights = tl.load(weight + at, mask=mask, other=0.0)
    return weights


@triton.jit
def power_sums_kernel(
    x, row_weight, lane_weight, rows, lanes, batch, height, width, by_batch, by_row, tile_rows, p,
    EXPONENT: tl.constexpr, ODD: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane_piece, row_piece, b, row, end, lane = _tile(height, width, tile_rows, LANES)
    of_lane = _weights(lane_weight, b * width + lane, lane < width, LANES)
    total = tl.zeros([LANES], tl.float32)
    for r0 in range(row, end, ROWS):
        r = r0 + tl.arange(0, ROWS)
        inside = (r < end)[:, None] & (lane < width)[None, :]
        y = tl.where(inside, _power(_load(x, b, r, lane, inside, by_batch, by_row), p, EXPONENT, ODD), 0.0)
        if rows is not None:
            sums = tl.sum(y * of_lane[None, :], 1)
            tl.store(_share(rows, lane_piece, 0, 1, b, batch, height) + r, sums, mask=r < end)
        if lanes is not None:
            total += tl.sum(y * _weights(row_weight, b * height + r, r < end, ROWS)[:, None], 0)
    if lanes is not None:
        tl.store(_share(lanes, row_piece, 0, 1, b, batch, width) + lane, total, mask=lane < width)


@triton.jit
def power_gradient_kernel(
    x, row_weight, lane_weight, rows, lanes, dx, height, width, by_batch, by_row, tile_rows, p,
    EXPONENT: tl.constexpr, ODD: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    _lane_piece, _row_piece, b, row, end, lane = _tile(height, width, tile_rows, LANES)
    of_lane = _weights(lane_weight, b * width + lane, lane < width, LANES)
    own = tl.zeros([LANES], tl.float32)
    if lanes is not None:
        own = tl.load(lanes + b * width + lane, mask=lane < width, other=0.0)
    for r0 in range(row, end, ROWS):
        r = r0 + tl.arange(0, ROWS)
        inside = (r < end)[:, None] & (lane < width)[None, :]
        g = own[None, :] * _weights(row_weight, b * height + r, r < end, ROWS)[:, None]
        if rows is not None:
            g += tl.load(rows + b * height + r, mask=r < end, other=0.0)[:, None] * of_lane[None, :]
        g *= _power_slope(_load(x, b, r, lane, inside, by_batch, by_row), p, EXPONENT, ODD)
        at = (b * height + r[:, None]) * width + lane[None, :]
        tl.store(dx + at, cast(g, dx.dtype.element_ty), mask=inside)


@triton.jit
def match_kernel(
    s, t, row_weight, lane_weight, row_offset, lane_offset, upstream, rows, lanes, ds, dt, batch, height, width,
    s_batch, s_row, t_batch, t_row, tile_rows, beta, factor, MEASURE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane_piece, row_piece, b, row, end, lane = _tile(height, width, tile_rows, LANES)
    known = lane < width
    weight = tl.full([LANES], 1.0, tl.float32)
    offset = tl.zeros([LANES], tl.float32)
    if lane_weight is not None:
        weight = tl.load(lane_weight + b * width + lane, mask=known, other=0.0)
    if lane_offset is not None:
        offset = tl.load(lane_offset + b * width + lane, mask=known, other=0.0)
    scale = factor
    if upstream is not None:
        scale *= tl.load(upstream)
    values = tl.zeros([LANES], tl.float32)
    slopes = tl.zeros([LANES], tl.float32)
    for r0 in range(row, end, ROWS):
        r = r0 + tl.arange(0, ROWS)
        inside = (r < end)[:, None] & known[None, :]
        d = _load(s, b, r, lane, inside, s_batch, s_row) - _load(t, b, r, lane, inside, t_batch, t_row)
        d += offset[None, :]
        by_row = tl.full([ROWS], 1.0, tl.float32)
        if row_offset is not None:
            d += tl.load(row_offset + b * height + r, mask=r < end, other=0.0)[:, None]
        if row_weight is not None:
            by_row = tl.load(row_weight + b * height + r, mask=r < end, other=0.0)
        if MEASURE == 0:
            value = d * d
            slope = 2.0 * d
        elif MEASURE == 1:
            value = tl.abs(d)
            slope = _sign(d)
        else:
            slope = tl.where(d < -beta, -1.0, tl.where(d > beta, 1.0, d / beta))
            value = slope * (d - 0.5 * beta * slope)
        value = tl.where(inside, value, 0.0)
        slope = tl.where(inside, slope, 0.0)
        if rows is not None:
            at = _share(rows, lane_piece, 0, 2, b, batch, height) + r
            tl.store(at, tl.sum(value * weight[None, :], 1), mask=r < end)
            at = _share(rows, lane_piece, 1, 2, b, batch, height) + r
            tl.store(at, tl.sum(slope * weight[None, :], 1), mask=r < end)
        if lanes is not None:
            values += tl.sum(value * by_row[:, None], 0)
            slopes += tl.sum(slope * by_row[:, None], 0)
        g = (by_row * scale)[:, None] * (slope * weight[None, :])
        out = (b * height + r[:, None]) * width + lane[None, :]
        if ds is not None:
            tl.store(ds + out, cast(g, ds.dtype.element_ty), mask=inside)
        if dt is not None:
            tl.store(dt + out, cast(-g, dt.dtype.element_ty), mask=inside)
    if lanes is not None:
        tl.store(_share(lanes, row_piece, 0, 2, b, batch, width) + lane, values, mask=known)
        tl.store(_share(lanes, row_piece, 1, 2, b, batch, width) + lane, slopes, mask=known)


@triton.jit
def moments_kernel(
    s, t, rows, lanes, batch, height, width, s_batch, s_row, t_batch, t_row, tile_rows, ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Sums of s, t, s^2, t^2 and s t in float64."""
    lane_piece, row_piece, b, row, end, lane = _tile(height, width, tile_rows, LANES)
    sum_x = tl.zeros([LANES], tl.float64)
    sum_y = tl.zeros([LANES], tl.float64)
    sum_xx = tl.zeros([LANES], tl.float64)
    sum_yy = tl.zeros([LANES], tl.float64)
    sum_xy = tl.zeros([LANES], tl.float64)
    for r0 in range(row, end, ROWS):
        r = r0 + tl.arange(0, ROWS)
        inside = (r < end)[:, None] & (lane < width)[None, :]
        x = _load(s, b, r, lane, inside, s_batch, s_row).to(tl.float64)
        y = _load(t, b, r, lane, inside, t_batch, t_row).to(tl.float64)
        if rows is not None:
            at = _share(rows, lane_piece, 0, 5, b, batch, height) + r
            field = batch.to(tl.int64) * height
            tl.store(at, tl.sum(x, 1), mask=r < end)
            tl.store(at + field, tl.sum(y, 1), mask=r < end)
            tl.store(at + 2 * field, tl.sum(x * x, 1), mask=r < end)
            tl.store(at + 3 * field, tl.sum(y * y, 1), mask=r < end)
            tl.store(at + 4 * field, tl.sum(x * y, 1), mask=r < end)
        if lanes is not None:
            sum_x += tl.sum(x, 0)
            sum_y += tl.sum(y, 0)
            sum_xx += tl.sum(x * x, 0)
            sum_yy += tl.sum(y * y, 0)
            sum_xy += tl.sum(x * y, 0)
    if lanes is not None:
        to = _share(lanes, row_piece, 0, 5, b, batch, width) + lane
        step = batch.to(tl.int64) * width
        tl.store(to, sum_x, mask=lane < width)
        tl.store(to + step, sum_y, mask=lane < width)
        tl.store(to + 2 * step, sum_xx, mask=lane < width)
        tl.store(to + 3 * step, sum_yy, mask=lane < width)
        tl.store(to + 4 * step, sum_xy, mask=lane < width)


@triton.jit
def moments_gradient_kernel(
    x, y, upstream, dx, first, batch, height, width, x_batch, x_row, y_batch, y_row, tile_rows, OF_LANES: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dx = g + 2 gxx x + gxy y; `first` is the field of x's sum: 0 for the student, 1 for the teacher."""
    _lane_piece, _row_piece, b, row, end, lane = _tile(height, width, tile_rows, LANES)
    for r0 in range(row, end, ROWS):
        r = r0 + tl.arange(0, ROWS)
        inside = (r < end)[:, None] & (lane < width)[None, :]
        a = _load(x, b, r, lane, inside, x_batch, x_row).to(tl.float64)
        c = _load(y, b, r, lane, inside, y_batch, y_row).to(tl.float64)
        if OF_LANES:
            field = batch.to(tl.int64) * width
            at = (upstream + b * width + lane)[None, :]
            mask = (lane < width)[None, :]
        else:
            field = batch.to(tl.int64) * height
            at = (upstream + b * height + r)[:, None]
            mask = (r < end)[:, None]
        g = tl.load(at + first * field, mask=mask, other=0.0)
        gxx = tl.load(at + (first + 2) * field, mask=mask, other=0.0)
        gxy = tl.load(at + 4 * field, mask=mask, other=0.0)
        made = (g + 2.0 * gxx * a + gxy * c).to(tl.float32)
        out = (b * height + r[:, None]) * width + lane[None, :]
        tl.store(dx + out, cast(made, dx.dtype.element_ty), mask=inside)


# ---- launchers ----


def _on(x: torch.Tensor) -> Any:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def _grid(x: torch.Tensor, tile_rows: int, tile_lanes: int) -> tuple[tuple[int], dict[str, int]]:
    batch, height, width = x.shape
    programs = batch * triton.cdiv(height, tile_rows) * triton.cdiv(width, tile_lanes)
    return (programs,), {"ROWS": max(1, ELEMENTS // tile_lanes), "LANES": tile_lanes, "num_warps": 4}


def feature_power_sums(x, row_weight, lane_weight, scalars, rows, lanes, exponent, odd, tile_rows, tile_lanes):
    grid, options = _grid(x, tile_rows, tile_lanes)
    p, _ = scalars.tolist()
    power_sums_kernel[grid](
        x, row_weight, lane_weight, rows, lanes, *x.shape, *x.stride()[:2], tile_rows, p, exponent, odd != 0, **options
    )


def feature_power_gradient(
    x, row_weight, lane_weight, scalars, rows, lanes, dx, exponent, odd, tile_rows, tile_lanes
):  # fmt: skip
    grid, options = _grid(x, tile_rows, tile_lanes)
    p, _ = scalars.tolist()
    power_gradient_kernel[grid](
        x, row_weight, lane_weight, rows, lanes, dx, *x.shape[1:], *x.stride()[:2], tile_rows, p, exponent, odd != 0,
        **options,
    )  # fmt: skip


def feature_match(
    s, t, row_weight, lane_weight, row_offset, lane_offset, scalars, upstream, rows, lanes, ds, dt, measure, tile_rows,
    tile_lanes,
):  # fmt: skip
    grid, options = _grid(s, tile_rows, tile_lanes)
    beta, factor = scalars.tolist()
    match_kernel[grid](
        s, t, row_weight, lane_weight, row_offset, lane_offset, upstream, rows, lanes, ds, dt, *s.shape,
        *s.stride()[:2], *t.stride()[:2], tile_rows, beta, factor, measure, **options,
    )  # fmt: skip


def feature_moments(s, t, rows, lanes, tile_rows, tile_lanes):
    grid, options = _grid(s, tile_rows, tile_lanes)
    moments_kernel[grid](s, t, rows, lanes, *s.shape, *s.stride()[:2], *t.stride()[:2], tile_rows, **options)


def feature_moments_gradient(s, t, upstream, ds, dt, of_lanes, tile_rows, tile_lanes):
    grid, options = _grid(s, tile_rows, tile_lanes)
    for first, (x, y, dx) in enumerate(((s, t, ds), (t, s, dt))):
        if dx is not None:
            moments_gradient_kernel[grid](
                x, y, upstream, dx, first, *s.shape, *x.stride()[:2], *y.stride()[:2], tile_rows, of_lanes != 0,
                **options,
            )  # fmt: skip


def call(backend: str, name: str, x: torch.Tensor, *args: Any) -> None:
    """The entry of this name; the arguments are op.py's."""
    with _on(x):
        globals()[name](x, *args)


def aot_signatures() -> list[dict]:
    """Representative compilations for kdkernels.bench.static."""
    options = {"ROWS": ELEMENTS // MOST_LANES, "LANES": MOST_LANES}
    floats = ("p", "beta", "factor")
    rows = []
    for x in ("fp32", "bf16"):
        pointers = dict.fromkeys(("x", "y", "s", "t", "dx", "ds"), f"*{x}")
        small = {"rows": "*fp32", "lanes": "*fp32"}
        none = dict.fromkeys(("row_weight", "lane_weight", "row_offset", "lane_offset", "upstream", "dt"))
        double = {"rows": "*fp64", "lanes": None, "upstream": "*fp64"}
        for name, kernel, own, constexprs in (
            ("sums of squares", power_sums_kernel, {**none, **small, "rows": None}, {"EXPONENT": 2, "ODD": False}),
            ("their gradient", power_gradient_kernel, {**none, **small, "rows": None}, {"EXPONENT": 2, "ODD": False}),
            ("match", match_kernel, {**small, **none, "lanes": None}, {"MEASURE": SQUARED}),
            ("weighted match", match_kernel, {**small, **none, "row_weight": "*fp32", "lane_weight": "*fp32",
             "lanes": None}, {"MEASURE": SQUARED}),
            ("moments", moments_kernel, double, {}),
            ("their gradient", moments_gradient_kernel, double, {"OF_LANES": False}),
        ):  # fmt: skip
            given = {n: t for n, t in {**pointers, **own}.items() if n in kernel.arg_names}
            constexpr = {**constexprs, **options, **{n: None for n, t in given.items() if t is None}}
            types = {n: given.get(n) or ("fp32" if n in floats else "i32") for n in kernel.arg_names}
            types |= dict.fromkeys(constexpr, "constexpr")
            rows.append({
                "name": f"{name}, {x}", "kernel": kernel, "signature": types, "constexprs": constexpr,
                "divisible": [n for n, t in types.items() if t.startswith("*") or n in DIVISIBLE],
                "num_warps": 4, "num_stages": 3,
            })  # fmt: skip
    return rows


DIVISIBLE = ("height", "width", "by_batch", "by_row", "s_batch", "s_row", "t_batch", "t_row", "x_batch", "x_row",
             "y_batch", "y_row")  # fmt: skip
