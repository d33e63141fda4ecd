"""The operator that matches Gram matrices, its autograd, and the choice of backend."""

from __future__ import annotations

import torch

from kdkernels.ops.gram_match import native, reference
from kdkernels.ops.gram_match.kinds import Kind, Normalize
from kdkernels.ops.library import define, learns
from kdkernels.ops.scalars import pack
from kdkernels.ops.scale.op import learners, with_gradients

Outputs = tuple[torch.Tensor, list[torch.Tensor]]


def _outputs(tensors: tuple[torch.Tensor | None, ...], wanted: int) -> Outputs:
    """Room for the loss, and for the gradients that are wanted: float32, since their upstream scale is not known yet."""
    assert tensors[0] is not None
    return torch.empty((), dtype=torch.float32, device=tensors[0].device), [
        torch.empty_like(x, dtype=torch.float32) for i, x in enumerate(tensors) if x is not None and wanted >> i & 1
    ]


def _batch(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 3 else x.unsqueeze(0)


def _readable(x: torch.Tensor | None) -> torch.Tensor | None:
    """x as a batch, with its rows or its columns side by side."""
    if x is None:
        return None
    x = _batch(x)
    return x if 1 in x.stride()[1:] else x.contiguous()


def _forward(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_other: torch.Tensor | None,
    teacher_other: torch.Tensor | None,
    scalars: torch.Tensor,
    kind: int,
    normalize: int,
    order: int,
    wanted: int,
    backend: str,
) -> Outputs:
    tensors = (student, teacher, student_other, teacher_other)
    loss, grads = _outputs(tensors, wanted)
    if 0 in student.shape or 0 in teacher.shape:
        return loss.zero_(), [g.zero_() for g in grads]
    made = iter(grads)
    ds, dt, ds_other, dt_other = (_batch(next(made)) if wanted >> i & 1 else None for i in range(4))
    s, t, s_other, t_other = (_readable(x) for x in tensors)
    weights = None
    if kind == Kind.SIGNED:
        rows, others = student.shape[-2], teacher.shape[-2]
        dtype = torch.promote_types(student.dtype, teacher.dtype)
        s, t = _readable(torch.cat([student.to(dtype), teacher.to(dtype)], -2)), None
        weights = torch.full((rows + others,), 1.0 / rows, dtype=torch.float32, device=student.device)
        weights[rows:] = -1.0 / others
    args = (s, s_other, t, t_other, weights, scalars, loss.view(1), ds, ds_other, dt, dt_other, kind, normalize, order)
    if backend == "triton":
        from kdkernels.ops.gram_match import triton

        triton.forward(*args)
    else:
        native.forward(backend, *args)
    return loss, grads


def _fake(student, teacher, student_other, teacher_other, scalars, kind, normalize, order, wanted, backend):
    return _outputs((student, teacher, student_other, teacher_other), wanted)


gram_match_op = define(
    "gram_match(Tensor student, Tensor teacher, Tensor? student_other, Tensor? teacher_other, Tensor scalars, int kind, "
    "int normalize, int order, int wanted, str backend) -> (Tensor, Tensor[])",
    _forward,
    _fake,
)


def gram_match(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_other: torch.Tensor | None = None,
    teacher_other: torch.Tensor | None = None,
    *,
    kind: Kind,
    normalize: Normalize = Normalize.NONE,
    order: int = 0,
    scale: float = 1.0,
    factors: tuple[float, float] = (1.0, 1.0),
    eps: float = 1e-12,
    gamma: float = 0.0,
    backend: str,
) -> torch.Tensor:
    """`scale` times the sum over a batch of what is between the Gram matrices of a student and a teacher.

    Args:
        student, teacher: rows of features, (B, R, K) or (R, K), K their own (R too with Kind.SIGNED). Any strides.
        student_other, teacher_other: the right factors, (B, Q, K) or (Q, K), where they are not the left ones: then nothing is
            normalised, and kind is LINEAR or LENGTHS.
        kind: what is compared.
        normalize: of the features, before.
        order: of Kind.SERIES.
        scale: of the loss.
        factors: of the student's and of the teacher's matrix.
        eps: of the normalisations, and of the probabilities' logarithms.
        gamma: of Kind.SERIES.
        backend: a resolved one.
    """
    if backend == "reference":
        return reference.gram_match(
            student, teacher, student_other, teacher_other, kind=kind, normalize=normalize, order=order, scale=scale,
            factors=factors, eps=eps, gamma=gamma,
        )  # fmt: skip
    inputs = student, teacher, student_other, teacher_other
    wants = [learns(x) for x in inputs]
    wanted = sum(1 << i for i, want in enumerate(wants) if want)
    loss, grads = gram_match_op(
        *inputs, pack((scale, *factors, eps, gamma)), kind.value, normalize.value, order, wanted, backend
    )
    if not wanted:
        return loss
    return with_gradients("gram_match", backend, loss, grads, learners(inputs, wants))
