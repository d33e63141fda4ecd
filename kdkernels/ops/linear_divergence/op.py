"""The operator kdkernels::linear_divergence, its autograd, and the choice of backend."""

from __future__ import annotations

from typing import Any

import torch

from kdkernels import backends
from kdkernels.native import View
from kdkernels.ops import layout
from kdkernels.ops.library import define, first_order, learns, save
from kdkernels.ops.linear_divergence import reference
from kdkernels.ops.linear_divergence.heads import (
    Head,
    Side,
    chunk_rows,
    pack_transforms,
    stored,
    unpack_transforms,
    view,
)
from kdkernels.ops.row_divergence.kinds import STATS, Inputs, Kind
from kdkernels.ops.row_divergence.op import kernels
from kdkernels.ops.row_divergence.plan import COUNT_CE, COUNT_KD, given_divisors, terms
from kdkernels.ops.scalars import Number
from kdkernels.ops.scale.op import learners, with_gradients

LINE = 16  # float32 numbers of a cache line
Outputs = tuple[torch.Tensor, list[torch.Tensor]]
_NOBODY: Any = Head(None, None)  # type: ignore[arg-type]


def _forward(
    student: torch.Tensor,
    student_weight: torch.Tensor,
    student_bias: torch.Tensor | None,
    student_own: torch.Tensor | None,
    teacher: torch.Tensor | None,
    teacher_weight: torch.Tensor | None,
    teacher_bias: torch.Tensor | None,
    teacher_own: torch.Tensor | None,
    labels: torch.Tensor | None,
    weight: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    scalars: torch.Tensor,
    head_scalars: torch.Tensor,
    divisors: torch.Tensor | None,
    kind: int,
    hard: bool,
    transforms: int,
    ignore_index: int,
    chunk_bytes: int,
    wants: list[bool],
    backend: str,
) -> Outputs:
    rows, classes = student.shape[0], student_weight.shape[0] + (student_own is not None)
    device = student.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        of_s, of_t = (unpack_transforms(head_scalars, transforms, i) for i in range(2))
        s = Side(Head(student, student_weight, student_bias, student_own, *of_s), wants[:4])
        t = None
        if teacher is not None and teacher_weight is not None:
            t = Side(Head(teacher, teacher_weight, teacher_bias, teacher_own, *of_t), wants[4:])
        # The row kernels read a teacher's logit for the last time just before they write the student's gradient
        # there. Not so where the teacher learns too, or where the label's logit stands apart.
        shared = not any(wants[4:]) and kind != Kind.DECOUPLED_KL
        step = chunk_rows(rows, classes, student.shape[1], chunk_bytes, buffers(wants, kind), device.type)
        f32 = {"dtype": torch.float32, "device": device}
        losses = torch.empty(rows, **f32)
        stats = torch.empty(step + 1, STATS, **f32)
        # Rows begin at whole cache lines: a product that writes them elsewhere takes a fifth longer.
        z_s, z_t = (torch.empty(step, -(-classes // LINE) * LINE, **f32)[:, :classes] for _ in range(2))
        d_s = None if not s.any else z_t if shared else torch.empty_like(z_s)
        d_t = torch.empty_like(z_t) if any(wants[4:]) else None
        kernel = kernels(backend)[0]
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            n = part.stop - start
            x, y = z_s[:n], z_t[:n]
            s.scores(part, x)
            if t is None:
                y.copy_(x)
            else:
                t.scores(part, y)
            ds, dt = (None if d is None else d[:n] for d in (d_s, d_t))
            kernel(
                view(x), view(y), _part(labels, part), _part(weight, part), class_weight, scalars, divisors,
                losses[part], None, View(stats, (n, STATS), (STATS, 1)),
                None if ds is None else view(ds), None if dt is None else view(dt),
                kind, Inputs.LOGITS.value, int(hard), 0, ignore_index,
            )  # fmt: skip
            if ds is not None:
                s.accumulate(part, ds, x)
            if t is not None and dt is not None:
                t.accumulate(part, dt, y)
        del z_s, z_t, d_s, d_t  # before the gradients are cast
        return losses, s.gradients() + (t.gradients() if t is not None else [])


def buffers(wants: list[bool], kind: int) -> int:
    """How many tensors of a chunk's logits are alive at a time."""
    student, teacher = any(wants[:4]), any(wants[4:])
    return 2 + (student and (teacher or kind == Kind.DECOUPLED_KL)) + teacher


def _part(x: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if x is None else x[rows]


def _forward_fake(student, student_weight, student_bias, student_own, teacher, teacher_weight, teacher_bias, teacher_own,
                  labels, weight, class_weight, scalars, head_scalars, divisors, kind, hard, transforms, ignore_index,
                  chunk_bytes, wants, backend):  # fmt: skip
    inputs = (student, student_weight, student_bias, student_own, teacher, teacher_weight, teacher_bias, teacher_own)
    losses = torch.empty(student.shape[0], dtype=torch.float32, device=student.device)
    return losses, [x.new_empty(x.shape, dtype=stored(x.dtype)) for x, want in zip(inputs, wants, strict=True) if want]


forward_op = define(
    "linear_divergence(Tensor student, Tensor student_weight, Tensor? student_bias, Tensor? student_own, "
    "Tensor? teacher, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? teacher_own, Tensor? labels, Tensor? weight, "
    "Tensor? class_weight, Tensor scalars, Tensor head_scalars, Tensor? divisors, int kind, bool hard, int transforms, "
    "int ignore_index, int chunk_bytes, bool[] wants, str backend) "
    "-> (Tensor, Tensor[])",
    _forward,
    _forward_fake,
)


class LateLinearDivergence(torch.autograd.Function):
    """Where every row has its own upstream gradient: the gradients once these are known, as every term is linear in them."""

    @staticmethod
    def forward(ctx, options, *tensors):
        losses, _ = forward_op(*tensors, *options[:-1], [False] * 8, options[-1])
        save(ctx, losses, *tensors[:-1])  # the divisors are none of each row's
        ctx.options = options
        return losses

    @staticmethod
    def backward(ctx, upstream):
        *how, backend = ctx.options
        losses, *inputs, labels, weight, class_weight, scalars, head_scalars = ctx.saved_tensors
        wants = list(ctx.needs_input_grad[1:9])
        with torch.no_grad():
            rows = upstream.float().contiguous()
            _, made = forward_op(
                *inputs, labels, rows if weight is None else rows * weight, class_weight, scalars, head_scalars, None,
                *how, wants, backend,
            )  # fmt: skip
        grads = iter(first_order("linear_divergence", losses, made))
        return (None, *(next(grads) if want else None for want in wants), *(None,) * 6)


def linear_divergence(
    student: Head,
    teacher: Head | None,
    *,
    kind: Kind,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    kd_weight: Number = 1.0,
    ce_weight: Number | None = None,
    scale_by_t2: bool = True,
    reduction: str = "rowmean",
    labels: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    num_items: Number | None = None,
    p0: Number = 0.0,
    p1: Number = 0.0,
    compact: bool = False,
    chunk_bytes: int = 0,
    backend: str = "auto",
    operation: str = "linear_divergence",
) -> torch.Tensor:
    """row_divergence between the logits of two heads, which never exist as a whole.

    The arguments are row_divergence's, already validated, and besides:

    Args:
        student, teacher: hidden states (..., H) with the same leading axes, weights (V, H). Without a teacher the
            divergence is 0, and the hard-label term what is left.
        compact: leave rows of weight 0 out of the products; one host synchronisation, to know how many are left.
        chunk_bytes: what the logits of a chunk may take; 0 chooses.
    """
    sides = (student, _NOBODY if teacher is None else teacher)
    given = [x for head in sides for x in head[:4] if x is not None]
    backend = backends.resolve(operation, tuple(given), backend)
    if backend == "reference":
        return reference.linear_divergence(
            student, teacher, kind=kind, temperature=temperature, teacher_temperature=teacher_temperature,
            kd_weight=kd_weight, ce_weight=ce_weight, scale_by_t2=scale_by_t2, reduction=reduction, labels=labels,
            weight=weight, class_weight=class_weight, label_smoothing=label_smoothing, ignore_index=ignore_index,
            num_items=num_items, p0=p0, p1=p1,
        )  # fmt: skip
    student, other = sides
    leading = student.hidden.shape[:-1]
    # The logits' shape, in the memory of one element.
    scores = student.hidden.new_empty(()).expand(*leading, student.weight.shape[0] + (student.own is not None))
    # As if they were one row_divergence: `count` says which divisors it would have counted.
    scalars, count = terms(
        scores.shape, len(leading), reduction, labels is not None or weight is not None, temperature, teacher_temperature,
        kd_weight, ce_weight, scale_by_t2, label_smoothing, p0, p1, num_items,
    )  # fmt: skip
    hard = ce_weight is not None
    divisors = given_divisors(num_items, reduction, scores.device)
    labels, weight = layout.flat(labels, torch.int64), layout.flat(weight, torch.float32)
    class_weight = layout.flat(class_weight, torch.float32)
    if divisors is not None:
        divisors = divisors.contiguous()
    if count:
        divisors = _counted(count, labels, weight, class_weight, ignore_index, scores)
    head_scalars, transforms = pack_transforms(student, other)
    flat = [None if x is None else x.reshape(-1, x.shape[-1]) for h in sides for x in (h.hidden, h.own)]
    kept = None
    if compact and (labels is not None or weight is not None):
        mask = _weights(labels, weight, ignore_index, scores) != 0
        kept = mask.nonzero().squeeze(-1)
        flat = [None if x is None else x.index_select(0, kept) for x in flat]
        labels, weight = (None if x is None else x.index_select(0, kept) for x in (labels, weight))
    inputs = (flat[0], student.weight, student.bias, flat[1], flat[2], other.weight, other.bias, flat[3])
    tensors = *inputs, labels, weight, class_weight, scalars, head_scalars, divisors
    options = int(kind), hard, transforms, ignore_index, chunk_bytes
    wants = [learns(x) for x in inputs]
    if reduction == "none" and any(wants):
        losses = LateLinearDivergence.apply((*options, backend), *tensors)
    else:
        losses, grads = forward_op(*tensors, *options, wants, backend)
    if reduction != "none":
        total = losses.double().sum().float()
        if not grads:
            return total
        return with_gradients("linear_divergence", backend, total, grads, learners(inputs, wants))
    if kept is not None:
        losses = losses.new_zeros(leading.numel()).index_copy(0, kept, losses)
    return losses.view(leading)


def _weights(
    labels: torch.Tensor | None, weight: torch.Tensor | None, ignore_index: int, scores: torch.Tensor
) -> torch.Tensor:
    """The weight of every row."""
    if weight is None:
        weight = torch.ones(scores.numel() // scores.shape[-1], dtype=torch.float32, device=scores.device)
    return weight if labels is None else weight.masked_fill(labels == ignore_index, 0.0)


def _counted(
    count: int,
    labels: torch.Tensor | None,
    weight: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    scores: torch.Tensor,
) -> torch.Tensor:
    """Both divisors, over all rows: a chunk does not know the others."""
    rows = _weights(labels, weight, ignore_index, scores)
    one = torch.ones((), dtype=torch.float32, device=rows.device)
    kd = rows.sum() if count & COUNT_KD else one
    ce = one
    if count & COUNT_CE:
        of_label = rows
        if class_weight is not None and labels is not None:
            of_label = rows * class_weight[labels.clamp(0, scores.shape[-1] - 1)]
        ce = of_label.sum()
    return torch.stack([kd, ce])
