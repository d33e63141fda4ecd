"""The angles of all triplets in plain PyTorch, from their definition: the oracle of the tests, and the fallback.

Unit vectors between samples and their scalar products, not the law of cosines that the kernels use.
"""

from __future__ import annotations

import torch

from kdkernels.ops.pairwise_distance.reference import by_rows, smooth_l1


def _cosines(x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """cos of the angle at i between j and k, (stop - start, N, N); 0 where i coincides with either."""
    e = x[None] - x[start:stop, None]
    apart = (e != 0).any(-1, keepdim=True)
    e = e.where(apart, 1.0)
    # Scaled first, so that squares of tiny differences do not vanish.
    e = e / e.detach().abs().amax(-1, keepdim=True)
    e = (e / e.pow(2).sum(-1, keepdim=True).sqrt()).where(apart, 0.0)
    return e @ e.transpose(1, 2)


def triplet_angle(student: torch.Tensor, teacher: torch.Tensor, *, beta: float, reduction: str) -> torch.Tensor:
    """The angle term of op.py's relations."""
    n = student.shape[0]
    dtype = torch.promote_types(student.dtype, teacher.dtype)

    def rows(start: int, stop: int, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return smooth_l1(_cosines(s, start, stop) - _cosines(t, start, stop), beta).sum((1, 2))

    total = by_rows(rows, n, n * max(n, student.shape[1], teacher.shape[1]), student.to(dtype), teacher.to(dtype)).sum()
    return total if reduction == "sum" else total / max(n**3, 1)
