"""Pieces of the Triton kernels: the divergences' terms, and what is done to one tile or one row.

Everything works on tiles [R rows, C classes]. Rows are the `inner` axis, or rows of a matrix merged into it, so that
one source serves the class axis contiguous and strided: Triton specialises a stride of 1 and takes the layout of the
tile from it. An optional argument that is None is left out at compile time. The kind is a uniform run-time switch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.ops.triton_util import cast


@triton.jit
def _kl(x, y, px):
    """p_x (log p_x - log p_y), 0 where p_x is 0. Written so that a NaN stays one."""
    return tl.where(px == 0.0, 0.0, px * (x - y))


@triton.jit
def _mixture(a, b, wa, wb):
    """a - m, b - m and wa e^(a - m), with m = log(wa e^a + wb e^b) taken from the larger of both."""
    d = tl.where((a == float("-inf")) & (b == float("-inf")), 0.0, b - a)
    e = tl.exp(-tl.abs(d))
    ea = wa * tl.where(d > 0.0, e, 1.0)
    total = ea + wb * tl.where(d > 0.0, 1.0, e)
    log_total = tl.log(total)
    am = tl.where(d > 0.0, -d, 0.0) - log_total
    bm = tl.where(d > 0.0, 0.0, d) - log_total
    return am, bm, ea / total


@triton.jit
def _skew(x, y, px, al):
    """KL(p_x, al p_x + (1 - al) p_y), its derivative by x and by y. al > 0."""
    m = _mixture(y, x, 1.0 - al, al)
    mass = tl.where(al == 1.0, 0.0, px)  # at 1 it is p_x against itself
    f = tl.where(mass == 0.0, 0.0, px * m[1])
    share = tl.where(mass == 0.0, 0.0, px * m[2])
    return f, f + share, -share


@triton.jit
def _phi(x):
    """(e^x - 1) / x, where e^x - 1 of a small x is a Taylor sum."""
    taylor = 1.0 / 40320.0
    taylor = taylor * x + 1.0 / 5040.0
    taylor = taylor * x + 1.0 / 720.0
    taylor = taylor * x + 1.0 / 120.0
    taylor = taylor * x + 1.0 / 24.0
    taylor = taylor * x + 1.0 / 6.0
    taylor = taylor * x + 0.5
    small = tl.abs(x) <= 0.5
    return tl.where(small, 1.0 + x * taylor, (tl.exp(x) - 1.0) / tl.where(small, 1.0, x))


@triton.jit
def _exp_divided_difference(x, y, z):
    """The second one of exp over three nodes: alpha-beta's formula once its divisions are carried out (math.h)."""
    lo = tl.minimum(tl.minimum(x, y), z)
    hi = tl.maximum(tl.maximum(x, y), z)
    mid = tl.maximum(tl.minimum(x, y), tl.minimum(tl.maximum(x, y), z))
    v = mid - lo
    w = hi - lo
    far = (tl.exp(mid) * _phi(hi - mid) - tl.exp(lo) * _phi(v)) / tl.where(w > 1.0, w, 1.0)
    h = tl.full(w.shape, 1.0, tl.float32)
    power = h
    near = 0.5 * h
    factorial = 2.0
    for n in tl.static_range(1, 10):
        power = power * w
        h = v * h + power
        factorial = factorial * (n + 2)
        near += h / factorial
    return tl.where(w > 1.0, far, tl.exp(lo) * near)


@triton.jit
def _alpha_beta(a, b, al, be):
    """The alpha-beta divergence of one class. No limit of its parameters is a special case."""
    total = al + be
    none_s = a == float("-inf")
    none_t = b == float("-inf")
    none = none_s | none_t
    x = tl.where(none, 0.0, a)
    y = tl.where(none, 0.0, b)
    d = y - x
    f = d * d * _exp_divided_difference(total * x, al * y + be * x, total * y)
    gs = -tl.exp(total * x) * d * _phi(al * d)
    gt = tl.exp(total * y) * d * _phi(-be * d)
    # A class that one side leaves empty: with al, be > 0 the cross term is gone; be = 0 leaves the student's own mass
    # and al = 0 the teacher's; anything else diverges.
    finite_s = (al > 0.0) & (be >= 0.0)
    finite_t = (be > 0.0) & (al >= 0.0)
    es = tl.where(none_s, 0.0, tl.exp(total * a))
    et = tl.where(none_t, 0.0, tl.exp(total * b))
    own_s = tl.where(finite_s, 1.0 / tl.where(finite_s, al * total, 1.0), float("inf"))
    own_t = tl.where(finite_t, 1.0 / tl.where(finite_t, be * total, 1.0), float("inf"))
    edge = times(es, own_s) + times(et, own_t)
    edge_s = es * tl.where(finite_s, 1.0 / tl.where(finite_s, al, 1.0), 0.0)
    edge_t = et * tl.where(finite_t, 1.0 / tl.where(finite_t, be, 1.0), 0.0)
    return tl.where(none, edge, f), tl.where(none, edge_s, gs), tl.where(none, edge_t, gt)


