"""Losses between samples from this rank's rows of the matrices over all of them; what the rows need of each other is added up.

Plain PyTorch on (N_local, N). A loss fits here where a row has its value from itself and from a few sums over all rows;
angles, graph closures and IRG's edges do not: they need pairs of other ranks' samples, or a maximum with a gradient.
"""

from __future__ import annotations

from typing import Any

import torch

from kdkernels.distributed.batch import Samples
from kdkernels.distributed.ring import others, products
from kdkernels.ops.gram_match import reference
from kdkernels.ops.gram_match.kinds import Kind, Normalize
from kdkernels.ops.pairwise_distance.reference import smooth_l1


def gram_match(
    student: torch.Tensor,
    teacher: torch.Tensor,
    samples: Samples,
    *,
    kind: Kind,
    normalize: Normalize = Normalize.NONE,
    eps: float = 1e-12,
    **options: Any,
) -> torch.Tensor:
    """ops.gram_match of all samples of kinds whose rows are apart, from this rank's, (N_local, D)."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    s, t = student.to(dtype), teacher.to(dtype)
    if normalize != Normalize.NONE:
        s, t = (reference.unit(x, 1, eps, normalize == Normalize.SHIFTED) for x in (s, t))
    g, h = products(s, s, samples), products(t, t, samples)
    return samples.total(reference.match(g, h, kind=kind, eps=eps, **options))


def _distances(d2: torch.Tensor, other: torch.Tensor, eps: float, squared: bool) -> torch.Tensor:
    kept = other & (d2 >= eps) & (d2 > 0)
    d = d2.where(kept, 1.0)
    return (d if squared else d.sqrt()).where(kept, eps if squared else eps**0.5).where(other, 0.0)


def distance_match(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    samples: Samples,
    *,
    beta: float,
    eps: float,
    squared: bool,
    normalize: bool,
    reduction: str,
) -> torch.Tensor:
    """ops.pairwise_distance's match from rows of squared distances."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    other = others(samples, student.device)
    keep = other.to(dtype) if mask is None else mask.to(dtype) * other
    found = []
    for d2 in (student, teacher):
        d = _distances(d2.to(dtype), other, eps, squared)
        if normalize:
            weight = keep * (d > 0)
            count, total = samples.total(torch.stack([weight.sum(), (weight * d).sum()]))
            mean = total / count.where(count > 0, 1.0)
            d = d / mean.where(mean > 0, 1.0)
        found.append(d)
    loss = samples.total((keep * smooth_l1(found[0] - found[1], beta)).sum())
    if reduction == "sum":
        return loss
    if reduction == "mean":
        return loss / max(samples.whole**2, 1)
    kept = samples.total(keep.sum())
    return loss / kept.where(kept != 0, 1.0)


def info_nce(x: torch.Tensor, y: torch.Tensor, samples: Samples, scale: Any) -> torch.Tensor:
    """-log softmax_j(scale x_i . y_j)_i of this rank's i, all ranks' y being the candidates."""
    z = products(x, y, samples) * scale
    return z.logsumexp(1) - z[:, samples.own].diagonal()
