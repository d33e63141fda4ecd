"""The row_divergence operators, their autograd, and the choice of backend."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from kdkernels import checks
from kdkernels.native import View
from kdkernels.ops import layout
from kdkernels.ops.library import define, first_order, save
from kdkernels.ops.row_divergence import native, reference
from kdkernels.ops.row_divergence.kinds import DIVERGENCE, KD_WEIGHT, STATS, TEMPERATURE
from kdkernels.ops.row_divergence.plan import given_divisors, plan_of
from kdkernels.ops.scalars import Number
from kdkernels.ops.scale.op import learners, with_gradients


@functools.cache
def kernels(backend: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """(forward, backward) of a backend, with one argument list for all."""
    if backend == "triton":
        from kdkernels.ops.row_divergence import triton

        return triton.forward, triton.backward
    return native.entry(backend, "row_divergence_forward"), native.entry(backend, "row_divergence_backward")


def _rows(x: torch.Tensor, dim: int) -> int:
    return x.numel() // x.shape[dim]


def _outputs(
    student: torch.Tensor, teacher: torch.Tensor, want_student: bool, want_teacher: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return torch.empty_like(student) if want_student else None, torch.empty_like(teacher) if want_teacher else None


def _wanted(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    return [x for x in tensors if x is not None]


def _collect(x: torch.Tensor | None, view: View | None) -> None:
    """Brings a gradient home that could only be written as rows in a copy."""
    if view is not None and view[0] is not x:
        x.copy_(view[0])


# Returns the total; if wanted, the losses of the rows and a float32 (rows + 1, STATS) tensor with a row's statistics each,
# then the two divisors; and the gradients that are wanted.
def _forward(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor | None,
    weight: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    scalars: torch.Tensor,
    divisors: torch.Tensor | None,
    kind: int,
    inputs: int,
    hard: bool,
    count: int,
    ignore_index: int,
    dim: int,
    want_rows: bool,
    want_student: bool,
    want_teacher: bool,
    backend: str,
    splits: layout.Splits | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    # Of a small call, new_empty would take twice this.
    total = torch.empty_strided((), (), dtype=torch.float32, device=student.device)
    ds, dt = _outputs(student, teacher, want_student, want_teacher)
    losses = stats = used = None
    about_rows = []
    if want_rows or backend != "cpu":  # the CPU kernel finds room for itself, sooner than torch does
        rows = _rows(student, dim)
        losses = student.new_empty(rows, dtype=torch.float32)
        saved = student.new_empty((rows + 1, STATS), dtype=torch.float32)
        stats = View(saved, (rows, STATS), (STATS, 1))
        if divisors is not None or count:
            used = saved[rows, :2]
            used.fill_(1.0) if divisors is None else used.copy_(divisors)
        if want_rows:
            about_rows = [losses, saved]
    elif divisors is not None:
        used = divisors.contiguous()
    splits = splits or layout.splits(dim, student, teacher, ds, dt)
    s, t, ds_rows, dt_rows = layout.views(splits, student, teacher, ds, dt)
    kernels(backend)[0](
        s, t, labels, weight, class_weight, scalars, used, losses, total, stats, ds_rows, dt_rows, kind,
        inputs, int(hard), count, ignore_index,
    )  # fmt: skip
    if splits[1]:
        _collect(ds, ds_rows)
        _collect(dt, dt_rows)
    return total, about_rows, _wanted(ds, dt)


def _forward_fake(student, teacher, labels, weight, class_weight, scalars, divisors, kind, inputs, hard, count,
                  ignore_index, dim, want_rows, want_student, want_teacher, backend):  # fmt: skip
    rows = _rows(student, dim)
    shapes = [(rows,), (rows + 1, STATS)] if want_rows else []
    return (
        student.new_empty((), dtype=torch.float32),
        [student.new_empty(shape, dtype=torch.float32) for shape in shapes],
        _wanted(*_outputs(student, teacher, want_student, want_teacher)),
    )


def _backward(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor | None,
    weight: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    scalars: torch.Tensor,
    saved: torch.Tensor,
    upstream: torch.Tensor,
    kind: int,
    inputs: int,
    hard: bool,
    divided: bool,
    ignore_index: int,
    dim: int,
    want_student: bool,
    want_teacher: bool,
    want_temperature: bool,
    backend: str,
) -> list[torch.Tensor]:
    rows = _rows(student, dim)
    ds, dt = _outputs(student, teacher, want_student, want_teacher)
    d_temperature = saved.new_empty(rows, 2) if want_temperature else None
    s, t, ds_rows, dt_rows = layout.rows(dim, student, teacher, ds, dt)
    kernels(backend)[1](
        s, t, labels, weight, class_weight, scalars, saved[rows, :2] if divided else None,
        View(saved, (rows, STATS), (STATS, 1)), upstream.reshape(-1).contiguous().float(), ds_rows, dt_rows, d_temperature,
        kind, inputs, int(hard), ignore_index,
    )  # fmt: skip
    _collect(ds, ds_rows)
    _collect(dt, dt_rows)
    return _wanted(ds, dt, d_temperature)


def _backward_fake(student, teacher, labels, weight, class_weight, scalars, saved, upstream, kind, inputs, hard,
                   divided, ignore_index, dim, want_student, want_teacher, want_temperature, backend):  # fmt: skip
    d_temperature = saved.new_empty(_rows(student, dim), 2) if want_temperature else None
    return _wanted(*_outputs(student, teacher, want_student, want_teacher), d_temperature)


forward_op = define(
    "row_divergence_forward(Tensor student, Tensor teacher, Tensor? labels, Tensor? weight, Tensor? class_weight, "
    "Tensor scalars, Tensor? divisors, int kind, int inputs, bool hard, int count, int ignore_index, int dim, "
    "bool want_rows, bool want_student, bool want_teacher, str backend) -> (Tensor, Tensor[], Tensor[])",
    _forward,
    _forward_fake,
)
backward_op = define(
    "row_divergence_backward(Tensor student, Tensor teacher, Tensor? labels, Tensor? weight, Tensor? class_weight, "
    "Tensor scalars, Tensor saved, Tensor upstream, int kind, int inputs, bool hard, bool divided, int ignore_index, "
    "int dim, bool want_student, bool want_teacher, bool want_temperature, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)


class RowDivergence(torch.autograd.Function):
    """Statistics now and the gradient later: the backward reads the logits again."""

    @staticmethod
    def forward(ctx, student, teacher, temperature, teacher_temperature, labels, weight, class_weight, scalars, divisors,
                options):  # fmt: skip
        total, (losses, saved), _ = forward_op(
            student, teacher, labels, weight, class_weight, scalars, divisors, *options[:6], True, False, False,
            options.backend,
        )  # fmt: skip
        output = _per_row(losses, student, options.dim) if options.per_row else total
        save(ctx, output, student, teacher, labels, weight, class_weight, scalars, saved)
        ctx.options, ctx.divided = options, options.count != 0 or divisors is not None
        ctx.temperature_shapes = [None if x is None else x.shape for x in (temperature, teacher_temperature)]
        return output

    @staticmethod
    def backward(ctx, upstream):
        want_s, want_t, want_ts, want_tt = ctx.needs_input_grad[:4]
        output, student, teacher, labels, weight, class_weight, scalars, saved = ctx.saved_tensors
        kind, inputs, hard, _, ignore_index, dim, backend, *_ = ctx.options
        d_ts = d_tt = None
        with torch.no_grad():
            grads = backward_op(
                student, teacher, labels, weight, class_weight, scalars, saved, upstream, kind,
                inputs, hard, ctx.divided, ignore_index, dim, want_s, want_t, want_ts or want_tt, backend,
            )  # fmt: skip
            ds, dt = grads[0] if want_s else None, grads[want_s] if want_t else None
            if want_ts or want_tt:
                d_ts, d_tt = _temperature_gradients(ctx, grads[-1], saved, scalars, weight, upstream)
                shape_s, shape_t = ctx.temperature_shapes
                d_ts, d_tt = d_ts.reshape(shape_s) if want_ts else None, d_tt.reshape(shape_t) if want_tt else None
        grads = first_order("row_divergence", output, (ds, dt, d_ts, d_tt))
        return (*grads, None, None, None, None, None, None)


def _temperature_gradients(ctx, rows, saved, scalars, weight, upstream):
    """From -(sum s ds)/T a row, and the T^2 factor's own term."""
    scalars = scalars.to(rows.device)
    stats, divisors = saved[:-1], saved[-1, :2]
    d_ts, d_tt = rows.sum(0)
    if ctx.options.shared_temperature:
        d_ts = d_ts + d_tt
    if ctx.options.scale_by_t2:
        value = stats[:, DIVERGENCE] * upstream.reshape(-1).float()
        if weight is not None:
            value = value * weight.reshape(-1).where(stats[:, DIVERGENCE] != 0, 0.0)
        kd = value.sum() * scalars[KD_WEIGHT]
        if ctx.divided:
            kd = kd / divisors[0].where(divisors[0] != 0, 1.0)
        d_ts = d_ts + 2.0 * kd / scalars[TEMPERATURE]
    return d_ts, d_tt