@triton.jit
def _simple_terms(kind, a, b, ps, pt, one):
    if kind == 0:
        f = _kl(b, a, pt)
        gs = -pt
        gt = f + one * pt
    else:
        f = _kl(a, b, ps)
        gs = f + one * ps
        gt = -ps
    return f, gs, gt


@triton.jit
def terms(kind, a, b, ps, pt, p0, p1, one, SIMPLE: tl.constexpr):
    """f, df/da, df/db of one class (math.h has the same). SIMPLE leaves only kinds 0 and 1 in the kernel.

    `one` is 0 where the caller subtracts p * sum: the terms +p_t of forward and +p_s of reverse KL then cancel.
    """
    if SIMPLE:
        f, gs, gt = _simple_terms(kind, a, b, ps, pt, one)
    elif kind == 2:
        m = _mixture(a, b, 1.0 - p0, p0)
        gs = (1.0 - p0) * tl.where(ps == 0.0, 0.0, ps * m[0])
        gt = p0 * tl.where(pt == 0.0, 0.0, pt * m[1])
        f = gs + gt
    elif kind == 3:
        f, gt, gs = _skew(b, a, pt, p0)
    elif kind == 4:
        f, gs, gt = _skew(a, b, ps, p0)
    elif kind == 5:
        d = pt - ps
        half = tl.where(d > 0.0, 0.5, tl.where(d < 0.0, -0.5, 0.0))
        f = 0.5 * tl.abs(d)
        gs = -half * ps
        gt = half * pt
    elif kind == 6:
        f, gs, gt = _alpha_beta(a, b, p0, p1)
    elif kind == 7:
        # p1 of uniform mass in every class of the student, p0 in all
        mixed = tl.where(p1 > 0.0, tl.log((ps + p1) / (1.0 + p0)), a)
        f = tl.where(pt == 0.0, 0.0, -pt * mixed)
        gs = tl.where(p1 > 0.0, -pt * (ps / tl.where(p1 > 0.0, ps + p1, 1.0)), -pt)
        gt = f
    elif kind == 8:
        fwd = _kl(b, a, pt)
        rev = _kl(a, b, ps)
        f = p0 * fwd + (1.0 - p0) * rev
        gs = (1.0 - p0) * (rev + one * ps) - p0 * pt
        gt = p0 * (fwd + one * pt) - (1.0 - p0) * ps
    else:
        f, gs, gt = _simple_terms(kind, a, b, ps, pt, one)
    if not SIMPLE:
        # Log-probabilities do not pass through a log-sum-exp, which would carry a NaN to where there is mass.
        f = tl.where(a != a, a, f)
    return f, gs, gt


@triton.jit
def _log_sigmoid(u):
    tail = -tl.log(1.0 + tl.exp(-tl.abs(u)))
    return tl.where(u < 0.0, u + tail, tail)


@triton.jit
def binary_kl(u_s, u_t):
    """KL of two Bernoulli variables from their log-odds, and its derivatives by them."""
    yes_s = _log_sigmoid(u_s)
    yes_t = _log_sigmoid(u_t)
    no_s = _log_sigmoid(-u_s)
    no_t = _log_sigmoid(-u_t)
    p = tl.exp(yes_t)
    q = tl.exp(no_t)
    value = times(p, yes_t - yes_s) + times(q, no_t - no_s)
    by_s = tl.where(u_s < 0.0, tl.exp(yes_s) - p, q - tl.exp(no_s))
    by_t = times(p * q, u_t - u_s)
    return tl.where((u_s != u_s) | (u_t != u_t), float("nan"), value), by_s, by_t


