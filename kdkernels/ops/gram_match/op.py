"""The operator that matches Gram matrices, its autograd, and the choice of backend."""

from __future__ import annotations

import torch

from kdkernels.ops.gram_match import native, reference
from kdkernels.ops.gram_match.kinds import Kind, Normalize
from kdkernels.ops.library import define, first_order
from kdkernels.ops.scalars import pack
from kdkernels.ops.scale.op import scaled


def _gradient(x: torch.Tensor | None, wanted: bool, like: torch.Tensor) -> torch.Tensor:
    """Room for the gradient of x, or an empty tensor: float32 whatever x is, until the upstream scale is known."""
    if x is None or not wanted:
        return torch.empty(0, dtype=torch.float32, device=like.device)
    return torch.empty_like(x, dtype=torch.float32)


def _gradients(tensors: tuple[torch.Tensor | None, ...], wanted: int) -> list[torch.Tensor]:
    like = tensors[0]
    assert like is not None
    return [_gradient(x, wanted >> i & 1 == 1, like) for i, x in enumerate(tensors)]


def _readable(x: torch.Tensor | None) -> torch.Tensor | None:
    """x with its rows or its columns side by side."""
    return x if x is None or 1 in x.stride()[1:] else x.contiguous()


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = (student, teacher, student_other, teacher_other)
    loss = torch.empty((), dtype=torch.float32, device=student.device)
    grads = _gradients(tensors, wanted)
    if 0 in student.shape or 0 in teacher.shape:
        return loss.zero_(), *(g.zero_() for g in grads)  # type: ignore[return-value]
    ds, dt, ds_other, dt_other = (g if wanted >> i & 1 else None for i, g in enumerate(grads))
    s: torch.Tensor | None
    t: torch.Tensor | None
    s, t, s_other, t_other = (_readable(x) for x in tensors)
    weights = None
    if kind == Kind.SIGNED:
        rows, others = student.shape[1], teacher.shape[1]
        dtype = torch.promote_types(student.dtype, teacher.dtype)
        s, t = torch.cat([student.to(dtype), teacher.to(dtype)], 1), None
        weights = torch.full((rows + others,), 1.0 / rows, dtype=torch.float32, device=student.device)
        weights[rows:] = -1.0 / others
    args = (s, s_other, t, t_other, weights, scalars, loss.view(1), ds, ds_other, dt, dt_other, kind, normalize, order)
    if backend == "triton":
        from kdkernels.ops.gram_match import triton

        triton.forward(*args)
    else:
        native.forward(backend, *args)
    return loss, *grads  # type: ignore[return-value]


def _fake(student, teacher, student_other, teacher_other, scalars, kind, normalize, order, wanted, backend):
    loss = torch.empty((), dtype=torch.float32, device=student.device)
    return loss, *_gradients((student, teacher, student_other, teacher_other), wanted)


define(
    "gram_match(Tensor student, Tensor teacher, Tensor? student_other, Tensor? teacher_other, Tensor scalars, int kind, "
    "int normalize, int order, int wanted, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)


class GramMatch(torch.autograd.Function):
    """Loss and all gradients in one pass."""

    @staticmethod
    def forward(ctx, student, teacher, student_other, teacher_other, scalars, options):
        *flags, backend = options
        wanted = sum(1 << i for i, want in enumerate(ctx.needs_input_grad[:4]) if want)
        loss, *grads = torch.ops.kdkernels.gram_match(
            student, teacher, student_other, teacher_other, scalars, *flags, wanted, backend
        )
        ctx.save_for_backward(loss, *grads)
        ctx.backend = backend
        ctx.dtypes = [None if x is None else x.dtype for x in (student, teacher, student_other, teacher_other)]
        return loss

    @staticmethod
    def backward(ctx, upstream):
        wanted = ctx.needs_input_grad[:4]
        with torch.no_grad():
            loss, *made = ctx.saved_tensors
            stored = tuple(g for g, want in zip(made, wanted) if want)
            grads = iter(scaled(stored, upstream, ctx.backend))
            out = tuple(next(grads).to(dtype) if want else None for want, dtype in zip(wanted, ctx.dtypes))
        return (*first_order("gram_match", loss, out), None, None)


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
        student, teacher: rows of features, (B, R, K), K their own (R too with Kind.SIGNED). Any strides.
        student_other, teacher_other: the right factors, (B, Q, K), where they are not the left ones: then nothing is
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
    scalars = pack((scale, *factors, eps, gamma))
    return GramMatch.apply(
        student, teacher, student_other, teacher_other, scalars, (kind.value, normalize.value, order, backend)
    )
