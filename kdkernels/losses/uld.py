"""The loss against a teacher that has other classes: another vocabulary."""

from __future__ import annotations

import torch

from kdkernels import backends, checks
from kdkernels.losses.module import LossModule
from kdkernels.losses.rows import reduced, row_weights
from kdkernels.ops.scalars import Number
from kdkernels.ops.sorted_match.op import sorted_match


def uld_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = False,
    dim: int = -1,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Universal logit distillation, for a teacher with another vocabulary.

    sum_i |sort(p_s)_i - sort(p_t)_i|, p = softmax(logits / T) sorted from the largest, the shorter padded with zeros:
    Boizard, El Haddad, Hudelot and Colombo (2024, arXiv:2402.12030). The gradient is by hand and keeps one
    byte a class.

    Args:
        student_logits: scores, float16, bfloat16, float32 or float64, (..., V).
        teacher_logits: (..., U) with the same rows, on the same device. Gets a gradient if it requires one.
        temperature: T > 0, a number or a tensor with one element. It gets no gradient.
        teacher_temperature: the teacher's own T; default: the student's.
        scale_by_t2: multiply by the square of the student's temperature.
        dim: the class axis; only the last one.
        reduction, weight, num_items: as `topk_div`.
        labels: integers, one a row; a row where they equal `ignore_index` is left out. Others are not looked at.
        ignore_index: the label that leaves a row out.
        backend: "cpu" sorts by a kernel; "cuda" and "triton" run the same torch operations; "reference" has second
            derivatives.

    Returns:
        A float32 scalar (float64 if an input is float64), between 0 and 2 a row, or one value a row. Equal sorted
        probabilities have gradient 0, as abs has. If all rows are left out: 0, with zero gradients.

    Raises:
        ValueError, TypeError, BackendError: as topk_div.
    """
    checks.float_tensor("student_logits", student_logits)
    checks.float_tensor("teacher_logits", teacher_logits)
    checks.flag("scale_by_t2", scale_by_t2)
    checks.integer("dim", dim)
    checks.integer("ignore_index", ignore_index)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    checks.temperatures(temperature, teacher_temperature, student_logits)
    checks.items(num_items, student_logits)
    shapes = f"student_logits has shape {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)}"
    if student_logits.dim() == 0 or student_logits.dim() != teacher_logits.dim():
        raise ValueError(f"student and teacher must have the same rows and a class axis: {shapes}")
    if student_logits.shape[:-1] != teacher_logits.shape[:-1] or 0 in (
        student_logits.shape[-1],
        teacher_logits.shape[-1],
    ):
        raise ValueError(f"student and teacher must have the same rows and at least one class: {shapes}")
    if dim not in (-1, student_logits.dim() - 1):
        raise ValueError(f"dim must be the last axis (-1), got {dim}")
    if student_logits.device != teacher_logits.device:
        raise ValueError(
            f"teacher_logits must be on {student_logits.device} with student_logits, got {teacher_logits.device}"
        )
    rows, device = tuple(student_logits.shape[:-1]), student_logits.device
    weight = checks.per_row("weight", weight, rows, device)
    labels = checks.integers("labels", labels, rows, device)
    backend = backends.resolve("uld_loss", (student_logits, teacher_logits), backend)
    dtype = torch.float64 if torch.float64 in (student_logits.dtype, teacher_logits.dtype) else torch.float32
    w = row_weights(weight, labels, ignore_index, dtype)
    student, teacher = (x.reshape(-1, x.shape[-1]) for x in (student_logits, teacher_logits))
    live = None if w is None else w != 0
    if live is not None and backend == "reference":
        student, teacher = (x.where(live.reshape(-1, 1), 0.0) for x in (student, teacher))
    t_t = temperature if teacher_temperature is None else teacher_temperature
    losses = sorted_match(student, teacher, temperature, t_t, backend).view(rows)
    if w is not None and live is not None:
        losses = w * losses.where(live, 0.0)
    if scale_by_t2:
        losses = losses * temperature**2
    return reduced(losses, w, reduction, student_logits, num_items)


class ULDLoss(LossModule):
    """`uld_loss` as a module: ULDLoss()(student_logits, teacher_logits)."""

    function = staticmethod(uld_loss)
