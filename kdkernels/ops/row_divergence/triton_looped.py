"""Triton kernels of rows that do not stay on chip: sweeps over tiles of classes. Tiles and pieces: triton_terms.py."""

from __future__ import annotations

import triton
import triton.language as tl

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
    log_probs,
    moments,
    no_class,
    plain_kind,
    public_sums,
    read,
    rest_gradient,
    store,
    sums,
    teacher_probs,
    terms,
    times,
    without,
    write_row,
)


@triton.jit
def _gradient_sweep(
    s_row, t_row, ds_row, dt_row, s_c, t_c, ds_c, dt_c, V, inside, live, y, cwy, class_weight, total_cw, kw, cw_row,
    m_s, lz_s, m_t, lz_t, m1, lz1, G_s, G_t, ts, tt, eps, p0, p1, kind, inputs, other_t,
    odds_s, odds_t, label_s, label_t, rest,
    R: tl.constexpr, C: tl.constexpr, HARD: tl.constexpr, SIMPLE: tl.constexpr, OTHERS: tl.constexpr,
    COLUMNS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """The last sweep: gradients of a tile of rows from the sums. SUMS makes temperature gradients.

    odds_s to rest: of a decoupled KL (OTHERS), from `decoupled`.
    """
    plain = inputs == 0
    inv_s = inverse(ts, plain)
    inv_t = inverse(tt, plain)
    one = tl.where(plain, 0.0, 1.0)
    sum_s = tl.zeros([R], tl.float32)
    sum_t = sum_s
    mean_s = sum_s
    mean_t = sum_s
    rest_s = sum_s
    rest_t = sum_s
    for c0 in range(0, V, C):
        cols = c0 + tl.arange(0, C)
        here = inside[:, None] & (cols < V)[None, :]
        mask = read(inside, live, COLUMNS)[:, None] & (cols < V)[None, :]
        s = load(s_row, cols, s_c, mask, float("-inf"), "evict_first")
        t = load(t_row, cols, t_c, mask, other_t, "evict_first")
        own = cols[None, :] == y[:, None]
        among = s
        if OTHERS:
            among = without(s, own)
            t = without(t, own)
        a = log_probs(among, m_s, inv_s, lz_s)
        ps = tl.exp(a)
        b, pt = teacher_probs(t, m_t, inv_t, lz_t, inputs)
        part = terms(kind, a, b, ps, pt, p0, p1, one, SIMPLE)
        gs = part[1]
        gt = part[2]
        if ds_row is not None or SUMS:
            g = gs - ps * G_s[:, None]
            if OTHERS:
                g = rest_gradient(g, rest, label_s, ps, own)
                a = tl.where(own, odds_s[:, None], a)
            g = kw[:, None] * (g * inv_s)
            if SUMS:
                part = moments(a, ps, g, mask)
                sum_s += part[0]
                mean_s += part[1]
                rest_s += part[2]
            if ds_row is not None:
                if HARD:
                    p1_ = tl.exp(s - m1[:, None] - lz1[:, None])
                    cw = class_weights(class_weight, cols, V)
                    g += cw_row[:, None] * ce_gradient(p1_, cols, y, cwy, cw, total_cw, eps, V)
                store(ds_row, cols, ds_c, here, tl.where(live[:, None], g, 0.0))
        if dt_row is not None or SUMS:
            h = gt - pt * G_t[:, None]
            if OTHERS:
                h = rest_gradient(h, rest, label_t, pt, own)
                b = tl.where(own, odds_t[:, None], b)
            h = kw[:, None] * (h * inv_t)
            if SUMS:
                part = moments(b, pt, h, mask)
                sum_t += part[0]
                mean_t += part[1]
                rest_t += part[2]
            if dt_row is not None:
                store(dt_row, cols, dt_c, here, tl.where(live[:, None], h, 0.0))
    return times(rest_s, mean_s) - sum_s, times(rest_t, mean_t) - sum_t


@triton.jit(do_not_specialize=["kind", "inputs", "ignore_index", "blocks"])
def looped_kernel(
    student, teacher, labels, weight, class_weight, scalars, divisors, losses, stats, ds, dt,
    ts, tt, kd, ce, eps, p0, p1, inner, V,
    s_o, s_c, s_i, t_o, t_c, t_i, ds_o, ds_c, ds_i, dt_o, dt_c, dt_i,
    kind, inputs, ignore_index, blocks,
    R: tl.constexpr, C: tl.constexpr, HARD: tl.constexpr, SIMPLE: tl.constexpr, OTHERS: tl.constexpr,
    COLUMNS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of rows that do not stay on chip.

    SIMPLE (forward and reverse KL of logits): one sweep for the sums, online, and one for the gradient. Otherwise
    log-sum-exps, sums of the divergence, gradient. OTHERS: the decoupled KL, a forward KL (SIMPLE) that leaves the
    label's class out. FIRST: eviction policy of every sweep but the last.
    """
    ts, tt, kd, ce, eps, p0, p1 = load_scalars(scalars, ts, tt, kd, ce, eps, p0, p1)
    pid = tl.program_id(0)
    o = (pid // blocks).to(tl.int64)
    i = ((pid % blocks) * R + tl.arange(0, R)).to(tl.int64)
    inside = i < inner
    row = o * inner + i
    s_row = student + o * s_o + i * s_i
    t_row = teacher + o * t_o + i * t_i
    ds_row = ds
    if ds is not None:
        ds_row = ds + o * ds_o + i * ds_i
    dt_row = dt
    if dt is not None:
        dt_row = dt + o * dt_o + i * dt_i
    y, cwy, w = load_row(row, inside, labels, weight, class_weight, V, ignore_index, HARD)
    live = inside & (w != 0.0)
    kind = plain_kind(kind, p0)
    if OTHERS:
        kind = 0
    plain = inputs == 0
    inv_s = inverse(ts, plain)
    inv_t = inverse(tt, plain)
    other_t = tl.where(inputs == 2, 0.0, float("-inf"))
    # A tile of masked rows alone is not swept for its sums.
    end = tl.where(tl.max(live.to(tl.int32), 0) != 0, V, 0)

    # Log-sum-exps relative to the running maxima; the sums stay apart by lane until the end. For forward KL `d` is
    # sum e^y (y - x), with x and y relative to their maxima; for reverse KL the two change places.
    x_y = tl.zeros([R], tl.float32)
    u_y = x_y
    if HARD or OTHERS:
        x_y = tl.load(s_row + y.to(tl.int64) * s_c, mask=live, other=0.0).to(tl.float32)
    if OTHERS:
        u_y = tl.load(t_row + y.to(tl.int64) * t_c, mask=live, other=0.0).to(tl.float32)
    m_s = tl.full([R], float("-inf"), tl.float32)
    m_t = tl.full([R], float("-inf"), tl.float32)
    base_s = tl.zeros([R], tl.float32)
    base_t = tl.zeros([R], tl.float32)
    z_s = tl.zeros([R, C], tl.float32)
    z_t = tl.zeros([R, C], tl.float32)
    z1 = tl.zeros([R, C], tl.float32)
    d = tl.zeros([R, C], tl.float32)
    side = tl.where(kind == 0, 1.0, -1.0)
    sums_end = end
    if not HARD:
        sums_end = tl.where(plain, end, 0)
    for c0 in range(0, sums_end, C):
        cols = c0 + tl.arange(0, C)
        mask = read(inside, live, COLUMNS)[:, None] & (cols < V)[None, :]
        s = load(s_row, cols, s_c, mask, float("-inf"), FIRST)
        t = load(t_row, cols, t_c, mask, float("-inf"), FIRST)
        if OTHERS:
            own = cols[None, :] == y[:, None]
            s = without(s, own)
            t = without(t, own)
        top_s = tl.maximum(m_s, tl.max(s, 1))
        top_t = tl.maximum(m_t, tl.max(t, 1))
        new_s = finite(top_s)
        new_t = finite(top_t)
        x = (s - new_s[:, None]) * inv_s
        u = (t - new_t[:, None]) * inv_t
        ex = tl.exp(x)
        eu = tl.exp(u)
        c_s = tl.exp((m_s - new_s) * inv_s)[:, None]
        c_t = tl.exp((m_t - new_t) * inv_t)[:, None]
        if SIMPLE:
            shift = (base_t - new_t) * inv_t - (base_s - new_s) * inv_s
            shift = (shift * side)[:, None]
            z = tl.where(kind == 0, z_t, z_s)
            c = tl.where(kind == 0, c_t, c_s)
            e = tl.where(kind == 0, eu, ex)
            d = tl.where(c == 0.0, 0.0, c * (d + z * shift)) + tl.where(e == 0.0, 0.0, e * ((u - x) * side))
        z_s = z_s * c_s + ex
        z_t = z_t * c_t + eu
        if HARD:
            z1 = z1 * tl.exp(m_s - new_s)[:, None] + tl.exp(s - new_s[:, None])
        m_s = top_s
        m_t = top_t
        base_s = new_s
        base_t = new_t
    m_s = tl.where(plain, base_s, 0.0)
    m_t = tl.where(plain, base_t, 0.0)
    sum_s = tl.sum(z_s, 1)
    sum_t = tl.sum(z_t, 1)
    odds_s = x_y
    odds_t = u_y
    all_s = sum_s
    all_t = sum_t
    if OTHERS:
        odds_s = log_odds(x_y, m_s, inv_s, sum_s)
        odds_t = log_odds(u_y, m_t, inv_t, sum_t)
        sum_s = no_class(sum_s)
        sum_t = no_class(sum_t)
    lz_s = tl.where(plain, tl.log(tl.where(plain, sum_s, 1.0)), 0.0)
    lz_t = tl.where(plain, tl.log(tl.where(plain, sum_t, 1.0)), 0.0)
    lz1 = lz_s
    CE = tl.zeros([R], tl.float32)
    total_cw = CE
    base_1 = base_s
    sum_1 = CE
    if HARD:
        sum_1 = tl.sum(z1, 1)
        if OTHERS:
            # The hard-label term sees the label's class too.
            base_1 = finite(tl.where(sum_1 == 0.0, x_y, tl.maximum(base_s, x_y)))
            sum_1 = times(sum_1, tl.exp(base_s - base_1)) + tl.exp(x_y - base_1)
        lz1 = tl.log(sum_1)
        # Label smoothing sums the logits, relative to the maximum: a sweep that only it pays for.
        smooth = tl.zeros([R, C], tl.float32)
        weights = tl.zeros([C], tl.float32)
        for c0 in range(0, tl.where(eps == 0.0, 0, end), C):
            cols = c0 + tl.arange(0, C)
            mask = read(inside, live, COLUMNS)[:, None] & (cols < V)[None, :]
            cw = class_weights(class_weight, cols, V)
            s = load(s_row, cols, s_c, mask, float("-inf"), FIRST)
            smooth += tl.where(mask, times(cw[None, :], s - base_1[:, None]), 0.0)
            weights += cw
        total_cw += tl.sum(weights, 0)
        CE = cross_entropy(lz1, x_y - base_1, tl.sum(smooth, 1), total_cw, cwy, eps, V)

    if SIMPLE:
        D = tl.sum(d, 1) / tl.where(kind == 0, sum_t, sum_s) - (lz_t - lz_s) * side
        G_s = D
        G_t = D
    else:
        one = tl.where(plain, 0.0, 1.0)
        f_sum = tl.zeros([R, C], tl.float32)
        s_sum = tl.zeros([R, C], tl.float32)
        t_sum = tl.zeros([R, C], tl.float32)
        for c0 in range(0, end, C):
            cols = c0 + tl.arange(0, C)
            mask = read(inside, live, COLUMNS)[:, None] & (cols < V)[None, :]
            s = load(s_row, cols, s_c, mask, float("-inf"), FIRST)
            t = load(t_row, cols, t_c, mask, other_t, FIRST)
            a = log_probs(s, m_s, inv_s, lz_s)
            b, pt = teacher_probs(t, m_t, inv_t, lz_t, inputs)
            f, gs, gt = terms(kind, a, b, tl.exp(a), pt, p0, p1, one, SIMPLE)
            f_sum += f
            s_sum += gs
            t_sum += gt
        D = tl.sum(f_sum, 1)
        G_s = tl.sum(s_sum, 1)
        G_t = tl.sum(t_sum, 1)

    kw = w
    cw_row = w
    if divisors is not None:
        kw *= factor(kd, tl.load(divisors))
        cw_row *= factor(ce, tl.load(divisors + 1))
    else:
        kw *= kd
        cw_row *= ce
    g_s, g_t = sums(kind, inputs, D, G_s, G_t)
    G_s, G_t = public_sums(kind, inputs, D, G_s, G_t)
    label_s = odds_s
    label_t = odds_t
    rest = D
    if OTHERS:
        D, G_s, G_t, label_s, label_t, rest = decoupled(D, odds_s, odds_t, all_t, p0, p1)
        g_t = G_s
    write_row(row, inside, live, losses, stats, kw, cw_row, D, CE, m_s, m_t, all_s, all_t, sum_1, G_s, G_t)
    if ds is not None or dt is not None:
        _gradient_sweep(
            s_row, t_row, ds_row, dt_row, s_c, t_c, ds_c, dt_c, V, inside, live, y, cwy, class_weight, total_cw,
            kw, cw_row, m_s, lz_s, m_t, lz_t, base_1, lz1, g_s, g_t, ts, tt, eps, p0, p1, kind, inputs, other_t,
            odds_s, odds_t, label_s, label_t, rest, R, C, HARD, SIMPLE, OTHERS, COLUMNS, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["kind", "inputs", "ignore_index", "blocks", "up"])
def backward_kernel(
    student, teacher, labels, weight, class_weight, scalars, divisors, stats, upstream, ds, dt, temperature_grad,
    ts, tt, kd, ce, eps, p0, p1, inner, V, up,
    s_o, s_c, s_i, t_o, t_c, t_i, ds_o, ds_c, ds_i, dt_o, dt_c, dt_i,
    kind, inputs, ignore_index, blocks,
    R: tl.constexpr, C: tl.constexpr, HARD: tl.constexpr, SIMPLE: tl.constexpr, OTHERS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of rows that do not stay on chip, from the forward's statistics: one sweep.

    up: stride of the upstream gradient.
    """
    ts, tt, kd, ce, eps, p0, p1 = load_scalars(scalars, ts, tt, kd, ce, eps, p0, p1)
    pid = tl.program_id(0)
    o = (pid // blocks).to(tl.int64)
    i = ((pid % blocks) * R + tl.arange(0, R)).to(tl.int64)
    inside = i < inner
    row = o * inner + i
    ds_row = ds
    if ds is not None:
        ds_row = ds + o * ds_o + i * ds_i
    dt_row = dt
    if dt is not None:
        dt_row = dt + o * dt_o + i * dt_i
    y, cwy, w = load_row(row, inside, labels, weight, class_weight, V, ignore_index, HARD)
    live = inside & (w != 0.0)
    kind = plain_kind(kind, p0)
    if OTHERS:
        kind = 0
    plain = inputs == 0
    softmax = tl.where(plain, live, False)  # rows that have one
    other_t = tl.where(inputs == 2, 0.0, float("-inf"))
    at = stats + row * 8
    inv_s = inverse(ts, plain)
    inv_t = inverse(tt, plain)
    m_s = tl.load(at, mask=live, other=0.0)
    m_t = tl.load(at + 1, mask=live, other=0.0)
    all_s = tl.load(at + 2, mask=softmax, other=1.0)
    all_t = tl.load(at + 3, mask=softmax, other=1.0)
    lz_s = tl.log(all_s)
    lz_t = tl.log(all_t)
    base_1 = m_s
    lz_1 = lz_s
    if HARD:
        lz_1 = tl.log(tl.load(at + 4, mask=live, other=1.0))
    D = tl.load(at + 7, mask=live, other=0.0)
    G_s = tl.load(at + 5, mask=live, other=0.0)
    g_s, g_t = sums(kind, inputs, D, G_s, tl.load(at + 6, mask=live, other=0.0))
    s_row = student + o * s_o + i * s_i
    t_row = teacher + o * t_o + i * t_i
    odds_s = D
    odds_t = D
    label_s = D
    label_t = D
    rest = D
    if OTHERS:
        lz_s = tl.log(no_class(all_s))
        lz_t = tl.log(no_class(all_t))
        s_y = tl.load(s_row + y.to(tl.int64) * s_c, mask=live, other=0.0).to(tl.float32)
        t_y = tl.load(t_row + y.to(tl.int64) * t_c, mask=live, other=0.0).to(tl.float32)
        odds_s = log_odds(s_y, m_s, inv_s, all_s)
        odds_t = log_odds(t_y, m_t, inv_t, all_t)
        base_1 = finite(tl.where(all_s == 0.0, s_y, tl.maximum(m_s, s_y)))
        _, g_t, _, label_s, label_t, rest = decoupled(G_s, odds_s, odds_t, all_t, p0, p1)
    total_cw = tl.zeros([R], tl.float32)
    if HARD:
        weights = tl.zeros([C], tl.float32)
        for c0 in range(0, tl.where(eps == 0.0, 0, V), C):
            weights += class_weights(class_weight, c0 + tl.arange(0, C), V)
        total_cw += tl.sum(weights, 0)
    w *= tl.load(upstream + row * up, mask=live, other=0.0)
    kw = w
    cw_row = w
    if divisors is not None:
        kw *= factor(kd, tl.load(divisors))
        cw_row *= factor(ce, tl.load(divisors + 1))
    else:
        kw *= kd
        cw_row *= ce
    sum_s, sum_t = _gradient_sweep(
        s_row, t_row, ds_row, dt_row, s_c, t_c, ds_c, dt_c, V, inside, live, y, cwy, class_weight, total_cw, kw, cw_row,
        m_s, lz_s, m_t, lz_t, base_1, lz_1,
        g_s, g_t, ts, tt, eps, p0, p1, kind, inputs, other_t, odds_s, odds_t, label_s, label_t, rest,
        R, C, HARD, SIMPLE, OTHERS, COLUMNS, temperature_grad is not None,
    )  # fmt: skip
    if temperature_grad is not None:
        tl.store(temperature_grad + row * 2, tl.where(softmax, sum_s, 0.0), mask=inside)
        tl.store(temperature_grad + row * 2 + 1, tl.where(softmax, sum_t, 0.0), mask=inside)
