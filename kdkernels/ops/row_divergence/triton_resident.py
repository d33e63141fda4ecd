"""The Triton kernel of rows that stay in registers, forward and backward. Tiles and pieces: triton_terms.py."""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.ops.row_divergence.triton_counts import count_rows
from kdkernels.ops.row_divergence.triton_terms import (
    ce_gradient,
    class_weights,
    cross_entropy,
    decoupled,
    factor,
    finite,
    inverse,
    load,
    load_row,
    load_scalars,
    log_odds,
    moments,
    no_class,
    plain_kind,
    public_sums,
    read,
    rest_gradient,
    store,
    sums,
    terms,
    times,
    without,
    write_row,
)


@triton.jit(do_not_specialize=["kind", "inputs", "ignore_index", "blocks", "count", "rows", "up"])
def resident_kernel(
    student, teacher, labels, weight, class_weight, scalars, divisors, losses, total, stats, upstream,
    ds, dt, temperature_grad, ts, tt, kd, ce, eps, p0, p1, inner, V, up,
    s_o, s_c, s_i, t_o, t_c, t_i, ds_o, ds_c, ds_i, dt_o, dt_c, dt_i,
    kind, inputs, ignore_index, blocks, count, rows,
    R: tl.constexpr, C: tl.constexpr, B: tl.constexpr, HARD: tl.constexpr, SIMPLE: tl.constexpr,
    OTHERS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of rows that stay in registers: each logit is read once.

    As a forward it has losses and stats to write. As a backward it has upstream instead, and takes nothing from the
    forward's statistics: sums made again from registers are free, and not rounded to one float in between.
    count: which divisors every program counts for itself (few rows). total: given where one program has all rows.
    """
    ts, tt, kd, ce, eps, p0, p1 = load_scalars(scalars, ts, tt, kd, ce, eps, p0, p1)
    pid = tl.program_id(0)
    o = (pid // blocks).to(tl.int64)
    i = ((pid % blocks) * R + tl.arange(0, R)).to(tl.int64)
    inside = i < inner
    row = o * inner + i
    y, cwy, w = load_row(row, inside, labels, weight, class_weight, V, ignore_index, HARD)
    live = inside & (w != 0.0)
    kind = plain_kind(kind, p0)
    if OTHERS:
        kind = 0
    plain = inputs == 0
    inv_s = inverse(ts, plain)
    inv_t = inverse(tt, plain)
    other_t = tl.where(inputs == 2, 0.0, float("-inf"))
    cols = tl.arange(0, C)
    here = inside[:, None] & (cols < V)[None, :]
    mask = read(inside, live, COLUMNS)[:, None] & (cols < V)[None, :]
    s = load(student + o * s_o + i * s_i, cols, s_c, mask, float("-inf"), "evict_first")
    t = load(teacher + o * t_o + i * t_i, cols, t_c, mask, other_t, "evict_first")

    own = cols[None, :] == y[:, None]
    m1 = finite(tl.max(s, 1))
    top_s = m1
    among = s
    if OTHERS:
        s_y = tl.sum(tl.where(own, s, 0.0), 1)
        t_y = tl.sum(tl.where(own, t, 0.0), 1)
        among = without(s, own)
        t = without(t, own)
        top_s = finite(tl.max(among, 1))
    m_s = tl.where(plain, top_s, 0.0)
    m_t = tl.where(plain, finite(tl.max(t, 1)), 0.0)
    a = (among - m_s[:, None]) * inv_s
    b = (t - m_t[:, None]) * inv_t
    ps = tl.exp(a)
    pt = tl.exp(b)
    if inputs == 2:
        b = tl.log(t)
        pt = t
    z_s = tl.where(plain, tl.sum(ps, 1), 1.0)
    z_t = tl.where(plain, tl.sum(pt, 1), 1.0)
    all_s = z_s
    all_t = z_t
    if OTHERS:
        z_s = no_class(z_s)
        z_t = no_class(z_t)
    lz_s = tl.log(z_s)
    lz_t = tl.log(z_t)
    a -= lz_s[:, None]
    b -= lz_t[:, None]
    ps *= (1.0 / z_s)[:, None]
    pt *= (1.0 / z_t)[:, None]
    CE = tl.zeros([R], tl.float32)
    total_cw = CE
    z1 = CE
    cw = class_weights(class_weight, cols, V)
    p1_ = ps
    if HARD:
        x = s - m1[:, None]
        p1_ = tl.exp(x)
        z1 = tl.sum(p1_, 1)
        p1_ *= (1.0 / z1)[:, None]
        lz1 = tl.log(z1)
        total_cw += tl.sum(cw, 0)
        x_y = tl.sum(tl.where(own, x, 0.0), 1)
        x_smooth = tl.sum(tl.where(mask, times(cw[None, :], x), 0.0), 1)
        CE = cross_entropy(lz1, x_y, x_smooth, total_cw, cwy, eps, V)
    f, gs, gt = terms(kind, a, b, ps, pt, p0, p1, tl.where(plain, 0.0, 1.0), SIMPLE)
    D = tl.sum(f, 1)
    G_s = tl.sum(gs, 1)
    G_t = tl.sum(gt, 1)

    kw = w
    cw_row = w
    if divisors is not None:
        d0 = tl.load(divisors)
        d1 = tl.load(divisors + 1)
        if count != 0:
            n0, n1 = count_rows(labels, weight, class_weight, 0, rows, B, V, ignore_index, B)
            d0 = tl.where((count & 1) != 0, n0, d0)
            d1 = tl.where((count & 2) != 0, n1, d1)
            if pid == 0:
                if (count & 1) != 0:
                    tl.store(divisors, n0)
                if (count & 2) != 0:
                    tl.store(divisors + 1, n1)
        kw *= factor(kd, d0)
        cw_row *= factor(ce, d1)
    else:
        kw *= kd
        cw_row *= ce
    g_s, g_t = sums(kind, inputs, D, G_s, G_t)
    if OTHERS:
        odds_s = log_odds(s_y, m_s, inv_s, all_s)
        odds_t = log_odds(t_y, m_t, inv_t, all_t)
        D, G_s, G_t, label_s, label_t, rest = decoupled(D, odds_s, odds_t, all_t, p0, p1)
        g_t = G_s
    if losses is not None:
        if not OTHERS:
            G_s, G_t = public_sums(kind, inputs, D, G_s, G_t)
        loss = write_row(row, inside, live, losses, stats, kw, cw_row, D, CE, m_s, m_t, all_s, all_t, z1, G_s, G_t)
        if total is not None:
            tl.store(total, tl.sum(loss, 0))
    else:
        u = tl.load(upstream + row * up, mask=live, other=0.0)
        kw *= u
        cw_row *= u
    if ds is not None or temperature_grad is not None:
        g = gs - ps * g_s[:, None]
        if OTHERS:
            g = rest_gradient(g, rest, label_s, ps, own)
            a = tl.where(own, odds_s[:, None], a)
        g = kw[:, None] * (g * inv_s)
        if temperature_grad is not None:
            m = moments(a, ps, g, mask)
            tl.store(temperature_grad + row * 2, tl.where(live & plain, times(m[2], m[1]) - m[0], 0.0), mask=inside)
    if ds is not None:
        if HARD:
            g += cw_row[:, None] * ce_gradient(p1_, cols, y, cwy, cw, total_cw, eps, V)
        store(ds + o * ds_o + i * ds_i, cols, ds_c, here, tl.where(live[:, None], g, 0.0))
    if dt is not None or temperature_grad is not None:
        h = gt - pt * g_t[:, None]
        if OTHERS:
            h = rest_gradient(h, rest, label_t, pt, own)
            b = tl.where(own, odds_t[:, None], b)
        h = kw[:, None] * (h * inv_t)
        if temperature_grad is not None:
            m = moments(b, pt, h, mask)
            tl.store(temperature_grad + row * 2 + 1, tl.where(live & plain, times(m[2], m[1]) - m[0], 0.0), mask=inside)
    if dt is not None:
        store(dt + o * dt_o + i * dt_i, cols, dt_c, here, tl.where(live[:, None], h, 0.0))
