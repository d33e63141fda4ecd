"""Triton kernels of DIST.

Rows, then columns cut into shares of rows, each share's sums in a fixed order, then rows again for the gradient. The
statistics are those of csrc/dist: eight floats a row, seven arrays over the columns. An optional argument that is None
is left out at compile time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.ops.triton_util import cast


@triton.jit
def _row_weight(row, inside, labels, weight, ignore_index):
    w = tl.where(inside, 1.0, 0.0)
    if weight is not None:
        w = tl.load(weight + row, mask=inside, other=0.0)
    if labels is not None:
        w = tl.where(tl.load(labels + row, mask=inside, other=0) == ignore_index, 0.0, w)
    return w


@triton.jit
def _pearson(xy, xx, yy, eps, clamp):
    """rho, and a, bx, by of its derivatives a y - bx x and a x - by y; all 0 where either is constant."""
    constant = (xx == 0.0) | (yy == 0.0)
    nx = tl.sqrt(tl.where(constant, 1.0, xx))
    ny = tl.sqrt(tl.where(constant, 1.0, yy))
    cx = tl.maximum(nx, eps)
    cy = tl.maximum(ny, eps)
    a = tl.where(clamp != 0, 1.0 / (cx * cy), 1.0 / (nx * ny + eps))
    rho = xy * a
    bx = tl.where(clamp != 0, rho / (cx * nx), rho * a * (ny / nx))
    by = tl.where(clamp != 0, rho / (cy * ny), rho * a * (nx / ny))
    zero = tl.where(constant, 0.0, 1.0)
    return rho * zero, a * zero, bx * zero, by * zero


@triton.jit
def _load(base, cols, stride, mask):
    at = base[:, None] + cols.to(tl.int64)[None, :] * stride
    return tl.load(at, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _probabilities(base, cols, stride, mask, ref, inv, inverse_z):
    return tl.exp((_load(base, cols, stride, mask) - ref[:, None]) * inv) * inverse_z[:, None]


@triton.jit
def count_kernel(labels, weight, sums, rows, V, ignore_index, B: tl.constexpr):
    """Sum of weights and number of the valid rows, and the first of these, in two parts that float32 holds.

    A label that is impossible makes the sum NaN, and with it everything.
    """
    total = tl.zeros([B], tl.float32)
    valid = tl.zeros([B], tl.float32)
    first = tl.full([B], 1 << 60, tl.int64)
    for r0 in range(0, rows, B):
        r = (r0 + tl.arange(0, B)).to(tl.int64)
        inside = r < rows
        w = _row_weight(r, inside, labels, weight, ignore_index)
        if labels is not None:
            y = tl.load(labels + r, mask=inside, other=0)
            wrong = inside & (w != 0.0) & ((y < 0) | (y >= V))
            total += tl.where(wrong, float("nan"), 0.0)
        total += w
        live = inside & (w != 0.0)
        valid += tl.where(live, 1.0, 0.0)
        first = tl.where(live & (r < first), r, first)
    n = tl.sum(valid, 0)
    at = tl.min(first, 0)
    at = tl.where(n == 0.0, 0, at)
    tl.store(sums, tl.sum(total, 0))
    tl.store(sums + 1, n)
    tl.store(sums + 4, (at // 4096).to(tl.float32))
    tl.store(sums + 5, (at % 4096).to(tl.float32))


@triton.jit
def _scalars(ptr, t, beta, gamma, eps):
    if ptr is not None:
        t = tl.load(ptr)
        beta = tl.load(ptr + 1)
        gamma = tl.load(ptr + 2)
        eps = tl.load(ptr + 3)
    return t, beta, gamma, eps


@triton.jit
def _online(x, m, z, inv):
    top = tl.maximum(m, tl.max(x, 1))
    ref = tl.where(top == float("-inf"), 0.0, top)
    z = z * tl.where(m == float("-inf"), 0.0, tl.exp((m - ref) * inv)) + tl.sum(tl.exp((x - ref[:, None]) * inv), 1)
    return top, z


@triton.jit
def row_kernel(
    s, t, labels, weight, scalars, stats, temperature, eps, rows, inner, V, s_o, s_c, s_i, t_o, t_c, t_i, clamp,
    ignore_index, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of R rows, and their moments around 1 / V, which is every row's mean."""
    temperature, _, _, eps = _scalars(scalars, temperature, eps, eps, eps)
    inv = 1.0 / temperature
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    inside = row < rows
    live = inside & (_row_weight(row, inside, labels, weight, ignore_index) != 0.0)
    s_row = s + (row // inner) * s_o + (row % inner) * s_i
    t_row = t + (row // inner) * t_o + (row % inner) * t_i
    ms = tl.full([R], float("-inf"), tl.float32)
    mt = ms
    zs = tl.zeros([R], tl.float32)
    zt = zs
    for c0 in range(0, V, C):
        cols = c0 + tl.arange(0, C)
        mask = live[:, None] & (cols < V)[None, :]
        ms, zs = _online(_load(s_row, cols, s_c, mask), ms, zs, inv)
        mt, zt = _online(_load(t_row, cols, t_c, mask), mt, zt, inv)
    ms = tl.where(ms == float("-inf"), 0.0, ms)
    mt = tl.where(mt == float("-inf"), 0.0, mt)
    zs = 1.0 / tl.where(live, zs, 1.0)
    zt = 1.0 / tl.where(live, zt, 1.0)
    xy = tl.zeros([R], tl.float32)
    xx = xy
    yy = xy
    mean = 1.0 / V
    for c0 in range(0, V, C):
        cols = c0 + tl.arange(0, C)
        mask = live[:, None] & (cols < V)[None, :]
        x = tl.where(mask, _probabilities(s_row, cols, s_c, mask, ms, inv, zs) - mean, 0.0)
        y = tl.where(mask, _probabilities(t_row, cols, t_c, mask, mt, inv, zt) - mean, 0.0)
        xy += tl.sum(x * y, 1)
        xx += tl.sum(x * x, 1)
        yy += tl.sum(y * y, 1)
    rho, a, bx, by = _pearson(xy, xx, yy, eps, clamp)
    at = stats + row * 8
    tl.store(at, ms, mask=inside)
    tl.store(at + 1, zs, mask=inside)
    tl.store(at + 2, mt, mask=inside)
    tl.store(at + 3, zt, mask=inside)
    tl.store(at + 4, a, mask=inside)
    tl.store(at + 5, bx, mask=inside)
    tl.store(at + 6, by, mask=inside)
    tl.store(at + 7, rho, mask=inside)


@triton.jit
def _shift(x, stats, sums, cols, V, x_o, x_c, x_i, inner, inv, SIDE: tl.constexpr):
    """The first valid row's probabilities: deviations from them are exactly 0 in a constant column."""
    row = tl.load(sums + 4).to(tl.int64) * 4096 + tl.load(sums + 5).to(tl.int64)
    at = x + (row // inner) * x_o + (row % inner) * x_i + cols.to(tl.int64) * x_c
    score = tl.load(at, mask=cols < V, other=float("-inf")).to(tl.float32)
    return tl.exp((score - tl.load(stats + row * 8 + 2 * SIDE)) * inv) * tl.load(stats + row * 8 + 2 * SIDE + 1)


@triton.jit
def _shares(scratch, which, cols, V, chunks, PARTS: tl.constexpr):
    """The sum over the shares of rows, in their order."""
    total = tl.zeros_like(cols).to(tl.float32)
    for k in range(chunks):
        at = scratch + (k * PARTS + which) * V + cols
        total += tl.load(at, mask=cols < V, other=0.0)
    return total


@triton.jit
def column_kernel(
    s, t, labels, weight, scalars, stats, columns, sums, scratch, moments, temperature, rows, inner, V,
    s_o, s_c, s_i, t_o, t_c, t_i, share, chunks, ignore_index, MEANS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One share of the rows of C columns: MEANS: the sums of p less the first valid row's; else the moments."""
    temperature, _, _, _ = _scalars(scalars, temperature, temperature, temperature, temperature)
    inv = 1.0 / temperature
    cols = tl.program_id(0) * C + tl.arange(0, C)
    chunk = tl.program_id(1)
    shift_s = _shift(s, stats, sums, cols, V, s_o, s_c, s_i, inner, inv, 0)
    shift_t = _shift(t, stats, sums, cols, V, t_o, t_c, t_i, inner, inv, 1)
    if not MEANS:
        n = tl.load(sums)
        delta_s = _shares(scratch, 0, cols, V, chunks, 2) / n
        delta_t = _shares(scratch, 1, cols, V, chunks, 2) / n
        if chunk == 0:
            tl.store(columns + cols, shift_s, mask=cols < V)
            tl.store(columns + V + cols, delta_s, mask=cols < V)
            tl.store(columns + 2 * V + cols, shift_t, mask=cols < V)
            tl.store(columns + 3 * V + cols, delta_t, mask=cols < V)
    u = tl.zeros([C], tl.float32)
    v = u
    q = u
    first = chunk.to(tl.int64) * share
    last = tl.minimum(first + share, rows)
    for r0 in range(first, last, R):
        row = r0 + tl.arange(0, R)
        inside = row < last
        w = _row_weight(row, inside, labels, weight, ignore_index)
        live = inside & (w != 0.0)
        mask = live[:, None] & (cols < V)[None, :]
        at = stats + row * 8
        ms = tl.load(at, mask=live, other=0.0)
        zs = tl.load(at + 1, mask=live, other=0.0)
        mt = tl.load(at + 2, mask=live, other=0.0)
        zt = tl.load(at + 3, mask=live, other=0.0)
        s_row = s + (row // inner) * s_o + (row % inner) * s_i
        t_row = t + (row // inner) * t_o + (row % inner) * t_i
        x = _probabilities(s_row, cols, s_c, mask, ms, inv, zs) - shift_s[None, :]
        y = _probabilities(t_row, cols, t_c, mask, mt, inv, zt) - shift_t[None, :]
        if MEANS:
            u += tl.sum(tl.where(mask, w[:, None] * x, 0.0), 0)
            v += tl.sum(tl.where(mask, w[:, None] * y, 0.0), 0)
        else:
            x = tl.where(mask, x - delta_s[None, :], 0.0)
            y = tl.where(mask, y - delta_t[None, :], 0.0)
            u += tl.sum(w[:, None] * x * y, 0)
            v += tl.sum(w[:, None] * x * x, 0)
            q += tl.sum(w[:, None] * y * y, 0)
    if MEANS:
        to = scratch + chunk * 2 * V + cols
    else:
        to = moments + chunk * 3 * V + cols
        tl.store(to + 2 * V, q, mask=cols < V)
    tl.store(to, u, mask=cols < V)
    tl.store(to + V, v, mask=cols < V)


@triton.jit
def finish_kernel(moments, columns, parts, scalars, eps, V, chunks, clamp, C: tl.constexpr):
    """Coefficients of C columns, and their sum of 1 - rho."""
    _, _, _, eps = _scalars(scalars, eps, eps, eps, eps)
    cols = tl.program_id(0) * C + tl.arange(0, C)
    xy = _shares(moments, 0, cols, V, chunks, 3)
    xx = _shares(moments, 1, cols, V, chunks, 3)
    yy = _shares(moments, 2, cols, V, chunks, 3)
    rho, a, bx, by = _pearson(xy, xx, yy, eps, clamp)
    tl.store(columns + 4 * V + cols, a, mask=cols < V)
    tl.store(columns + 5 * V + cols, bx, mask=cols < V)
    tl.store(columns + 6 * V + cols, by, mask=cols < V)
    tl.store(parts + tl.program_id(0), tl.sum(tl.where(cols < V, 1.0 - rho, 0.0), 0))


@triton.jit
def total_kernel(
    stats, labels, weight, scalars, sums, parts, total, beta, gamma, rows, V, blocks, ignore_index, B: tl.constexpr
):
    _, beta, gamma, _ = _scalars(scalars, beta, beta, gamma, gamma)
    acc = tl.zeros([B], tl.float32)
    for r0 in range(0, rows, B):
        r = (r0 + tl.arange(0, B)).to(tl.int64)
        w = _row_weight(r, r < rows, labels, weight, ignore_index)
        live = (r < rows) & (w != 0.0)
        acc += tl.where(live, w * (1.0 - tl.load(stats + r * 8 + 7, mask=live, other=0.0)), 0.0)
    n = tl.load(sums)
    by_row = tl.where(n == 0.0, 0.0, tl.sum(acc, 0) / tl.where(n == 0.0, 1.0, n))
    acc = tl.zeros([B], tl.float32)
    for k in range(0, blocks, B):
        at = k + tl.arange(0, B)
        acc += tl.load(parts + at, mask=at < blocks, other=0.0)
    by_column = tl.where(tl.load(sums + 1) > 1.0, tl.sum(acc, 0) / V, 0.0)
    tl.store(sums + 2, by_row)
    tl.store(sums + 3, by_column)
    tl.store(total, beta * by_row + gamma * by_column)


@triton.jit
def _pull(px, py, columns, cols, V, mask, mean, a, b, by_column, X: tl.constexpr, Y: tl.constexpr, B: tl.constexpr):
    """-d loss / d p of the side X. Columns are not looked at where they have no part in it."""
    some = tl.where(by_column, cols < V, False)
    shift_x = tl.load(columns + 2 * X * V + cols, mask=some, other=0.0)
    delta_x = tl.load(columns + (2 * X + 1) * V + cols, mask=some, other=0.0)
    shift_y = tl.load(columns + 2 * Y * V + cols, mask=some, other=0.0)
    delta_y = tl.load(columns + (2 * Y + 1) * V + cols, mask=some, other=0.0)
    ca = tl.load(columns + 4 * V + cols, mask=some, other=0.0)
    cb = tl.load(columns + B * V + cols, mask=some, other=0.0)
    x = (px - shift_x[None, :]) - delta_x[None, :]
    y = (py - shift_y[None, :]) - delta_y[None, :]
    return a[:, None] * (py - mean) - b[:, None] * (px - mean), ca[None, :] * y - cb[None, :] * x


@triton.jit
def gradient_kernel(
    s, t, labels, weight, scalars, stats, columns, sums, upstream, ds, dt, temperature, beta, gamma, rows, inner, V,
    s_o, s_c, s_i, t_o, t_c, t_i, ds_o, ds_c, ds_i, dt_o, dt_c, dt_i, ignore_index, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradients of R rows: a sweep for sum p g, another to write p (sum p g - g) / T."""
    temperature, beta, gamma, _ = _scalars(scalars, temperature, beta, gamma, gamma)
    inv = 1.0 / temperature
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    inside = row < rows
    w = _row_weight(row, inside, labels, weight, ignore_index)
    live = inside & (w != 0.0)
    n = tl.load(sums)
    by_column = tl.load(sums + 1) > 1.0
    up = tl.load(upstream) * w
    row_factor = up * beta / tl.where(n == 0.0, 1.0, n)
    column_factor = tl.where(by_column, up * gamma / V, 0.0)[:, None]
    at = stats + row * 8
    ms = tl.load(at, mask=live, other=0.0)
    zs = tl.load(at + 1, mask=live, other=0.0)
    mt = tl.load(at + 2, mask=live, other=0.0)
    zt = tl.load(at + 3, mask=live, other=0.0)
    a = row_factor * tl.load(at + 4, mask=live, other=0.0)
    bs = row_factor * tl.load(at + 5, mask=live, other=0.0)
    bt = row_factor * tl.load(at + 6, mask=live, other=0.0)
    o = row // inner
    i = row % inner
    s_row = s + o * s_o + i * s_i
    t_row = t + o * t_o + i * t_i
    mean = 1.0 / V
    dot_s = tl.zeros([R], tl.float32)
    dot_t = dot_s
    for c0 in range(0, V, C):
        cols = c0 + tl.arange(0, C)
        mask = live[:, None] & (cols < V)[None, :]
        ps = _probabilities(s_row, cols, s_c, mask, ms, inv, zs)
        pt = _probabilities(t_row, cols, t_c, mask, mt, inv, zt)
        if ds is not None:
            r, c = _pull(ps, pt, columns, cols, V, mask, mean, a, bs, by_column, 0, 1, 5)
            dot_s += tl.sum(tl.where(mask, ps * (r + column_factor * c), 0.0), 1)
        if dt is not None:
            r, c = _pull(pt, ps, columns, cols, V, mask, mean, a, bt, by_column, 1, 0, 6)
            dot_t += tl.sum(tl.where(mask, pt * (r + column_factor * c), 0.0), 1)
    for c0 in range(0, V, C):
        cols = c0 + tl.arange(0, C)
        mask = live[:, None] & (cols < V)[None, :]
        here = inside[:, None] & (cols < V)[None, :]
        ps = _probabilities(s_row, cols, s_c, mask, ms, inv, zs)
        pt = _probabilities(t_row, cols, t_c, mask, mt, inv, zt)
        if ds is not None:
            r, c = _pull(ps, pt, columns, cols, V, mask, mean, a, bs, by_column, 0, 1, 5)
            g = tl.where(live[:, None], inv * ps * (dot_s[:, None] - (r + column_factor * c)), 0.0)
            to = (ds + o * ds_o + i * ds_i)[:, None] + cols.to(tl.int64)[None, :] * ds_c
            tl.store(to, cast(g, ds.dtype.element_ty), mask=here)
        if dt is not None:
            r, c = _pull(pt, ps, columns, cols, V, mask, mean, a, bt, by_column, 1, 0, 6)
            g = tl.where(live[:, None], inv * pt * (dot_t[:, None] - (r + column_factor * c)), 0.0)
            to = (dt + o * dt_o + i * dt_i)[:, None] + cols.to(tl.int64)[None, :] * dt_c
            tl.store(to, cast(g, dt.dtype.element_ty), mask=here)
