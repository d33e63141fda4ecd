"""The match of Gram matrices in plain PyTorch: the oracle of the tests, and the fallback.

Masking is done before the arithmetic (the "double where"), so that a zero row has a finite value and gradient 0.
"""

from __future__ import annotations

import math

import torch

from kdkernels.ops.gram_match.kinds import Kind, Normalize


def unit(x: torch.Tensor, dim: int, eps: float, shifted: bool = False) -> torch.Tensor:
    """x over its length along dim: at least eps, or with eps added. A zero vector stays zero."""
    alive = (x != 0).any(dim, keepdim=True)
    length = torch.linalg.vector_norm(x.where(alive, 1.0), dim=dim, keepdim=True)
    return (x / (length + eps if shifted else length.clamp_min(eps))).where(alive, 0.0)


def _series(c: torch.Tensor, gamma: float, order: int) -> torch.Tensor:
    """e^(-2 gamma) sum over p = 0..order of (2 gamma c)^p / p!."""
    total = torch.ones_like(c)
    for p in range(1, order + 1):
        total = total + (2 * gamma) ** p / math.factorial(p) * c**p
    return math.exp(-2 * gamma) * total


def _rows(g: torch.Tensor, eps: float, p: int) -> torch.Tensor:
    """Rows over their p-norm."""
    if p == 2:
        return unit(g, -1, eps)
    alive = (g != 0).any(-1, keepdim=True)
    return (g / g.where(alive, 1.0).abs().sum(-1, keepdim=True).clamp_min(eps)).where(alive, 0.0)


def gram_match(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_other: torch.Tensor | None,
    teacher_other: torch.Tensor | None,
    *,
    kind: Kind,
    normalize: Normalize,
    order: int,
    scale: float,
    factors: tuple[float, float],
    eps: float,
    gamma: float,
) -> torch.Tensor:
    """The same operation as op.gram_match, whose docstring says what each argument is."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    s, t = student.to(dtype), teacher.to(dtype)
    if normalize == Normalize.COLUMNS:
        s, t = unit(s, -2, eps), unit(t, -2, eps)
    elif normalize != Normalize.NONE:
        s, t = (unit(x, -1, eps, normalize == Normalize.SHIFTED) for x in (s, t))
    if kind == Kind.SIGNED:
        rows = torch.cat([s, t], -2)
        weight = torch.cat([x.new_full(x.shape[-2:-1], sign / x.shape[-2]) for x, sign in ((s, 1), (t, -1))])
        squares = (rows @ rows.mT).square()
        return scale * (weight[:, None] * weight * squares).sum()
    g = factors[0] * (s @ (s if student_other is None else student_other.to(dtype)).mT)
    h = factors[1] * (t @ (t if teacher_other is None else teacher_other.to(dtype)).mT)
    return match(g, h, kind=kind, order=order, scale=scale, eps=eps, gamma=gamma)


def match(
    g: torch.Tensor,
    h: torch.Tensor,
    *,
    kind: Kind,
    order: int = 0,
    scale: float = 1.0,
    eps: float = 1e-12,
    gamma: float = 0.4,
) -> torch.Tensor:
    """What is compared of two Gram matrices, or of rows of them."""
    if kind == Kind.PROBABILITIES:
        p, q = (0.5 * g + 0.5, 0.5 * h + 0.5)
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
        return scale * (q * torch.log((q + eps) / (p + eps))).sum()
    if kind == Kind.LENGTHS:
        square = (g - h).square().sum(-1)
        apart = square > 0
        return scale * square.where(apart, 1.0).sqrt().where(apart, 0.0).sum()
    if kind == Kind.SERIES:
        g, h = _series(g, gamma, order), _series(h, gamma, order)
    elif kind in (Kind.ROWS, Kind.ROWS_L1):
        g, h = (_rows(x, eps, 2 if kind == Kind.ROWS else 1) for x in (g, h))
    return scale * (g - h).square().sum()