def row_divergence(
    operation: str,
    kind: int,
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    kd_weight: Number = 1.0,
    ce_weight: Number | None = None,
    scale_by_t2: bool = True,
    dim: int = -1,
    reduction: str = "rowmean",
    labels: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    num_items: Number | None = None,
    inputs: int = 0,
    p0: Number = 0.0,
    p1: Number = 0.0,
    backend: str = "auto",
    what: str = "logits",
) -> torch.Tensor:
    """kd_weight * T^2 * divergence + ce_weight * cross-entropy over rows of scores.

    Validates the tensors and what all divergences have in common; further arguments are those of the public losses, and

    Args:
        operation, what: the public names of the function and of what it compares, for messages.
        kind: which divergence, a Kind; p0 and p1 are its parameters.
        kd_weight, ce_weight: factors of the two terms; ce_weight None leaves the hard-label term out,
            and labels then only mask rows.
        inputs: what the score tensors hold, one of Inputs.

    A gradient is stored in the forward pass, before its upstream scale is known, only in float32 and bfloat16: in
    float16 it would underflow (1/N times a probability difference), so there, for one loss a row, and for a learnable
    temperature, the backward reads the logits again.
    """
    if labels is not None or weight is not None or class_weight is not None:
        axis = checks.scores(f"student_{what}", student, f"teacher_{what}", teacher, dim)
        rows, classes = tuple(student.shape[:axis] + student.shape[axis + 1 :]), student.shape[axis]
        weight = checks.per_row("weight", weight, rows, student.device)
        labels = checks.labels_of(labels, rows, classes, ignore_index, student.device, look=False)
        class_weight = checks.per_class("class_weight", class_weight, classes, student.device)
        masked = labels is not None or weight is not None
    else:
        masked = False
    plan = plan_of(
        (student, teacher), operation, what, int(kind), int(inputs), dim, ignore_index, temperature, teacher_temperature,
        kd_weight, ce_weight, scale_by_t2, reduction, masked, label_smoothing, num_items, p0, p1, backend,
    )  # fmt: skip
    options = plan.options
    if labels is not None and options.backend != "cpu":  # that kernel looks itself, for a tenth of the time
        checks.within("labels", labels, student.shape[dim], ignore_index)
    if options.backend == "reference":
        return reference.row_divergence(
            student, teacher, kind=kind, temperature=temperature, teacher_temperature=teacher_temperature,
            kd_weight=kd_weight, ce_weight=ce_weight, scale_by_t2=scale_by_t2, dim=dim, reduction=reduction,
            labels=labels, weight=weight, class_weight=class_weight, label_smoothing=label_smoothing,
            ignore_index=ignore_index, num_items=num_items, inputs=inputs, p0=p0, p1=p1,
        )  # fmt: skip
    if masked or class_weight is not None:
        labels, weight = layout.flat(labels, torch.int64), layout.flat(weight, torch.float32)
        class_weight = layout.flat(class_weight, torch.float32)
    divisors = None
    learned = (None, None)  # temperatures
    if not plan.plain:
        divisors = given_divisors(num_items, reduction, student.device)
        learned = tuple(_learnable(x) if torch.is_grad_enabled() else None for x in (temperature, teacher_temperature))
    if plan.later or learned[0] is not None or learned[1] is not None:
        return RowDivergence.apply(
            student, teacher, *learned, labels, weight, class_weight, plan.scalars, divisors, options
        )
    run = forward_op if plan.seen else _forward
    total, about_rows, grads = run(student, teacher, labels, weight, class_weight, plan.scalars, divisors, *plan.told)
    if not grads:
        return _per_row(about_rows[0], student, options.dim) if options.per_row else total
    return with_gradients("row_divergence", options.backend, total, grads, learners((student, teacher), plan.wants))


def _per_row(losses: torch.Tensor, student: torch.Tensor, dim: int) -> torch.Tensor:
    return losses.view(student.shape[:dim] + student.shape[dim + 1 :])


def _learnable(x: Number | None) -> torch.Tensor | None:
    return x if isinstance(x, torch.Tensor) and x.requires_grad else None
