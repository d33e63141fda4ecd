"""The Triton kernels of the match of Gram matrices.

Products go through tl.dot: in float32 to the last bit ("ieee", whatever allow_tf32 says), of 16-bit features with tensor cores
and float32 sums.
"""

# ruff: noqa: SIM109 (Triton compiles no "in")

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.ops.gram_match.kinds import Normalize
from kdkernels.ops.gram_match.triton_terms import (
    LENGTHS,
    PROBABILITIES,
    ROWS,
    ROWS_L1,
    element_slope,
    element_value,
    outer_slope,
    outer_value,
)
from kdkernels.ops.triton_util import INTERPRETED, apart, long

SHIFTED, COLUMNS = tl.constexpr(Normalize.SHIFTED.value), tl.constexpr(Normalize.COLUMNS.value)


@triton.jit
def lengths_kernel(
    x, unit, through, samples, vectors, elements, sample, vector, element, eps,
    NORMALIZE: tl.constexpr, V: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Of V rows what multiplies them, and what their diagonal gets; of columns what divides them, and whether it counts."""
    at = tl.program_id(0).to(tl.int64) * V + tl.arange(0, V)
    live = at < long(samples) * vectors
    base = x + (at // vectors) * sample + (at % vectors) * vector
    square = tl.zeros([V], tl.float32)
    for e0 in range(0, elements, E):
        e = e0 + tl.arange(0, E)
        mask = live[:, None] & (e < elements)[None, :]
        v = tl.load(base[:, None] + e[None, :].to(tl.int64) * element, mask=mask, other=0.0).to(tl.float32)
        square += tl.sum(v * v, 1)
    length = tl.sqrt_rn(square)
    alive = square > 0.0
    free = alive & (length > eps)
    one = tl.zeros([V], tl.float32) + 1.0
    kept = tl.where(alive, length, 1.0)
    if NORMALIZE == COLUMNS:
        tl.store(unit + at, tl.where(alive, tl.maximum(length, eps), float("inf")), mask=live)
        tl.store(through + at, tl.where(free, 1.0, 0.0), mask=live)
    elif NORMALIZE == SHIFTED:
        scale = tl.div_rn(one, kept + eps)
        tl.store(unit + at, tl.where(alive, scale, 0.0), mask=live)
        tl.store(through + at, tl.where(alive, tl.div_rn(scale, kept), 0.0), mask=live)
    else:
        tl.store(unit + at, tl.where(alive, tl.div_rn(one, tl.maximum(kept, eps)), 0.0), mask=live)
        tl.store(through + at, tl.where(free, tl.div_rn(one, kept * kept), 0.0), mask=live)


@triton.jit
def product_kernel(
    x, y, lengths, out, samples, rows, columns, features, share, x_sample, x_row, x_column, y_sample, y_row, y_column,
    SYMMETRIC: tl.constexpr, T: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """One tile of one sample's matrix over one share of the features, and its mirror image."""
    right = tl.cdiv(columns, T)
    left = tl.cdiv(rows, T)
    tj = tl.program_id(0) % right
    ti = tl.program_id(0) // right % left
    b = (tl.program_id(0) // right // left).to(tl.int64)
    split = tl.program_id(1)
    if not SYMMETRIC or tj >= ti:
        i = ti * T + tl.arange(0, T)
        j = tj * T + tl.arange(0, T)
        at_x = x + b * x_sample + i[:, None].to(tl.int64) * x_row
        at_y = y + b * y_sample + j[None, :].to(tl.int64) * y_row
        total = tl.zeros([T, T], tl.float32)
        end = tl.minimum(features, (split + 1) * share)
        for f0 in range(split * share, end, F):
            f = f0 + tl.arange(0, F)
            inside = f < end
            u = tl.load(
                at_x + f[None, :].to(tl.int64) * x_column, mask=(i < rows)[:, None] & inside[None, :], other=0.0
            )
            v = tl.load(
                at_y + f[:, None].to(tl.int64) * y_column, mask=inside[:, None] & (j < columns)[None, :], other=0.0
            )
            if lengths is not None:
                length = tl.load(lengths + b * features + f, mask=inside, other=1.0)
                u = tl.div_rn(u.to(tl.float32), tl.broadcast_to(length[None, :], [T, F]))
                v = tl.div_rn(v.to(tl.float32), tl.broadcast_to(length[:, None], [F, T]))
            if u.dtype != v.dtype or INTERPRETED:  # the interpreter would multiply bfloat16's bits
                total += tl.dot(u.to(tl.float32), v.to(tl.float32), input_precision="ieee")
            else:
                total += tl.dot(u, v, input_precision="ieee")
        base = out + (split * samples + b) * long(rows) * columns
        mask = (i < rows)[:, None] & (j < columns)[None, :]
        tl.store(base + i[:, None].to(tl.int64) * columns + j[None, :], total, mask=mask)
        if SYMMETRIC and ti != tj:
            tl.store(base + j[None, :].to(tl.int64) * columns + i[:, None], total, mask=mask)


@triton.jit
def _row(gram, unit, factor, row, sample, columns, j, inside):
    """Elements j of a row, times their factors."""
    g = tl.load(gram + row * columns + j, mask=inside, other=0.0)
    if unit is not None:
        return factor * tl.load(unit + row) * tl.load(unit + sample + j, mask=inside, other=0.0) * g
    else:
        return factor * g


@triton.jit
def statistics_kernel(
    student, teacher, unit_s, unit_t, weights, sides, dots, values, samples, rows, columns, factor_s, factor_t, eps,
    gamma, decay, KIND: tl.constexpr, ORDER: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """A row's lengths and dots in either model, and its share of the loss."""
    row = tl.program_id(0).to(tl.int64)
    sample = row // rows * rows
    total = long(samples) * rows
    lane = tl.arange(0, B)
    sum_s = tl.zeros([B], tl.float32)
    sum_t = tl.zeros([B], tl.float32)
    if KIND == ROWS or KIND == ROWS_L1 or KIND == PROBABILITIES or KIND == LENGTHS:
        for j0 in range(0, columns, B):
            j = j0 + lane
            inside = j < columns
            s = _row(student, unit_s, factor_s, row, sample, columns, j, inside)
            t = _row(teacher, unit_t, factor_t, row, sample, columns, j, inside)
            if KIND == ROWS:
                sum_s += s * s
                sum_t += t * t
            elif KIND == ROWS_L1:
                sum_s += tl.abs(s)
                sum_t += tl.abs(t)
            elif KIND == PROBABILITIES:
                sum_s += tl.where(inside, 0.5 * s + 0.5, 0.0)
                sum_t += tl.where(inside, 0.5 * t + 0.5, 0.0)
            else:
                sum_s += apart(s, t) * apart(s, t)
                sum_t += apart(s, t) * apart(s, t)
    length_s = tl.sum(sum_s, 0)
    length_t = tl.sum(sum_t, 0)
    if KIND == ROWS or KIND == LENGTHS:
        length_s = tl.sqrt_rn(length_s)
        length_t = tl.sqrt_rn(length_t)
    floor = eps if KIND == ROWS or KIND == ROWS_L1 else 0.0
    free_s = length_s > floor
    free_t = length_t > floor
    alone = length_s
    length_s = tl.where(length_s > 0.0, tl.maximum(length_s, floor), float("inf"))
    length_t = tl.where(length_t > 0.0, tl.maximum(length_t, floor), float("inf"))
    by_s = tl.zeros([B], tl.float32) + length_s
    by_t = tl.zeros([B], tl.float32) + length_t
    value = tl.zeros([B], tl.float32)
    dot_s = tl.zeros([B], tl.float32)
    dot_t = tl.zeros([B], tl.float32)
    for k0 in range(0, columns, B):
        k = k0 + lane
        kept = k < columns
        c = _row(student, unit_s, factor_s, row, sample, columns, k, kept)
        d = _row(teacher, unit_t, factor_t, row, sample, columns, k, kept)
        v = element_value(c, by_s, d, by_t, eps, gamma, decay, KIND, ORDER)
        if weights is not None:
            v *= tl.load(weights + k, mask=kept, other=0.0)
        value += tl.where(kept, v, 0.0)
        if KIND == ROWS or KIND == ROWS_L1 or KIND == PROBABILITIES:
            h = outer_slope(c, by_s, d, by_t, eps, True, KIND) * outer_value(c, by_s, KIND)
            dot_s += tl.where(kept, h, 0.0)
            g = outer_slope(d, by_t, c, by_s, eps, False, KIND) * outer_value(d, by_t, KIND)
            dot_t += tl.where(kept, g, 0.0)
    share = alone if KIND == LENGTHS else tl.sum(value, 0)
    if weights is not None:
        share *= tl.load(weights + row % rows)
    tl.store(values + row, share)
    tl.store(sides + row, length_s)
    tl.store(sides + total + row, length_t)
    tl.store(dots + row, tl.where(free_s, tl.sum(dot_s, 0), 0.0))
    tl.store(dots + total + row, tl.where(free_t, tl.sum(dot_t, 0), 0.0))


@triton.jit
def loss_kernel(values, loss, count, scale, B: tl.constexpr):
    total = tl.zeros([B], tl.float64)
    for k0 in range(0, count, B):
        k = k0 + tl.arange(0, B)
        total += tl.load(values + k, mask=k < count, other=0.0).to(tl.float64)
    tl.store(loss, (tl.sum(total, 0) * scale).to(tl.float32))


@triton.jit
def _sides(side, dot, other_side, at, inside, WANTED: tl.constexpr):
    """Lengths and dots of these rows, and the other model's lengths."""
    if WANTED:
        return (
            tl.load(side + at, mask=inside, other=1.0),
            tl.load(dot + at, mask=inside, other=0.0),
            tl.load(other_side + at, mask=inside, other=1.0),
        )
    else:
        one = tl.where(inside, 1.0, 1.0)
        return one, one, one


@triton.jit
def _units(unit, other_unit, at, inside):
    if unit is not None:
        return tl.load(unit + at, mask=inside, other=0.0), tl.load(other_unit + at, mask=inside, other=0.0)
    else:
        one = tl.where(inside, 1.0, 1.0)
        return one, one


@triton.jit
def _weights(weights, at, inside):
    if weights is not None:
        return tl.load(weights + at, mask=inside, other=0.0)
    else:
        return tl.where(inside, 1.0, 1.0)


@triton.jit
def gradient_kernel(
    own, other, unit, other_unit, through, side, dot, other_side, weights, lengths, y, dx, rows, columns, first,
    out_rows, contracted, features, y_sample, y_row, y_column, dx_sample, dx_row, dx_column, factor, other_factor, scale,
    eps, gamma, decay, STUDENT: tl.constexpr, SYMMETRIC: tl.constexpr, TURNED: tl.constexpr, KIND: tl.constexpr,
    ORDER: tl.constexpr, T: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """T rows and T features of a gradient: the matrix made of the slopes, F of its columns at a time, times features."""
    across = tl.cdiv(features, T)
    down = tl.cdiv(out_rows, T)
    f = tl.program_id(0) % across * T + tl.arange(0, T)
    r = tl.program_id(0) // across % down * T + tl.arange(0, T)
    b = (tl.program_id(0) // across // down).to(tl.int64)
    live = r < out_rows
    i = b * rows + first + r
    total = tl.zeros([T, T], tl.float32)
    back = tl.zeros([T], tl.float32)
    BY_ROW: tl.constexpr = KIND == ROWS or KIND == ROWS_L1 or KIND == PROBABILITIES
    SIDES: tl.constexpr = BY_ROW or KIND == LENGTHS
    # What belongs to the outputs' rows, and below, to those that are summed over.
    side_i, dot_i, other_i = _sides(side, dot, other_side, i, live, SIDES and not TURNED)
    unit_i, other_unit_i = _units(unit, other_unit, i, live)
    weight_i = _weights(weights, first + r, live)
    for j0 in range(0, contracted, F):
        j = j0 + tl.arange(0, F)
        inside = j < contracted
        pair = live[:, None] & inside[None, :]
        if TURNED:
            at = (b * rows + j[None, :]) * columns + (first + r)[:, None]
        else:
            at = i[:, None] * columns + j[None, :]
        g = factor * tl.load(own + at, mask=pair, other=0.0)
        h = other_factor * tl.load(other + at, mask=pair, other=0.0)
        unit_j, other_unit_j = _units(unit, other_unit, b * rows + j, inside)
        side_j, dot_j, other_j = _sides(side, dot, other_side, b * rows + j, inside, SIDES and (SYMMETRIC or TURNED))
        by = unit_i[:, None] * unit_j[None, :]
        g *= by
        h *= other_unit_i[:, None] * other_unit_j[None, :]
        if TURNED:
            slope = element_slope(
                g, side_j[None, :], dot_j[None, :], h, other_j[None, :], eps, gamma, decay, STUDENT, KIND, ORDER
            )
        else:
            slope = element_slope(
                g, side_i[:, None], dot_i[:, None], h, other_i[:, None], eps, gamma, decay, STUDENT, KIND, ORDER
            )
        if SYMMETRIC:
            if BY_ROW:
                slope += element_slope(
                    g, side_j[None, :], dot_j[None, :], h, other_j[None, :], eps, gamma, decay, STUDENT, KIND, ORDER
                )
            else:
                slope *= 2.0
        slope *= weight_i[:, None] * _weights(weights, j, inside)[None, :]
        slope = tl.where(pair, slope, 0.0)
        back += tl.sum(slope * g, 1)
        v = tl.load(
            y + b * y_sample + j[:, None].to(tl.int64) * y_row + f[None, :].to(tl.int64) * y_column,
            mask=inside[:, None] & (f < features)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        if lengths is not None:
            length = tl.load(lengths + b * features + f, mask=f < features, other=1.0)
            v = tl.div_rn(v, tl.broadcast_to(length[None, :], [F, T]))
        total += tl.dot(scale * factor * by * slope, v, input_precision="ieee")
    mask = live[:, None] & (f < features)[None, :]
    if through is not None:
        x = tl.load(
            y + b * y_sample + (first + r)[:, None].to(tl.int64) * y_row + f[None, :].to(tl.int64) * y_column,
            mask=mask,
            other=0.0,
        ).to(tl.float32)
        total -= (scale * tl.load(through + i, mask=live, other=0.0) * back)[:, None] * x
    at_x = dx + b * dx_sample + r[:, None].to(tl.int64) * dx_row + f[None, :].to(tl.int64) * dx_column
    tl.store(at_x, total, mask=mask)


@triton.jit
def columns_kernel(
    x, lengths, through, dx, samples, rows, features, x_sample, x_row, x_column, dx_sample, dx_row, dx_column,
    V: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Gradients of V normalised columns become those of the columns, in place."""
    at = tl.program_id(0).to(tl.int64) * V + tl.arange(0, V)
    live = at < long(samples) * features
    length = tl.broadcast_to(tl.load(lengths + at, mask=live, other=1.0)[:, None], [V, E])
    from_x = x + (at // features) * x_sample + (at % features) * x_column
    to = dx + (at // features) * dx_sample + (at % features) * dx_column
    dot = tl.zeros([V], tl.float32)
    for r0 in range(0, rows, E):
        r = r0 + tl.arange(0, E)
        mask = live[:, None] & (r < rows)[None, :]
        v = tl.load(from_x[:, None] + r[None, :].to(tl.int64) * x_row, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(to[:, None] + r[None, :].to(tl.int64) * dx_row, mask=mask, other=0.0)
        dot += tl.sum(g * tl.div_rn(v, length), 1)
    dot *= tl.load(through + at, mask=live, other=0.0)
    for q0 in range(0, rows, E):
        q = q0 + tl.arange(0, E)
        kept = live[:, None] & (q < rows)[None, :]
        z = tl.load(from_x[:, None] + q[None, :].to(tl.int64) * x_row, mask=kept, other=0.0).to(tl.float32)
        place = to[:, None] + q[None, :].to(tl.int64) * dx_row
        h = tl.load(place, mask=kept, other=0.0)
        tl.store(place, tl.div_rn(h - dot[:, None] * tl.div_rn(z, length), length), mask=kept)
