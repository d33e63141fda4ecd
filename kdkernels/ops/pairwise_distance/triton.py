"""Triton kernels of pairwise distances and of their match, and their launchers.

The entry points are the compiled extension's (pairwise_distance_forward, pairwise_distance_backward, distance_match)
without the context. Totals go through one partial sum a program, added in their order by a last program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kdkernels.ops.triton_util import apart, cast, long, on, signature

TILE, FEATURES = 32, 16  # samples on a side of a tile of pairs, features at a time
STRIP, PARTNERS, WIDTH = 16, 16, 64  # samples, partners and features of a tile of the gradient
BLOCK = 1024  # pairs of a program of the match
FIELDS = 8  # sums of a program of the match
MEAN_PAIRS, KEPT_PAIRS, SUM = 0, 1, 2
NAN = tl.constexpr(tl.PropagateNan.ALL)  # what a sample that is NaN makes of its distances


@triton.jit
def distance_kernel(x, hi, lo, n, features, row, T: tl.constexpr, F: tl.constexpr, SPLIT: tl.constexpr):
    """One tile of pairs and its mirror image, from the upper triangle of tiles."""
    pi = tl.program_id(0)
    pj = tl.program_id(1)
    if pj >= pi:
        i = pi * T + tl.arange(0, T)
        j = pj * T + tl.arange(0, T)
        real = tl.float64 if SPLIT else tl.float32
        total = tl.zeros([T, T], real)
        for f0 in range(0, features, F):
            f = f0 + tl.arange(0, F)
            a = tl.load(
                x + i[:, None].to(tl.int64) * row + f[None, :],
                mask=(i < n)[:, None] & (f < features)[None, :],
                other=0.0,
            )
            b = tl.load(
                x + j[:, None].to(tl.int64) * row + f[None, :],
                mask=(j < n)[:, None] & (f < features)[None, :],
                other=0.0,
            )
            d = a.to(tl.float32).to(real)[:, None, :] - b.to(tl.float32).to(real)[None, :, :]
            total += tl.sum(d * d, 2)
        mask = (i < n)[:, None] & (j < n)[None, :]
        at = i[:, None].to(tl.int64) * n + j[None, :]
        mirror = j[None, :].to(tl.int64) * n + i[:, None]
        high = total.to(tl.float32)
        tl.store(hi + at, high, mask=mask)
        tl.store(hi + mirror, high, mask=mask)
        if SPLIT:
            low = (total - high.to(tl.float64)).to(tl.float32)
            tl.store(lo + at, low, mask=mask)
            tl.store(lo + mirror, low, mask=mask)


@triton.jit
def gradient_kernel(x, weights, dx, n, features, row, out_row, S: tl.constexpr, P: tl.constexpr, W: tl.constexpr):
    """dx_i = sum_j 2 (w_ij + w_ji) (x_i - x_j) of S samples and W features, P partners at a time."""
    i = tl.program_id(0) * S + tl.arange(0, S)
    f = tl.program_id(1) * W + tl.arange(0, W)
    inside = (i < n)[:, None] & (f < features)[None, :]
    own = tl.load(x + i[:, None].to(tl.int64) * row + f[None, :], mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([S, W], tl.float32)
    for j0 in range(0, n, P):
        j = j0 + tl.arange(0, P)
        pair = (i < n)[:, None] & (j < n)[None, :]
        w = tl.load(weights + i[:, None].to(tl.int64) * n + j[None, :], mask=pair, other=0.0)
        w += tl.load(weights + j[None, :].to(tl.int64) * n + i[:, None], mask=pair, other=0.0)
        y = tl.load(
            x + j[:, None].to(tl.int64) * row + f[None, :], mask=(j < n)[:, None] & (f < features)[None, :], other=0.0
        ).to(tl.float32)
        total += tl.sum(w[:, :, None] * (own[:, None, :] - y[None, :, :]), 1)
    at = i[:, None].to(tl.int64) * out_row + f[None, :]
    tl.store(dx + at, cast(2.0 * total, dx.dtype.element_ty), mask=inside)


@triton.jit
def _distance(d2, eps, SQUARED: tl.constexpr):
    x = tl.maximum(d2, eps, propagate_nan=NAN)
    return x if SQUARED else tl.sqrt_rn(x)


@triton.jit
def _pairs(student, teacher, mask, n, B: tl.constexpr):
    """Offsets of a program's pairs, whether they count, their weight, and both squared distances."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < long(n) * n
    live = inside & (at // n != at % n)
    w = tl.where(live, 1.0, 0.0)
    if mask is not None:
        w = tl.load(mask + at, mask=live, other=0.0)
    s = tl.load(student + at, mask=live, other=0.0)
    t = tl.load(teacher + at, mask=live, other=0.0)
    return at, inside, live, w, s, t


@triton.jit
def _slopes(s, t, sums, eps, beta, NORMALIZE: tl.constexpr, SQUARED: tl.constexpr):
    """Both distances, their factors, the difference over beta and the slope of smooth-L1 there."""
    s = _distance(s, eps, SQUARED)
    t = _distance(t, eps, SQUARED)
    by_s = 1.0
    by_t = 1.0
    if NORMALIZE:
        by_s = _inverse_mean(sums, 1)
        by_t = _inverse_mean(sums, 2)
    x = apart(s * by_s, t * by_t) / beta
    return s, t, by_s, by_t, x, tl.minimum(tl.maximum(x, -1.0, propagate_nan=NAN), 1.0, propagate_nan=NAN)


@triton.jit
def _inverse_mean(sums, which):
    total = tl.load(sums + which)
    return tl.where(total <= 0.0, 0.0, tl.load(sums + 2 + which) / tl.where(total <= 0.0, 1.0, total))


@triton.jit
def mean_kernel(student, teacher, mask, partial, n, eps, B: tl.constexpr, SQUARED: tl.constexpr):
    """A program's sums: weight, weighted distances, weight where they are positive."""
    _at, _inside, _live, w, s, t = _pairs(student, teacher, mask, n, B)
    s = _distance(s, eps, SQUARED)
    t = _distance(t, eps, SQUARED)
    out = partial + tl.program_id(0).to(tl.int64) * 8
    tl.store(out, tl.sum(w, 0))
    tl.store(out + 1, tl.sum(w * s, 0))
    tl.store(out + 2, tl.sum(w * t, 0))
    tl.store(out + 3, tl.sum(tl.where(s > 0.0, w, 0.0), 0))
    tl.store(out + 4, tl.sum(tl.where(t > 0.0, w, 0.0), 0))


@triton.jit
def value_kernel(
    student, teacher, mask, sums, partial, n, eps, beta, B: tl.constexpr, SQUARED: tl.constexpr, NORMALIZE: tl.constexpr
):
    """A program's sums: the loss over beta, slope times either distance."""
    _at, _inside, _live, w, s, t = _pairs(student, teacher, mask, n, B)
    s, t, _by_s, _by_t, x, c = _slopes(s, t, sums, eps, beta, NORMALIZE, SQUARED)
    out = partial + tl.program_id(0).to(tl.int64) * 8
    tl.store(out, tl.sum(w * c * (x - 0.5 * c), 0))
    tl.store(out + 1, tl.sum(w * c * s, 0))
    tl.store(out + 2, tl.sum(w * c * t, 0))


@triton.jit
def total_kernel(partial, sums, parts, stride, B: tl.constexpr):
    """sums[f] = sum of partial[p * stride + f] over p in their order; one program a field."""
    f = tl.program_id(0)
    acc = tl.zeros([B], tl.float64)
    for p0 in range(0, parts, B):
        p = p0 + tl.arange(0, B)
        acc += tl.load(partial + p.to(tl.int64) * stride + f, mask=p < parts, other=0.0).to(tl.float64)
    tl.store(sums + f, tl.sum(acc, 0).to(tl.float32))


@triton.jit
def _through_mean(sums, values, which, sign):
    """What each distance gets back through its mean: sum of slope times distance / (count mean^2)."""
    total = tl.load(sums + which)
    count = tl.load(sums + 2 + which)
    safe = tl.where(total > 0.0, total, 1.0)
    return tl.where(total > 0.0, sign * tl.load(values + which) / safe * (count / safe), 0.0)


@triton.jit
def match_kernel(
    student, teacher, mask, sums, values, loss, ds, dt, n, eps, beta, divisor, REDUCTION: tl.constexpr, B: tl.constexpr,
    SQUARED: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Gradients of a program's pairs; the first program also writes the loss."""
    at, inside, live, w, s2, t2 = _pairs(student, teacher, mask, n, B)
    s, t, by_s, by_t, _x, c = _slopes(s2, t2, sums, eps, beta, NORMALIZE, SQUARED)
    scale = divisor
    if REDUCTION == 1:
        kept = tl.load(sums)
        scale = tl.where(kept != 0.0, 1.0 / tl.where(kept != 0.0, kept, 1.0), 0.0)
    if tl.program_id(0) == 0:
        tl.store(loss, tl.load(values) * beta * scale)
    if ds is not None:
        slope = c * by_s
        if NORMALIZE:
            slope -= _through_mean(sums, values, 1, 1.0)
        one = 1.0 if SQUARED else 0.5 / tl.where(s > 0.0, s, 1.0)
        g = tl.where(live & (s2 >= eps) & (s2 > 0.0), scale * w * slope * one, 0.0)
        tl.store(ds + at, g, mask=inside)
    if dt is not None:
        slope_t = -c * by_t
        if NORMALIZE:
            slope_t -= _through_mean(sums, values, 2, -1.0)
        one_t = 1.0 if SQUARED else 0.5 / tl.where(t > 0.0, t, 1.0)
        h = tl.where(live & (t2 >= eps) & (t2 > 0.0), scale * w * slope_t * one_t, 0.0)
        tl.store(dt + at, h, mask=inside)


def forward(x: torch.Tensor, hi: torch.Tensor, lo: torch.Tensor | None) -> None:
    """The entry pairwise_distance_forward."""
    n, features = x.shape
    tiles = triton.cdiv(n, TILE)
    with on(x.device):
        distance_kernel[(tiles, tiles)](
            x, hi, lo, n, features, x.stride(0), T=TILE, F=FEATURES, SPLIT=lo is not None, num_warps=4
        )


def backward(x: torch.Tensor, weights: torch.Tensor, dx: torch.Tensor) -> None:
    """The entry pairwise_distance_backward."""
    n, features = x.shape
    with on(x.device):
        gradient_kernel[(triton.cdiv(n, STRIP), triton.cdiv(features, WIDTH))](
            x, weights, dx, n, features, x.stride(0), dx.stride(0), S=STRIP, P=PARTNERS, W=WIDTH, num_warps=4
        )


def match(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    scalars: torch.Tensor,
    loss: torch.Tensor,
    ds: torch.Tensor | None,
    dt: torch.Tensor | None,
    squared: int,
    normalize: int,
    reduction: int,
) -> None:
    """The entry distance_match."""
    n = student.shape[0]
    beta, eps, *_ = scalars.tolist()
    programs = triton.cdiv(n * n, BLOCK)
    partial, sums = student.new_empty(programs, FIELDS), student.new_empty(2, FIELDS)
    options = {"B": BLOCK, "SQUARED": bool(squared), "num_warps": 4}
    with on(student.device):
        mean_kernel[(programs,)](student, teacher, mask, partial, n, eps, **options)
        total_kernel[(5,)](partial, sums, programs, FIELDS, B=BLOCK)
        value_kernel[(programs,)](
            student, teacher, mask, sums, partial, n, eps, beta, **options, NORMALIZE=bool(normalize)
        )
        total_kernel[(3,)](partial, sums[1], programs, FIELDS, B=BLOCK)
        gradients = ds is not None or dt is not None
        match_kernel[(programs if gradients else 1,)](
            student, teacher, mask, sums, sums[1], loss, ds, dt, n, eps, beta, 1.0 / (n * n) if reduction == 0 else 1.0,
            REDUCTION=reduction, **options, NORMALIZE=bool(normalize),
        )  # fmt: skip


def aot_signatures() -> list[dict]:
    """Representative compilations for kdkernels.bench.static."""
    matrices = dict.fromkeys(("student", "teacher", "sums", "values", "loss", "ds", "partial"), "*fp32")
    rows = []
    for x in ("fp32", "bf16"):
        rows.append(
            signature(f"distances, split, {x}", distance_kernel, {"x": f"*{x}", "hi": "*fp32", "lo": "*fp32"}, (),
                      T=TILE, F=FEATURES, SPLIT=True)
        )  # fmt: skip
        rows.append(
            signature(f"distances, {x}", distance_kernel, {"x": f"*{x}", "hi": "*fp32", "lo": None}, (),
                      T=TILE, F=FEATURES, SPLIT=False)
        )  # fmt: skip
        rows.append(
            signature(f"gradient, {x}", gradient_kernel, {"x": f"*{x}", "weights": "*fp32", "dx": f"*{x}"}, (),
                      S=STRIP, P=PARTNERS, W=WIDTH)
        )  # fmt: skip
    flags = {"B": BLOCK, "SQUARED": False, "NORMALIZE": True}
    for name, kernel, extra in (
        ("match, values", value_kernel, {}),
        ("match, gradients", match_kernel, {"REDUCTION": 0}),
    ):
        pointers = {n: t for n, t in matrices.items() if n in kernel.arg_names} | {"mask": None}
        if kernel is match_kernel:
            pointers["dt"] = None
        floats = tuple(n for n in ("eps", "beta", "divisor") if n in kernel.arg_names)
        rows.append(signature(name, kernel, pointers, floats, **flags, **extra))
    return rows
