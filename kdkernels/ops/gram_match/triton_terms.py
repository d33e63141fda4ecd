"""One element of the match of two Gram matrices, in Triton: its share of the loss and its slope, as in csrc/gram_match/math.h."""

# ruff: noqa: SIM109 (Triton compiles no "in")

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.ops.gram_match.kinds import Kind
from kdkernels.ops.triton_util import apart

SERIES, ROWS, ROWS_L1, PROBABILITIES, SIGNED, LENGTHS = (tl.constexpr(k.value) for k in list(Kind)[1:])


@triton.jit
def series(z, ORDER: tl.constexpr):
    """e^z cut off after z^ORDER / ORDER!, less the constant 1, and its derivative."""
    term = z * 0.0 + 1.0
    value = z * 0.0
    slope = z * 0.0
    for p in tl.static_range(1, ORDER + 1):
        slope += term
        term *= z / p
        value += term
    return value, slope


@triton.jit
def element_value(s, length_s, t, length_t, eps, gamma, decay, KIND: tl.constexpr, ORDER: tl.constexpr):
    if KIND == SERIES:
        v, _slope = series(2.0 * gamma * s, ORDER)
        w, _other = series(2.0 * gamma * t, ORDER)
        e = decay * (v - w)
        return e * e
    elif KIND == ROWS or KIND == ROWS_L1:
        e = outer_value(s, length_s, KIND) - outer_value(t, length_t, KIND)
        return e * e
    elif KIND == PROBABILITIES:
        p = outer_value(s, length_s, KIND)
        q = outer_value(t, length_t, KIND)
        return q * tl.log(tl.div_rn(q + eps, p + eps)) + (p - q)
    elif KIND == SIGNED:
        return s * s
    else:
        return apart(s, t) * apart(s, t)


@triton.jit
def outer_value(own, length, KIND: tl.constexpr):
    """Divided, so that a row of one element is exactly 1."""
    if KIND == PROBABILITIES:
        return tl.div_rn(0.5 * own + 0.5, length)
    else:
        return tl.div_rn(own, length)


@triton.jit
def outer_slope(own, length, other, other_length, eps, STUDENT: tl.constexpr, KIND: tl.constexpr):
    p = outer_value(own, length, KIND)
    q = outer_value(other, other_length, KIND)
    if KIND == PROBABILITIES:
        if STUDENT:
            return tl.div_rn(p - q + eps, p + eps)
        else:
            return tl.log(tl.div_rn(p + eps, q + eps)) - tl.div_rn(eps, p + eps)
    else:
        return p - q


@triton.jit
def element_slope(
    own, length, dot, other, other_length, eps, gamma, decay,
    STUDENT: tl.constexpr, KIND: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """The loss's slope by an element as one of the row with this length (infinite: nothing gets through) and dot."""
    if KIND == SERIES:
        v, d = series(2.0 * gamma * own, ORDER)
        w, _other = series(2.0 * gamma * other, ORDER)
        return 4.0 * gamma * decay * decay * (v - w) * d
    elif KIND == ROWS:
        outer = outer_slope(own, length, other, other_length, eps, STUDENT, KIND)
        return tl.div_rn(2.0 * (outer - outer_value(own, length, KIND) * dot), length)
    elif KIND == ROWS_L1:
        outer = outer_slope(own, length, other, other_length, eps, STUDENT, KIND)
        sign = tl.where(own > 0.0, 1.0, tl.where(own < 0.0, -1.0, 0.0))
        return tl.div_rn(2.0 * (outer - sign * dot), length)
    elif KIND == PROBABILITIES:
        return tl.div_rn(0.5 * (outer_slope(own, length, other, other_length, eps, STUDENT, KIND) - dot), length)
    elif KIND == SIGNED:
        return 2.0 * own
    elif KIND == LENGTHS:
        return tl.div_rn(apart(own, other), length)
    else:
        return 2.0 * apart(own, other)
