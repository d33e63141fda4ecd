"""Triton kernels of the triplet angles, and their launcher.

Every unordered pair of a model's samples has three roles in the triplets: side of the angle at either end, and
opposite side. A program has a tile of ordered pairs (p, q) and gathers all roles for them over the third sample r: the
angle at p between q and r, and the angle at r between p and q. So nothing is added from two programs, at the price of
looking at each triplet twice. Numerics as in README.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kdkernels.ops.pairwise_distance.triton import total_kernel
from kdkernels.ops.triton_util import apart, on, signature

TILE, OTHERS = 16, 4  # pairs on a side of a program's tile, third samples at a time
BLOCK = 1024


@triton.jit
def _inverse(d2, beta):
    """1 / (d sqrt(2 beta)), 0 where samples coincide."""
    return tl.where(d2 > 0.0, 1.0 / tl.sqrt_rn(2.0 * beta * tl.where(d2 > 0.0, d2, 1.0)), 0.0)


@triton.jit
def _cosine(a, b, c, a_lo, b_lo, c_lo, weight):
    """cos / beta from the squared sides a, b at the vertex and c opposite; weight = 1 / (2 beta d_a d_b)."""
    return weight * ((tl.minimum(a, b) + (tl.maximum(a, b) - c)) + ((a_lo + b_lo) - c_lo))


@triton.jit
def _load(hi, lo, beta, i, j, n):
    """Tiles [I, J] of d2 in two parts and of 1 / d."""
    at = i[:, None].to(tl.int64) * n + j[None, :]
    mask = (i < n)[:, None] & (j < n)[None, :]
    high = tl.load(hi + at, mask=mask, other=0.0)
    return high, tl.load(lo + at, mask=mask, other=0.0), _inverse(high, beta)


@triton.jit
def _slope(x):
    return tl.minimum(tl.maximum(x, -1.0), 1.0)


@triton.jit
def angle_kernel(s_hi, s_lo, t_hi, t_lo, partial, ds, n, beta, scale, T: tl.constexpr, R: tl.constexpr):
    """Loss of the angles at p between q and all r, for a tile of pairs (p, q); with ds also the gradient of d2_pq."""
    p = tl.program_id(0) * T + tl.arange(0, T)
    q = tl.program_id(1) * T + tl.arange(0, T)
    a_s, al_s, ia_s = _load(s_hi, s_lo, beta, p, q, n)
    a_t, al_t, ia_t = _load(t_hi, t_lo, beta, p, q, n)
    loss = tl.zeros([T, T], tl.float32)
    sum_t = tl.zeros([T, T], tl.float32)
    sum_q = tl.zeros([T, T], tl.float32)
    sum_o = tl.zeros([T, T], tl.float32)
    for r0 in range(0, n, R):
        r = r0 + tl.arange(0, R)
        # b: p and r; c: r and q, [R, T], so that no tile is transposed.
        b_s, bl_s, ib_s = _load(s_hi, s_lo, beta, p, r, n)
        b_t, bl_t, ib_t = _load(t_hi, t_lo, beta, p, r, n)
        c_s, cl_s, ic_s = _load(s_hi, s_lo, beta, r, q, n)
        c_t, cl_t, ic_t = _load(t_hi, t_lo, beta, r, q, n)
        w_s = ia_s[:, None, :] * ib_s[:, :, None]
        w_t = ia_t[:, None, :] * ib_t[:, :, None]
        cos_s = _cosine(
            a_s[:, None, :], b_s[:, :, None], c_s[None, :, :], al_s[:, None, :], bl_s[:, :, None], cl_s[None, :, :], w_s
        )
        cos_t = _cosine(
            a_t[:, None, :], b_t[:, :, None], c_t[None, :, :], al_t[:, None, :], bl_t[:, :, None], cl_t[None, :, :], w_t
        )
        # The angle of a side with itself is 1 exactly, or 0 where it has no length, and has no gradient.
        itself = (r[:, None] == q[None, :])[None, :, :]
        alone = tl.where(a_s > 0.0, 1.0 / beta, 0.0) - tl.where(a_t > 0.0, 1.0 / beta, 0.0)
        x = tl.where(itself, alone[:, None, :], apart(cos_s, cos_t))
        slope = _slope(x)
        loss += tl.sum(slope * (x - 0.5 * slope), 1)
        if ds is not None:
            slope = tl.where(itself, 0.0, slope)
            sum_t += tl.sum(slope * w_s, 1)
            sum_q += tl.sum(slope * cos_s, 1)
            # The angle at r between p and q.
            w_s = ib_s[:, :, None] * ic_s[None, :, :]
            w_t = ib_t[:, :, None] * ic_t[None, :, :]
            cos_s = _cosine(
                b_s[:, :, None],
                c_s[None, :, :],
                a_s[:, None, :],
                bl_s[:, :, None],
                cl_s[None, :, :],
                al_s[:, None, :],
                w_s,
            )
            cos_t = _cosine(
                b_t[:, :, None],
                c_t[None, :, :],
                a_t[:, None, :],
                bl_t[:, :, None],
                cl_t[None, :, :],
                al_t[:, None, :],
                w_t,
            )
            sum_o += tl.sum(_slope(apart(cos_s, cos_t)) * w_s, 1)
    inside = (p < n)[:, None] & (q < n)[None, :]
    tl.store(
        partial + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(loss, 1), 0)
    )
    if ds is not None:
        # Once for each order of the sides; the opposite role is seen from both (p, q) and (q, p).
        g = 2.0 * (sum_t - beta * (ia_s * ia_s * sum_q)) - sum_o
        g = tl.where(p[:, None] == q[None, :], 0.0, beta * scale * g)
        tl.store(ds + p[:, None].to(tl.int64) * n + q[None, :], g, mask=inside)


@triton.jit
def finish_kernel(sums, loss, factor):
    tl.store(loss, tl.load(sums) * factor)


def forward(
    student: torch.Tensor,
    student_lo: torch.Tensor,
    teacher: torch.Tensor,
    teacher_lo: torch.Tensor,
    scalars: torch.Tensor,
    loss: torch.Tensor,
    ds: torch.Tensor | None,
    dt: torch.Tensor | None,
) -> None:
    """The entry triplet_angle, without the context."""
    n = student.shape[0]
    beta, scale = scalars.tolist()
    tiles = triton.cdiv(n, TILE)
    partial, sums = student.new_empty(tiles * tiles), student.new_empty(1)
    options = {"T": TILE, "R": OTHERS, "num_warps": 4}
    with on(student.device):
        s, t = (student, student_lo), (teacher, teacher_lo)
        if dt is not None:  # the loss is symmetric in the models
            angle_kernel[(tiles, tiles)](*t, *s, partial, dt, n, beta, scale, **options)
        if ds is not None or dt is None:
            angle_kernel[(tiles, tiles)](*s, *t, partial, ds, n, beta, scale, **options)
        total_kernel[(1,)](partial, sums, tiles * tiles, 1, B=BLOCK)
        finish_kernel[(1,)](sums, loss, beta * scale)


def aot_signatures() -> list[dict]:
    """Representative compilations for kdkernels.bench.static."""
    matrices = dict.fromkeys(("s_hi", "s_lo", "t_hi", "t_lo", "partial"), "*fp32")
    return [
        signature("angles, gradient", angle_kernel, {**matrices, "ds": "*fp32"}, ("beta", "scale"), T=TILE, R=OTHERS),
        signature("angles, loss only", angle_kernel, {**matrices, "ds": None}, ("beta", "scale"), T=TILE, R=OTHERS),
    ]
