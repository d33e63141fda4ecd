"""Distances of samples and their match in plain PyTorch: the oracle of the tests, and the fallback.

Everything is from differences of samples, never from a Gram matrix, so that in float64 it is right
on clusters far from the origin. Masking is done before the arithmetic (the "double where").
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

ELEMENTS = 1 << 24  # of the differences of samples at a time


def by_rows(function, n: int, elements: int, *tensors: torch.Tensor) -> torch.Tensor:
    """function(start, stop, *tensors) over rows, joined: in shares that are made again in the backward."""
    step = max(1, ELEMENTS // max(elements, 1))
    if n <= step:
        return function(0, n, *tensors)
    parts = [checkpoint(function, at, min(at + step, n), *tensors, use_reentrant=False) for at in range(0, n, step)]
    return torch.cat(parts)


def squared_distances(x: torch.Tensor) -> torch.Tensor:
    """|x_i - x_j|^2, (N, N)."""
    n, features = x.shape

    def rows(start: int, stop: int, x: torch.Tensor) -> torch.Tensor:
        return (x[start:stop, None] - x[None]).pow(2).sum(-1)

    return by_rows(rows, n, n * features, x)


def distances(d2: torch.Tensor, eps: float, squared: bool) -> torch.Tensor:
    """Distances from their squares, which are at least eps off the diagonal; the diagonal 0."""
    other = ~torch.eye(d2.shape[0], dtype=torch.bool, device=d2.device)
    kept = other & ~((d2 < eps) | (d2 == 0))  # so is NaN
    d = d2.where(kept, 1.0)
    d = d if squared else d.sqrt()
    floor = eps if squared else eps**0.5
    return d.where(kept, floor).where(other, 0.0)


def smooth_l1(x: torch.Tensor, beta: float) -> torch.Tensor:
    return torch.where(x.abs() < beta, 0.5 * x * x / beta, x.abs() - 0.5 * beta)


def _normalized(d: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """d over its mean over the kept pairs where it is positive."""
    weight = mask * (d > 0)
    total = weight.sum()
    mean = (weight * d).sum() / total.where(total > 0, 1.0)
    return d / mean.where(~(mean <= 0), 1.0)


def distance_match(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    beta: float,
    eps: float,
    squared: bool,
    normalize: bool,
    reduction: str,
) -> torch.Tensor:
    """The distance term of triplet_angle/op.py's relations, whose `Distances` says what each option is."""
    n = student.shape[0]
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    keep = torch.ones(n, n, dtype=dtype, device=student.device) if mask is None else mask.to(dtype)
    keep = keep * (1 - torch.eye(n, dtype=dtype, device=student.device))
    s, t = distances(student.to(dtype), eps, squared), distances(teacher.to(dtype), eps, squared)
    if normalize:
        s, t = _normalized(s, keep), _normalized(t, keep)
    total = (keep * smooth_l1(s - t, beta)).sum()
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / max(n * n, 1)
    kept = keep.sum()
    return total / kept.where(kept != 0, 1.0)
