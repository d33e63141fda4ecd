"""DIST in plain PyTorch: the oracle of the tests (in float64) and the fallback everywhere."""

from __future__ import annotations

import torch


def _centred(p: torch.Tensor, w: torch.Tensor, origin: torch.Tensor, dim: int) -> torch.Tensor:
    """p less its weighted mean along `dim`; exactly 0 where p equals `origin` throughout."""
    d = p - origin.detach()
    return d - (w * d).sum(dim, keepdim=True) / w.sum(dim, keepdim=True)


def pearson(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, eps: float, clamp: bool, dim: int) -> torch.Tensor:
    """Correlations of what _centred returned; 0 with gradient 0 where either is constant."""
    xx, yy = (w * x * x).sum(dim), (w * y * y).sum(dim)
    constant = (xx == 0) | (yy == 0)
    nx, ny = (torch.sqrt(n.masked_fill(constant, 1.0)) for n in (xx, yy))
    if clamp:  # in torch's cosine_similarity the clamp is no part of the graph
        nx, ny = (n + (n.clamp(min=eps) - n).detach() for n in (nx, ny))
        below = nx * ny
    else:
        below = nx * ny + eps
    return ((w * x * y).sum(dim) / below).masked_fill(constant, 0.0)


def dist(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    beta: float | torch.Tensor,
    gamma: float | torch.Tensor,
    scale_by_t2: bool,
    eps: float,
    clamp: bool,
    dim: int,
    labels: torch.Tensor | None,
    weight: torch.Tensor | None,
    ignore_index: int,
) -> torch.Tensor:
    """The same operation as op.dist, whose docstring says what each argument is."""
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    s, t = (x.movedim(dim, -1).to(dtype).flatten(0, -2) for x in (student, teacher))
    w = torch.ones(s.shape[0], dtype=dtype, device=s.device) if weight is None else weight.reshape(-1).to(dtype)
    if labels is not None:
        w = w.masked_fill(labels.reshape(-1) == ignore_index, 0.0)
    kept = w != 0
    if not kept.any():
        return 0.0 * (s.where(kept[:, None], 0.0).sum() + t.where(kept[:, None], 0.0).sum())
    s, t, w = s[kept], t[kept], w[kept].unsqueeze(1)
    p, q = torch.softmax(s / temperature, 1), torch.softmax(t / temperature, 1)
    one = torch.ones_like(p)
    rows = pearson(_centred(p, one, p[:, :1], 1), _centred(q, one, q[:, :1], 1), one, eps, clamp, 1)
    loss = beta * (w[:, 0] * (1 - rows)).sum() / w.sum()
    if len(s) > 1:
        columns = pearson(_centred(p, w, p[:1], 0), _centred(q, w, q[:1], 0), w, eps, clamp, 0)
        loss = loss + gamma * (1 - columns).mean()
    return (loss * temperature**2 if scale_by_t2 else loss).reshape(())
