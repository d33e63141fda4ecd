"""The operator of triplet angles, and the choice of backend."""

from __future__ import annotations

import torch

from kdkernels.ops.library import define
from kdkernels.ops.pairwise_distance.op import stored_gradients
from kdkernels.ops.scalars import Number, pack
from kdkernels.ops.triplet_angle import native

REDUCTIONS = ("mean", "sum")


def _forward(
    student: torch.Tensor,
    student_lo: torch.Tensor,
    teacher: torch.Tensor,
    teacher_lo: torch.Tensor,
    scalars: torch.Tensor,
    want_student: bool,
    want_teacher: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss = student.new_empty(())
    ds = torch.empty_like(student) if want_student else student.new_empty(0)
    dt = torch.empty_like(teacher) if want_teacher else teacher.new_empty(0)
    if student.shape[0] == 0:
        return loss.zero_(), ds, dt
    args = (
        student, student_lo, teacher, teacher_lo, scalars, loss.view(1),
        ds if want_student else None, dt if want_teacher else None,
    )  # fmt: skip
    if backend == "triton":
        from kdkernels.ops.triplet_angle import triton

        triton.forward(*args)
    else:
        native.forward(backend, *args)
    return loss, ds, dt


def _fake(student, student_lo, teacher, teacher_lo, scalars, want_student, want_teacher, backend):
    return (
        student.new_empty(()),
        torch.empty_like(student) if want_student else student.new_empty(0),
        torch.empty_like(teacher) if want_teacher else teacher.new_empty(0),
    )


define(
    "triplet_angle(Tensor student, Tensor student_lo, Tensor teacher, Tensor teacher_lo, Tensor scalars, "
    "bool want_student, bool want_teacher, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)


class TripletAngle(torch.autograd.Function):
    """Loss and both gradients in one pass; the first parts' gradients stand for those of the sums."""

    @staticmethod
    def forward(ctx, student, teacher, student_lo, teacher_lo, scalars, backend):
        loss, ds, dt = torch.ops.kdkernels.triplet_angle(
            student, student_lo, teacher, teacher_lo, scalars, *ctx.needs_input_grad[:2], backend
        )
        ctx.save_for_backward(loss, ds, dt)
        ctx.backend = backend
        return loss

    @staticmethod
    def backward(ctx, upstream):
        grads = stored_gradients(ctx, "triplet_angle", upstream, ctx.needs_input_grad[:2])
        return (*grads, None, None, None, None)


def triplet_angle(
    student: tuple[torch.Tensor, torch.Tensor],
    teacher: tuple[torch.Tensor, torch.Tensor],
    *,
    beta: Number,
    reduction: str,
    backend: str,
) -> torch.Tensor:
    """Smooth-L1 between the cosines of all angles at i between j and k, over all N^3 triplets.

    Args:
        student, teacher: squared distances in two parts, as squared_distances(split=True) returns them.
        beta: where smooth-L1 turns linear.
        reduction: "mean" over N^3, or "sum".
        backend: a resolved one.
    """
    n = student[0].shape[0]
    scale = 1.0 / max(n**3, 1) if reduction == "mean" else 1.0
    (s, s_lo), (t, t_lo) = student, teacher
    return TripletAngle.apply(
        s.contiguous(), t.contiguous(), s_lo.contiguous(), t_lo.contiguous(), pack((beta, scale)), backend
    )
