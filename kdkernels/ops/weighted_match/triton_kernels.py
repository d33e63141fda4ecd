"""Triton kernels of weighted differences, attentions and moments; triton.py launches them.

A program takes one tile of a map, ROWS x LANES elements at a time, and writes its own share of each sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.ops.triton_util import cast


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
    s, t, row_weight, lane_weight, row_offset, lane_offset, row_magnitude, lane_magnitude, upstream, each, rows, lanes, ds, dt,
    batch, height, width, s_batch, s_row, t_batch, t_row, tile_rows, beta, factor, MEASURE: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr,
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
    total = tl.zeros([ROWS], tl.float64)
    values = tl.zeros([LANES], tl.float32)
    slopes = tl.zeros([LANES], tl.float32)
    for r0 in range(row, end, ROWS):
        r = r0 + tl.arange(0, ROWS)
        inside = (r < end)[:, None] & known[None, :]
        x = _load(s, b, r, lane, inside, s_batch, s_row)
        d = x - _load(t, b, r, lane, inside, t_batch, t_row)
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
        of_row = tl.sum(value * weight[None, :], 1)
        total += (of_row * by_row).to(tl.float64)
        if rows is not None:
            tl.store(_share(rows, lane_piece, 0, 2, b, batch, height) + r, of_row, mask=r < end)
            at = _share(rows, lane_piece, 1, 2, b, batch, height) + r
            tl.store(at, tl.sum(slope * weight[None, :], 1), mask=r < end)
        if lanes is not None:
            values += tl.sum(value * by_row[:, None], 0)
            slopes += tl.sum(slope * by_row[:, None], 0)
        g = (by_row * scale)[:, None] * (slope * weight[None, :])
        if row_magnitude is not None:  # what |s| itself counts
            own = tl.load(row_magnitude + b * height + r, mask=r < end, other=0.0)[:, None]
            g += (own + tl.load(lane_magnitude + b * width + lane, mask=known, other=0.0)[None, :]) * _sign(x)
        out = (b * height + r[:, None]) * width + lane[None, :]
        if ds is not None:
            tl.store(ds + out, cast(g, ds.dtype.element_ty), mask=inside)
        if dt is not None:
            tl.store(dt + out, cast(-g, dt.dtype.element_ty), mask=inside)
    tl.store(each + tl.program_id(0), tl.sum(total, 0))
    if lanes is not None:
        tl.store(_share(lanes, row_piece, 0, 2, b, batch, width) + lane, values, mask=known)
        tl.store(_share(lanes, row_piece, 1, 2, b, batch, width) + lane, slopes, mask=known)


@triton.jit
def _attend(x, b, at, kept, inverse):
    return tl.load(x + b * kept + at, mask=at < kept, other=0.0).to(tl.float64) * inverse


@triton.jit
def _double(n):
    return tl.full((), 0.0, tl.float64) + n


@triton.jit
def _norm(squares, over, eps, MEAN: tl.constexpr, ADD_EPS: tl.constexpr):
    """One over an attention's norm, and how much of the gradient along it the norm takes away; 0 where there is none."""
    share = 1.0 / _double(over) if MEAN else _double(1.0)
    norm = tl.sqrt(squares) * share
    least = _double(eps)
    if ADD_EPS:
        divisor = norm + least
        bend = divisor / tl.where(norm == 0.0, 1.0, norm)
    else:
        divisor = tl.where(norm <= least, least, norm)
        bend = tl.where(norm <= least, 0.0, 1.0)
    return tl.where(norm == 0.0, 0.0, share / tl.where(norm == 0.0, 1.0, divisor)), bend


@triton.jit(do_not_specialize=["batch", "kept", "over_s", "over_t"])
def compare_kernel(
    s, t, each, batch, kept, over_s, over_t, eps, MEAN: tl.constexpr, SQUARED: tl.constexpr, ADD_EPS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """The loss of one image from its sums of powers, which become the gradients by them; all in float64."""
    b = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    squares_s = tl.zeros([LANES], tl.float64)
    squares_t = tl.zeros([LANES], tl.float64)
    for first in range(0, kept, LANES):
        u = _attend(s, b, first + lanes, kept, 1.0)
        v = _attend(t, b, first + lanes, kept, 1.0)
        squares_s += u * u
        squares_t += v * v
    inverse_s, bend_s = _norm(tl.sum(squares_s, 0), over_s, eps, MEAN, ADD_EPS)
    inverse_t, bend_t = _norm(tl.sum(squares_t, 0), over_t, eps, MEAN, ADD_EPS)
    squares = tl.zeros([LANES], tl.float64)
    along_s = tl.zeros([LANES], tl.float64)
    along_t = tl.zeros([LANES], tl.float64)
    for first in range(0, kept, LANES):
        u = _attend(s, b, first + lanes, kept, inverse_s)
        v = _attend(t, b, first + lanes, kept, inverse_t)
        squares += (u - v) * (u - v)
        along_s += (u - v) * u
        along_t += (u - v) * v
    value = tl.sum(squares, 0)
    by_s = tl.sum(along_s, 0) * bend_s
    by_t = tl.sum(along_t, 0) * bend_t
    if SQUARED:
        scale = 1.0 / (_double(batch) * kept)
        slope = 2.0 * scale
    else:
        value = tl.sqrt(value)
        scale = 1.0 / _double(batch)
        slope = tl.where(value == 0.0, 0.0, scale / tl.where(value == 0.0, 1.0, value))
    tl.store(each + b, value * scale)
    for first in range(0, kept, LANES):
        at = first + lanes
        u = _attend(s, b, at, kept, inverse_s)
        v = _attend(t, b, at, kept, inverse_t)
        ds = inverse_s * slope * (u - v - by_s * u)
        dt = inverse_t * slope * (by_t * v - u + v)
        tl.store(s + b * kept + at, ds.to(tl.float32), mask=at < kept)
        tl.store(t + b * kept + at, dt.to(tl.float32), mask=at < kept)


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
            field = (b * 0 + batch) * height
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
        step = (b * 0 + batch) * width
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
            field = (b * 0 + batch) * width
            at = (upstream + b * width + lane)[None, :]
            mask = (lane < width)[None, :]
        else:
            field = (b * 0 + batch) * height
            at = (upstream + b * height + r)[:, None]
            mask = (r < end)[:, None]
        g = tl.load(at + first * field, mask=mask, other=0.0)
        gxx = tl.load(at + (first + 2) * field, mask=mask, other=0.0)
        gxy = tl.load(at + 4 * field, mask=mask, other=0.0)
        made = (g + 2.0 * gxx * a + gxy * c).to(tl.float32)
        out = (b * height + r[:, None]) * width + lane[None, :]
        tl.store(dx + out, cast(made, dx.dtype.element_ty), mask=inside)
