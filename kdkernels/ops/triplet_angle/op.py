"""The operator of relations between samples: the match of distances, of triplets' angles, or of both, and its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kdkernels.ops.layout import side_by_side
from kdkernels.ops.library import define, learns
from kdkernels.ops.pairwise_distance import op as pairwise
from kdkernels.ops.scalars import Number, pack
from kdkernels.ops.scale.op import learners, with_gradients
from kdkernels.ops.triplet_angle import native, stages

REDUCTIONS = ("mean", "sum")
Outputs = tuple[torch.Tensor, list[torch.Tensor]]


def _relations(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    scalars: torch.Tensor,
    distance: bool,
    squared: bool,
    normalize: bool,
    reduction: int,
    angle: bool,
    want_student: bool,
    want_teacher: bool,
    backend: str,
) -> Outputs:
    loss, grads = _outputs(student, teacher, want_student, want_teacher)
    if student.shape[0] == 0:
        return loss.zero_(), grads
    run = native.relations if backend == "cpu" else stages.relations
    run(
        backend, side_by_side(student), side_by_side(teacher), mask, scalars, loss.view(1),
        grads[0] if want_student else None, grads[-1] if want_teacher else None,
        distance, squared, normalize, reduction, angle,
    )  # fmt: skip
    return loss, grads


def _outputs(student: torch.Tensor, teacher: torch.Tensor, want_student: bool, want_teacher: bool) -> Outputs:
    """Room for the loss and the wanted gradients: float32, since their upstream scale is not known yet."""
    inputs = ((student, want_student), (teacher, want_teacher))
    return student.new_empty((), dtype=torch.float32), [
        torch.empty(x.shape, dtype=torch.float32, device=x.device) for x, want in inputs if want
    ]


def _fake(
    student, teacher, mask, scalars, distance, squared, normalize, reduction, angle, want_student, want_teacher, backend
):
    return _outputs(student, teacher, want_student, want_teacher)


relations_op = define(
    "sample_relations(Tensor student, Tensor teacher, Tensor? mask, Tensor scalars, bool distance, bool squared, "
    "bool normalize, int reduction, bool angle, bool want_student, bool want_teacher, str backend) -> (Tensor, Tensor[])",
    _relations,
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


NO_DISTANCES, NO_ANGLES = Distances(1.0, 0.0, False, False, "sum"), Angles(1.0, "sum")


def relations(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    distance: Distances | None = None,
    angle: Angles | None = None,
    weights: tuple[Number, Number] = (1.0, 1.0),
    backend: str,
) -> torch.Tensor:
    """The weighted sum of the matches asked for of two models' samples (N, D), each with its own D.

    Args:
        student, teacher: samples.
        mask: a weight for every ordered pair, float32 (N, N), of the distances; the diagonal never counts.
        distance, angle: the terms.
        weights: of the distance and of the angle.
        backend: a resolved one, not "auto" or "reference".
    """
    u, v = weights
    if isinstance(u, torch.Tensor) or isinstance(v, torch.Tensor):  # kernels take numbers
        terms = ((u, {"distance": distance}), (v, {"angle": angle}))
        losses = [w * relations(student, teacher, mask, **term, backend=backend) for w, term in terms]  # type: ignore[arg-type]
        return losses[0] + losses[1]
    beta, eps, squared, normalize, reduction = distance or NO_DISTANCES
    angle_beta, angle_reduction = angle or NO_ANGLES
    scale = v / max(student.shape[0] ** 3, 1) if angle_reduction == "mean" else v
    inputs = student, teacher
    wanted = [learns(x) for x in inputs]
    loss, grads = relations_op(
        student, teacher, mask, pack((u, beta, eps, scale, angle_beta)), distance is not None, squared, normalize,
        pairwise.REDUCTIONS.index(reduction), angle is not None, *wanted, backend,
    )  # fmt: skip
    if not grads:
        return loss
    return with_gradients("relational losses", backend, loss, grads, learners(inputs, wanted))
