"""The operator of triplet angles, and the relations of samples with their gradient: distances, angles, or both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from kdkernels.ops.library import define, first_order
from kdkernels.ops.pairwise_distance import op as pairwise
from kdkernels.ops.scalars import pack
from kdkernels.ops.scale.op import scaled
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


angles = define(
    "triplet_angle(Tensor student, Tensor student_lo, Tensor teacher, Tensor teacher_lo, Tensor scalars, "
    "bool want_student, bool want_teacher, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)


class Distances(NamedTuple):
    """The match of two matrices of distances, each over its own mean."""

    beta: float  # where smooth-L1 turns linear
    eps: float  # the least squared distance of two different samples
    squared: bool  # match squared distances
    normalize: bool  # divide by the mean over the kept pairs whose distance is positive; it is in the graph
    reduction: str  # "mean" over N^2, "pairs" over the kept pairs' weights, or "sum"


class Angles(NamedTuple):
    """The match of the cosines of all angles at i between j and k, over all N^3 triplets."""

    beta: float
    reduction: str  # "mean" over N^3, or "sum"


def _terms(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, distance: Distances | None,
    angle: Angles | None, wanted: tuple[bool, bool], backend: str,
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:  # fmt: skip
    """For each term its loss, and the gradients of both models' squared distances."""
    s, s_lo = pairwise.distances(student, angle is not None, backend)
    t, t_lo = pairwise.distances(teacher, angle is not None, backend)
    made = []
    if distance is not None:
        beta, eps, squared, normalize, reduction = distance
        flags = squared, normalize, pairwise.REDUCTIONS.index(reduction), *wanted, backend
        made.append(pairwise.match(s, t, mask, pack((beta, eps, 0.0, 0.0)), *flags))
    if angle is not None:
        beta, reduction = angle
        scale = 1.0 / max(student.shape[0] ** 3, 1) if reduction == "mean" else 1.0
        made.append(angles(s, s_lo, t, t_lo, pack((beta, scale)), *wanted, backend))
    return made


class Relations(torch.autograd.Function):
    """Losses and the gradients of the squared distances in one pass; the samples' gradients in the backward.

    The stored gradients are float32 whatever the samples are, and the first parts' stand for those of the sums, so
    float16 needs no other path.
    """

    @staticmethod
    def forward(ctx, student, teacher, mask, distance, angle, backend):
        made = _terms(student, teacher, mask, distance, angle, ctx.needs_input_grad[:2], backend)
        ctx.save_for_backward(student, teacher, *[tensor for term in made for tensor in term])
        ctx.backend = backend
        return tuple([loss for loss, _, _ in made])

    @staticmethod
    def backward(ctx, *upstream):
        with torch.no_grad():
            student, teacher, *made = ctx.saved_tensors
            grads = []
            for model, x in enumerate((student, teacher)):
                if not ctx.needs_input_grad[model]:
                    grads.append(None)
                    continue
                weights = None
                for term, factor in enumerate(upstream):
                    (own,) = scaled((made[3 * term + 1 + model],), factor, ctx.backend)
                    weights = own if weights is None else weights + own
                grads.append(pairwise.distances_backward(x, weights, ctx.backend))
        return (*first_order("relational losses", made[0], tuple(grads)), None, None, None, None)


def relations(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    distance: Distances | None = None,
    angle: Angles | None = None,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    """The matches asked for, distance before angle, of two models' samples (N, D).

    Args:
        student, teacher: samples, each with its own D.
        mask: a weight for every ordered pair, float32 (N, N), of the distances; the diagonal never counts.
        distance, angle: the terms.
        backend: a resolved one, not "auto" or "reference".
    """
    if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        return Relations.apply(student, teacher, mask, distance, angle, backend)
    made: Any = _terms(student, teacher, mask, distance, angle, (False, False), backend)
    return tuple([loss for loss, _, _ in made])
