"""Samples without labels beside those with."""

from __future__ import annotations

import torch

from kdkernels import checks
from kdkernels.losses.logits import kl_div
from kdkernels.schemes.labels import cross_entropy


def semi_supervised_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    weight: float = 1.0,
    threshold: float = 0.0,
    pseudo_labels: bool = False,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
) -> torch.Tensor:
    """Labels where there are any, and a teacher on every row.

    CE(z_s, y) over the rows with a label + weight / N sum over the rows where max p_t >= threshold of either
    T^2 KL(p_t, p_s), or CE(z_s, argmax p_t) with `pseudo_labels` (Lee 2013; with a threshold of 0.95 and a teacher that is
    the student on a weaker augmentation, FixMatch: Sohn et al. 2020, arXiv:2001.07685). Without any label it is
    distillation on unlabelled data alone. N counts the rows below the threshold too, so that an unsure teacher weighs less.

    Args:
        student_logits: scores, (..., V).
        teacher_logits: of that shape; they get no gradient.
        labels: class indices, (...); a row without a label has `ignore_index`.
        weight: of the teacher's term.
        threshold: of the teacher's largest probability, at temperature 1.
        temperature: of the divergence, T > 0.
        backend: as kl_div.

    Raises:
        ValueError, TypeError, IndexError, BackendError: as kl_div; a threshold outside 0 to 1, a negative weight.
    """
    checks.scores("student_logits", student_logits, "teacher_logits", teacher_logits, -1)
    checks.plain_number("weight", weight, low=0)
    checks.flag("pseudo_labels", pseudo_labels)
    checks.plain_number("threshold", threshold, low=0, high=1)
    teacher_logits = teacher_logits.detach()
    rows = max(teacher_logits.shape[:-1].numel(), 1)
    wide = torch.promote_types(teacher_logits.dtype, torch.float32)
    confidence, said = teacher_logits.to(wide).softmax(-1).max(-1)
    sure = confidence >= threshold
    if pseudo_labels:
        taught = cross_entropy(student_logits, said.where(sure, ignore_index), ignore_index) * sure.sum() / rows
    else:
        taught = kl_div(
            student_logits, teacher_logits, temperature=temperature, weight=sure, num_items=rows, backend=backend
        )
    return cross_entropy(student_logits, labels, ignore_index) + weight * taught