@triton.jit
def log_odds(x, shift, inv, z):
    """Of a class against others whose exponentials add up to z."""
    return (x - shift) * inv - tl.log(z)


@triton.jit
def decoupled(rest, odds_s, odds_t, z_t, p0, p1):
    """A decoupled KL from the KL among the other classes: its value, that KL and the label's (the statistics G_s and
    G_t), the label's entries of both gradients, and the other classes' weight: 0 where the teacher has none."""
    value, by_s, by_t = binary_kl(odds_s, odds_t)
    rest = tl.where(z_t == 0.0, 0.0, rest)
    total = times(p0, value) + times(p1, rest)
    # A weight of 0 must not hide what is no number.
    total = tl.where(value != value, value, total)
    label_s = tl.where(value != value, value, times(p0, by_s))
    label_t = tl.where(value != value, value, times(p0, by_t))
    return total, rest, value, label_s, label_t, tl.where(z_t == 0.0, 0.0, p1)


@triton.jit
def rest_gradient(x, weight, label, p, own):
    """A forward KL's gradient among the other classes, to that of the whole: the label's entry, and what it takes."""
    return tl.where(own, label[:, None], weight[:, None] * x - label[:, None] * p)


@triton.jit
def without(x, own):
    return tl.where(own, float("-inf"), x)


@triton.jit
def no_class(z):
    """A sum of exponentials that may be divided by: 1 where there are none."""
    return tl.where(z == 0.0, 1.0, z)


@triton.jit
def plain_kind(kind, p0):
    """Kinds at an end of their parameter, as forward or reverse KL: the interior formula is 0 * inf there."""
    forward = ((kind == 2) & (p0 <= 0.0)) | ((kind == 3) & (p0 == 0.0)) | ((kind == 8) & (p0 == 1.0))
    reverse = ((kind == 2) & (p0 >= 1.0)) | ((kind == 4) & (p0 == 0.0)) | ((kind == 8) & (p0 == 0.0))
    return tl.where(forward, 0, tl.where(reverse, 1, kind))


@triton.jit
def load_scalars(ptr, ts, tt, kd, ce, eps, p0, p1):
    if ptr is not None:
        ts = tl.load(ptr)
        tt = tl.load(ptr + 1)
        kd = tl.load(ptr + 2)
        ce = tl.load(ptr + 3)
        eps = tl.load(ptr + 4)
        p0 = tl.load(ptr + 5)
        p1 = tl.load(ptr + 6)
    return ts, tt, kd, ce, eps, p0, p1


@triton.jit
def load_row(row, inside, labels, weight, class_weight, V, ignore_index, HARD: tl.constexpr):
    """Label, class weight of the label, and the row's weight: 0 for a masked row, NaN for an impossible label."""
    if weight is not None:
        w = tl.load(weight + row, mask=inside, other=0.0)
    else:
        w = tl.where(inside, 1.0, 0.0)
    y = row * 0
    if labels is not None:
        y = tl.load(labels + row, mask=inside, other=0)
        w = tl.where(y == ignore_index, 0.0, w)
        wrong = (y < 0) | (y >= V)
        y = tl.where(wrong, 0, y)
        w = tl.where(wrong & (w != 0.0), float("nan"), w)
    cwy = tl.where(inside, 1.0, 0.0)
    if HARD and class_weight is not None:
        cwy = tl.load(class_weight + y, mask=inside & (w != 0.0), other=0.0)
    return y.to(tl.int32), cwy, w


@triton.jit
def factor(x, d):
    return tl.where(d == 0.0, 0.0, tl.math.div_rn(x, tl.where(d == 0.0, 1.0, d)))


@triton.jit
def times(k, x):
    """k x, 0 where k is 0 (whatever x is)."""
    return tl.where(k == 0.0, 0.0, k * x)


@triton.jit
def cross_entropy(lz1, x_y, x_smooth, total_cw, cwy, eps, V):
    """Cross-entropy from log-sum-exp, label's logit and sum of cw * logit, all three less the row's maximum."""
    ce = (1.0 - eps) * cwy * (lz1 - x_y)
    return ce + tl.where(eps == 0.0, 0.0, eps / V * (total_cw * lz1 - x_smooth))


@triton.jit
def ce_gradient(p1, cols, y, cwy, cw, total_cw, eps, V):
    hot = tl.where(cols[None, :] == y[:, None], 1.0, 0.0)
    return ((1.0 - eps) * cwy)[:, None] * (p1 - hot) + eps / V * (total_cw[:, None] * p1 - cw[None, :])


