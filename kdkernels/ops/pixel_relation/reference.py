"""Relations between pixels in plain PyTorch, image by image: the oracle of the tests, and the fallback."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _common(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.to(dtype)


def pixel_similarity(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The same operation as op.pixel_similarity."""
    student, teacher = _common(student, teacher)
    total = student[:0].sum() + teacher[:0].sum()
    for s, t in zip(student, teacher, strict=True):
        total = total + (s @ s.t() - t @ t.t()).pow(2).sum()
    return total


def cross_image_relation(student: torch.Tensor, teacher: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """The same operation as op.cross_image_relation."""
    student, teacher = _common(student, teacher)
    total = student[:0].sum() + teacher[:0].sum()
    for s_i, t_i in zip(student, teacher, strict=True):
        for s_j, t_j in zip(student, teacher, strict=True):
            own = F.log_softmax(s_i @ s_j.t() / temperature, 1)
            target = F.log_softmax(t_i @ t_j.t() / temperature, 1)
            total = total + (target.exp() * (target - own)).sum()
    return total
