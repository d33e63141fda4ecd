"""What a call of row_divergence comes to before anything looks at a value in its tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from kdkernels import backends, checks
from kdkernels.ops import layout
from kdkernels.ops.library import learns, looked_at
from kdkernels.ops.plans import remembered
from kdkernels.ops.scalars import Number, detached, pack

COUNT_KD, COUNT_CE = 1, 2  # which divisors a kernel counts from labels and weights


class Options(NamedTuple):
    """What the operators are told beside tensors, the first six in their order; the last three are autograd's own."""

    kind: int
    inputs: int
    hard: bool  # there is a hard-label term
    count: int  # of COUNT_KD and COUNT_CE
    ignore_index: int
    dim: int
    backend: str
    per_row: bool
    scale_by_t2: bool
    shared_temperature: bool  # the teacher has none of its own


class Plan(NamedTuple):
    """What of a call does not depend on the values in its tensors."""

    options: Options
    scalars: torch.Tensor
    plain: bool  # no hyper-parameter is a tensor
    wants: tuple[bool, bool]  # gradients of the student and the teacher
    later: bool  # and they cannot be made in the forward pass
    told: tuple[Any, ...]  # the forward operator's arguments after its tensors
    seen: bool  # something looks on: the operator itself is called; else what it does, and how to split is told too


@remembered
def plan_of(
    tensors, operation, what, kind, inputs, dim, ignore_index, temperature, teacher_temperature, kd_weight,
    ce_weight, scale_by_t2, reduction, masked, label_smoothing, num_items, p0, p1, backend,
) -> Plan:  # fmt: skip
    student, teacher = tensors
    dim = checks.scores(f"student_{what}", student, f"teacher_{what}", teacher, dim)
    checks.flag("scale_by_t2", scale_by_t2)
    checks.temperatures(temperature, teacher_temperature, student, learnable=True)
    checks.items(num_items, student)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    ignore_index = checks.integer("ignore_index", ignore_index)
    backend = backends.resolve(operation, (student, teacher), backend)
    scalars, count = terms(
        student.shape, dim, reduction, masked, temperature, teacher_temperature, kd_weight, ce_weight, scale_by_t2,
        label_smoothing, p0, p1, num_items,
    )  # fmt: skip
    options = Options(
        kind, inputs, ce_weight is not None, count, ignore_index, dim, backend, reduction == "none", scale_by_t2,
        teacher_temperature is None,
    )  # fmt: skip
    plain = not any(isinstance(x, torch.Tensor) for x in (temperature, teacher_temperature, num_items))
    wants = tuple([learns(x) for x in tensors])
    later = any(wants) and (reduction == "none" or torch.float16 in (student.dtype, teacher.dtype))
    told = (*options[:6], options.per_row, *wants, backend)
    seen = backend == "reference" or looked_at(*tensors)
    if not seen:
        if backend == "cpu" and student.dim() == 2 and dim == 1:
            splits = layout.AS_ROWS
        else:
            grads = [torch.empty_like(x, device="meta") if want else None for x, want in zip(tensors, wants)]
            splits = layout.splits(dim, *tensors, *grads)
        told = *told, splits
    return Plan(options, scalars, plain, wants, later, told, seen)


def terms(
    shape, dim, reduction, masked, temperature, teacher_temperature, kd_weight, ce_weight, scale_by_t2, label_smoothing, p0, p1,
    num_items,
) -> tuple[torch.Tensor, int]:  # fmt: skip
    """The kernels' scalars, and which divisors they must count."""
    kd_divisor, ce_divisor, count = _divisors(shape, dim, reduction, masked, ce_weight is not None, num_items)
    kd_factor = detached(kd_weight) / kd_divisor
    if scale_by_t2:
        kd_factor = kd_factor * detached(temperature) ** 2
    scalars = pack((
        temperature,
        temperature if teacher_temperature is None else teacher_temperature,
        kd_factor,
        0.0 if ce_weight is None else detached(ce_weight) / ce_divisor,
        label_smoothing,
        p0,
        p1,
        0.0,
    ))  # fmt: skip
    return scalars, count


def _divisors(
    shape: torch.Size, dim: int, reduction: str, masked: bool, hard: bool, num_items: Number | None
) -> tuple[float, float, int]:
    """What the two terms are divided by, where that is known here, and which divisors a kernel must count."""
    if reduction == "none" or isinstance(num_items, torch.Tensor):
        return 1.0, 1.0, 0
    if num_items is not None:
        return num_items, num_items, 0
    if reduction == "sum":
        return 1.0, 1.0, 0
    if reduction == "batchmean":
        return max(shape[0], 1), max(shape[0], 1), 0
    count = COUNT_CE if hard else 0
    if reduction == "mean":
        return max(shape.numel(), 1), 1.0, count
    if masked:
        return 1.0, 1.0, count | COUNT_KD
    return max(shape.numel() // shape[dim], 1), 1.0, count


def given_divisors(num_items: Number | None, reduction: str, device: torch.device) -> torch.Tensor | None:
    """Both divisors where they are a tensor, which nobody here looks at."""
    if not isinstance(num_items, torch.Tensor) or reduction == "none":
        return None
    return num_items.detach().to(device, torch.float32).reshape(1).expand(2)
