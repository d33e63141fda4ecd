"""The dist operators, their autograd, and the choice of backend."""

from __future__ import annotations

from typing import Any

import torch

from kdkernels import backends
from kdkernels.native import View
from kdkernels.ops import layout
from kdkernels.ops.dist import native, reference
from kdkernels.ops.library import define, first_order, save
from kdkernels.ops.scalars import Number, detached, pack

ROW_STATS, COLUMN_STATS = 8, 7


def _kernels(backend: str) -> Any:
    """(forward, backward) of a backend, with one argument list for all."""
    if backend == "triton":
        from kdkernels.ops.dist import triton

        return triton.forward, triton.backward
    return (lambda *a: native.forward(backend, *a)), (lambda *a: native.backward(backend, *a))


def chunks(rows: int, classes: int) -> int:
    """How many shares of the rows a GPU's column sums are made of: enough blocks, and no more."""
    return max(1, min((rows + 31) // 32, 1024 * 128 // max(classes, 128), 256))


# The scalars are (temperature, beta, gamma, eps), with T^2 in beta and gamma. Saved are, for every row, its
# log-sum-exps and the coefficients of its correlation's gradient, and the like for every column.
def _forward(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor | None,
    weight: torch.Tensor | None,
    scalars: torch.Tensor,
    clamp: bool,
    ignore_index: int,
    dim: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    total, rows, columns, sums = outputs = _forward_fake(
        student, teacher, labels, weight, scalars, clamp, ignore_index, dim, backend
    )
    shares, scratch = 1, None
    if backend != "cpu":
        # Of each share of the rows: two sums and three moments of every column; then one sum for some columns.
        shares, classes = chunks(*rows.shape[:1], columns.shape[1]), columns.shape[1]
        scratch = total.new_empty(5 * shares * classes + (classes + 31) // 32)
    s, t = layout.rows(dim, student, teacher)
    _kernels(backend)[0](
        s, t, labels, weight, scalars, View(total, (1,), (1,)), rows, columns, sums, scratch, int(clamp), ignore_index,
        shares,
    )  # fmt: skip
    return outputs


def _forward_fake(student, teacher, labels, weight, scalars, clamp, ignore_index, dim, backend):
    options = {"dtype": torch.float32, "device": student.device}
    classes = student.shape[dim]
    return (
        torch.empty((), **options),
        torch.empty(student.numel() // classes, ROW_STATS, **options),
        torch.empty(COLUMN_STATS, classes, **options),
        torch.empty(8, **options),
    )


def _backward(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor | None,
    weight: torch.Tensor | None,
    scalars: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    sums: torch.Tensor,
    upstream: torch.Tensor,
    clamp: bool,
    ignore_index: int,
    dim: int,
    want_student: bool,
    want_teacher: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    ds = torch.empty_like(student) if want_student else student.new_empty(0)
    dt = torch.empty_like(teacher) if want_teacher else teacher.new_empty(0)
    if student.numel() == 0:
        return ds, dt
    s, t, *d_views = layout.rows(dim, student, teacher, ds if want_student else None, dt if want_teacher else None)
    _kernels(backend)[1](
        s, t, labels, weight, scalars, rows, columns, sums, upstream.reshape(1).float(), *d_views, int(clamp), ignore_index,
    )  # fmt: skip
    for d, view in zip((ds, dt), d_views, strict=True):
        if view is not None and view.tensor is not d:
            d.copy_(view.tensor)  # it could only be written as rows in a copy
    return ds, dt


def _backward_fake(student, teacher, labels, weight, scalars, rows, columns, sums, upstream, clamp, ignore_index, dim,
                   want_student, want_teacher, backend):  # fmt: skip
    return (
        torch.empty_like(student) if want_student else student.new_empty(0),
        torch.empty_like(teacher) if want_teacher else teacher.new_empty(0),
    )


forward_op = define(
    "dist_forward(Tensor student, Tensor teacher, Tensor? labels, Tensor? weight, Tensor scalars, bool clamp, "
    "int ignore_index, int dim, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
backward_op = define(
    "dist_backward(Tensor student, Tensor teacher, Tensor? labels, Tensor? weight, Tensor scalars, Tensor rows, "
    "Tensor columns, Tensor sums, Tensor upstream, bool clamp, int ignore_index, int dim, bool want_student, "
    "bool want_teacher, str backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class Dist(torch.autograd.Function):
    """Statistics of rows and columns now, the gradient when its upstream is known.

    Nothing is gained by making the gradient in the forward: it begins when the last column is done, so the
    scores are read again in any case.
    """

    @staticmethod
    def forward(ctx, student, teacher, labels, weight, scalars, options):
        total, rows, columns, sums = forward_op(student, teacher, labels, weight, scalars, *options)
        if any(ctx.needs_input_grad[:2]):
            save(ctx, total, student, teacher, labels, weight, scalars, rows, columns, sums)
            ctx.options = options
        return total

    @staticmethod
    def backward(ctx, upstream):
        output, student, *saved = ctx.saved_tensors
        *options, backend = ctx.options
        want_s, want_t = ctx.needs_input_grad[:2]
        with torch.no_grad():
            ds, dt = backward_op(student, *saved, upstream, *options, want_s, want_t, backend)
        grads = first_order("dist", output, (ds if want_s else None, dt if want_t else None))
        return (*grads, None, None, None, None)


def dist(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    temperature: Number = 1.0,
    beta: Number = 1.0,
    gamma: Number = 1.0,
    scale_by_t2: bool = False,
    eps: float = 1e-8,
    clamp: bool = False,
    dim: int = -1,
    labels: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
    operation: str = "dist",
) -> torch.Tensor:
    """beta times one minus the mean correlation of rows, plus gamma times that of columns.

    The arguments are those of kdkernels.losses.dist, already validated there; beyond them:

    Args:
        clamp: raise each norm to eps, instead of adding eps to their product.
        operation: the public name, for messages.
    """
    backend = backends.resolve(operation, (student, teacher), backend)
    if backend == "reference":
        return reference.dist(
            student, teacher, temperature=temperature, beta=beta, gamma=gamma, scale_by_t2=scale_by_t2, eps=eps,
            clamp=clamp, dim=dim, labels=labels, weight=weight, ignore_index=ignore_index,
        )  # fmt: skip
    beta, gamma, temperature = map(detached, (beta, gamma, temperature))
    if scale_by_t2:
        beta, gamma = beta * temperature**2, gamma * temperature**2
    return Dist.apply(
        student, teacher, layout.flat(labels, torch.int64), layout.flat(weight, torch.float32), pack((temperature, beta, gamma, eps)),
        (clamp, ignore_index, dim % student.dim(), backend),
    )  # fmt: skip