@triton.jit
def class_weights(class_weight, cols, V):
    if class_weight is not None:
        cw = tl.load(class_weight + cols, mask=cols < V, other=0.0)
    else:
        cw = tl.where(cols < V, 1.0, 0.0)
    return cw


@triton.jit
def read(inside, live, COLUMNS: tl.constexpr):
    """The rows to load: not the masked ones, except where neighbouring rows share a vector load."""
    if COLUMNS:
        rows = inside
    else:
        rows = live
    return rows


@triton.jit
def load(base, cols, stride, mask, other, POLICY: tl.constexpr):
    at = base[:, None] + cols.to(tl.int64)[None, :] * stride
    return tl.load(at, mask=mask, other=other, eviction_policy=POLICY).to(tl.float32)


@triton.jit
def store(base, cols, stride, mask, value):
    at = base[:, None] + cols.to(tl.int64)[None, :] * stride
    tl.store(at, cast(value, base.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def inverse(temperature, plain):
    """1 / temperature, 1 where the inputs are no logits. To the last bit: its error is the same in every row."""
    return tl.where(plain, tl.math.div_rn(1.0, temperature), 1.0)


@triton.jit
def log_probs(x, shift, inv, lz):
    return (x - shift[:, None]) * inv - lz[:, None]


@triton.jit
def teacher_probs(t, shift, inv, lz, inputs):
    """log p_t and p_t of a tile: from logits and log-probabilities alike, or from probabilities."""
    b = log_probs(t, shift, inv, lz)
    pt = tl.exp(b)
    if inputs == 2:
        b = tl.log(t)
        pt = t
    return b, pt


@triton.jit
def finite(m):
    """A maximum that may be subtracted: 0 for a row, or a part of one, that is -inf throughout."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def write_row(row, inside, live, losses, stats, kw, cw, D, CE, top_s, top_t, z_s, z_t, z_1, G_s, G_t):
    loss = tl.where(live, times(kw, D) + times(cw, CE), 0.0)
    tl.store(losses + row, loss, mask=inside)
    at = stats + row * 8
    tl.store(at, tl.where(live, top_s, 0.0), mask=inside)
    tl.store(at + 1, tl.where(live, top_t, 0.0), mask=inside)
    tl.store(at + 2, tl.where(live, z_s, 0.0), mask=inside)
    tl.store(at + 3, tl.where(live, z_t, 0.0), mask=inside)
    tl.store(at + 4, tl.where(live, z_1, 0.0), mask=inside)
    tl.store(at + 5, tl.where(live, G_s, 0.0), mask=inside)
    tl.store(at + 6, tl.where(live, G_t, 0.0), mask=inside)
    tl.store(at + 7, tl.where(live, D, 0.0), mask=inside)
    return loss


@triton.jit
def sums(kind, inputs, D, G_s, G_t):
    """The sums as they enter the gradient: exact where they are known, 0 where nothing was normalised."""
    G_s = tl.where(kind == 0, -1.0, tl.where(kind == 1, D, G_s))
    G_t = tl.where(kind == 1, -1.0, tl.where(kind == 0, D, G_t))
    plain = inputs == 0
    return tl.where(plain, G_s, 0.0), tl.where(plain, G_t, 0.0)


@triton.jit
def public_sums(kind, inputs, D, G_s, G_t):
    """The sums as the statistics hold them, with the +p_t of forward and the +p_s of reverse KL."""
    plain = inputs == 0
    G_t = tl.where(plain & (kind == 0), D + 1.0, tl.where(plain & (kind == 1), -1.0, G_t))
    G_s = tl.where(plain & (kind == 1), D + 1.0, tl.where(plain & (kind == 0), -1.0, G_s))
    return G_s, G_t


@triton.jit
def moments(a, p, g, mask):
    """sum a g, sum p a and sum g: of a temperature's gradient, - sum x g / T = - sum (a - mean a) g.

    Gradients of a row add up to 0, to rounding; the mean keeps that rounding from being multiplied by log p.
    """
    ag = tl.where(mask & (g != 0.0), a * g, 0.0)
    pa = tl.where(mask & (p != 0.0), p * a, 0.0)
    return tl.sum(ag, 1), tl.sum(pa, 1), tl.sum(tl.where(mask, g, 0.0), 1)
