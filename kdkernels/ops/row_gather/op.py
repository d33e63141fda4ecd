"""The row_gather operators, their autograd, and the choice of backend."""

from __future__ import annotations

from typing import Any

import torch

from kdkernels.ops import layout
from kdkernels.ops.library import define, first_order, save
from kdkernels.ops.row_gather import native, reference
from kdkernels.ops.scalars import Number, pack

STATS = 8  # of a row; csrc/row_gather/math.h names them
NOTHING, REST, REST_AND_TOTAL = range(3)  # what is wanted of the classes that are not gathered


def kernels(backend: str) -> Any:
    """(forward, backward) of a backend, with one argument list for all."""
    if backend == "triton":
        from kdkernels.ops.row_gather import triton

        return triton.forward, triton.backward
    return (lambda *a: native.forward(backend, *a)), (lambda *a: native.backward(backend, *a))


# indices are (rows, k) and ascend; live is uint8 (rows,); the scalars are (temperature,).
def _forward(
    student: torch.Tensor,
    indices: torch.Tensor,
    live: torch.Tensor | None,
    scalars: torch.Tensor,
    outside: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    gathered, rest, total, stats = _forward_fake(student, indices, live, scalars, outside, backend)
    if indices.shape[0]:
        (s,) = layout.rows(student.dim() - 1, student)
        kernels(backend)[0](
            s, indices, live, scalars, gathered, rest if outside >= REST else None,
            total if outside == REST_AND_TOTAL else None, stats, outside,
        )  # fmt: skip
    return gathered, rest, total, stats


def _forward_fake(student, indices, live, scalars, outside, backend):
    rows, k = indices.shape
    options = {"dtype": torch.float32, "device": student.device}
    return (
        torch.empty(rows, k, **options),
        torch.empty(rows if outside >= REST else 0, **options),
        torch.empty(rows if outside == REST_AND_TOTAL else 0, **options),
        torch.empty(rows, STATS, **options),
    )


def _backward(
    student: torch.Tensor,
    indices: torch.Tensor,
    live: torch.Tensor | None,
    scalars: torch.Tensor,
    stats: torch.Tensor,
    g: torch.Tensor,
    g_rest: torch.Tensor | None,
    g_total: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    ds = torch.empty_like(student)
    if indices.shape[0] == 0:
        return ds
    s, d = layout.rows(student.dim() - 1, student, ds)
    g, g_rest, g_total = (None if x is None else x.float().contiguous() for x in (g, g_rest, g_total))
    kernels(backend)[1](s, indices, live, scalars, stats, g, g_rest, g_total, d)
    if d.tensor is not ds:
        ds.copy_(d.tensor)  # it could only be written as rows in a copy
    return ds


def _backward_fake(student, indices, live, scalars, stats, g, g_rest, g_total, backend):
    return torch.empty_like(student)


forward_op = define(
    "row_gather_forward(Tensor student, Tensor indices, Tensor? live, Tensor scalars, int outside, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
backward_op = define(
    "row_gather_backward(Tensor student, Tensor indices, Tensor? live, Tensor scalars, Tensor stats, Tensor g, "
    "Tensor? g_rest, Tensor? g_total, str backend) -> Tensor",
    _backward,
    _backward_fake,
)


class RowGather(torch.autograd.Function):
    """Statistics now; the gradient, which is as long as the row, when its upstream is known.

    The temperature is a tensor that learns, or None; the scalars have its value.
    """

    @staticmethod
    def forward(ctx, student, temperature, indices, live, scalars, options):
        outside, backend = options
        gathered, rest, total, stats = forward_op(student, indices, live, scalars, outside, backend)
        if any(ctx.needs_input_grad[:2]):
            save(ctx, gathered, temperature, student, indices, live, scalars, stats)
            ctx.options = options
        return gathered, rest, total

    @staticmethod
    def backward(ctx, g, g_rest, g_total):
        gathered, temperature, student, *saved = ctx.saved_tensors
        outside, backend = ctx.options
        d_temperature = None
        with torch.no_grad():
            # A temperature learns from the sum of all gradients times their scores: not from rounded ones.
            wide = student.float() if ctx.needs_input_grad[1] else student
            ds = backward_op(
                wide, *saved, g, g_rest if outside >= REST else None, g_total if outside == REST_AND_TOTAL else None,
                backend,
            )  # fmt: skip
            if ctx.needs_input_grad[1]:
                # A row's gradients add up to 0, so that its largest score may be taken off first.
                scores = (wide - wide.amax(-1, keepdim=True)).where(ds != 0, 0.0)
                d_temperature = (-(scores * ds).sum(dtype=torch.float64) / temperature).to(temperature.dtype)
                d_temperature = d_temperature.reshape(temperature.shape)
            ds = ds.to(student.dtype) if ctx.needs_input_grad[0] else None
        return (*first_order("topk_div", gathered, (ds, d_temperature)), None, None, None, None)


def row_gather(
    student: torch.Tensor,
    indices: torch.Tensor,
    *,
    temperature: Number = 1.0,
    live: torch.Tensor | None = None,
    outside: int = NOTHING,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """log_softmax(student / temperature) at k classes a row, in one read of the student; float32.

    Args:
        student: (..., V).
        indices: int64 (..., k), ascending in each row. -1 is no class. Beyond V, or below -1: that row is NaN.
        live: bool (...): where False, nothing is read, the results are 0 and the gradient is 0.
        outside: what is wanted besides: REST the others' mass, REST_AND_TOTAL also the sum of their log-probabilities.
        backend: as backends.resolve returned it; "reference" makes float64 of float64.

    Returns:
        The log-probabilities (..., k), -inf at -1; the log of the mass of all classes that are not among the indices
        (-inf where there is none); the sum of these classes' log-probabilities. None for what was not asked.
    """
    if backend == "reference":
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        return reference.row_gather(student, indices, temperature=temperature, live=live, outside=outside, dtype=dtype)
    rows, k = indices.shape[:-1], indices.shape[-1]
    gathered, rest, total = RowGather.apply(
        student,
        temperature if isinstance(temperature, torch.Tensor) and temperature.requires_grad else None,
        indices.reshape(-1, k).contiguous(),
        None if live is None else live.reshape(-1).to(torch.uint8).contiguous(),
        pack((temperature,)),
        (outside, backend),
    )
    return (
        gathered.view(*rows, k),
        rest.view(rows) if outside >= REST else None,
        total.view(rows) if outside == REST_AND_TOTAL else None,
    )
