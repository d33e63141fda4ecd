"""Launching the Triton kernels: the compiled extension's entry, without scratch and context."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton

from kdkernels.ops.gram_match.kinds import Kind, Normalize
from kdkernels.ops.gram_match.native import splits_of
from kdkernels.ops.gram_match.triton_kernels import (
    columns_kernel,
    gradient_kernel,
    lengths_kernel,
    loss_kernel,
    product_kernel,
    statistics_kernel,
)
from kdkernels.ops.triton_util import on, signature

TILE, DEPTH = 64, 32  # outputs on a side of a tile, products of an output at a time
GRADIENT_DEPTH = 16  # of the gradient, which has both models' weights to make: deeper ones do not fit the registers
VECTORS, ELEMENTS = 16, 64  # of a program that measures lengths
ROW, BLOCK = 1024, 1024  # elements of a row, and rows' values, at a time


class _Model(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor
    factor: float
    gram: torch.Tensor
    unit: torch.Tensor | None  # of rows
    lengths: torch.Tensor | None  # of columns
    through: torch.Tensor | None


def _model(
    x: torch.Tensor, other: torch.Tensor | None, factor: float, normalize: int, eps: float, splits: int
) -> _Model:
    samples, rows, features = x.shape
    y = x if other is None else other
    columns = y.shape[1]
    float32 = {"dtype": torch.float32, "device": x.device}
    unit = through = None
    if normalize:
        by_column = normalize == Normalize.COLUMNS
        vectors, elements, *strides = (
            (features, rows, x.stride(0), x.stride(2), x.stride(1)) if by_column else (rows, features, *x.stride())
        )
        unit, through = torch.empty(2, samples, vectors, **float32)
        lengths_kernel[(triton.cdiv(samples * vectors, VECTORS),)](
            x, unit, through, samples, vectors, elements, *strides, eps,
            NORMALIZE=normalize, V=VECTORS, E=ELEMENTS, num_warps=4,
        )  # fmt: skip
    lengths, unit = (unit, None) if normalize == Normalize.COLUMNS else (None, unit)
    partial = torch.empty(splits, samples, rows, columns, **float32)
    tiles = triton.cdiv(rows, TILE) * triton.cdiv(columns, TILE)
    product_kernel[(tiles * samples, splits)](
        x, y, lengths, partial, samples, rows, columns, features, triton.cdiv(features, splits), *x.stride(), *y.stride(),
        SYMMETRIC=other is None, T=TILE, F=DEPTH, num_warps=8,
    )  # fmt: skip
    return _Model(x, y, factor, partial[0] if splits == 1 else partial.sum(0), unit, lengths, through)


def forward(
    student: torch.Tensor,
    student_other: torch.Tensor | None,
    teacher: torch.Tensor | None,
    teacher_other: torch.Tensor | None,
    weights: torch.Tensor | None,
    scalars: torch.Tensor,
    loss: torch.Tensor,
    ds: torch.Tensor | None,
    ds_other: torch.Tensor | None,
    dt: torch.Tensor | None,
    dt_other: torch.Tensor | None,
    kind: int,
    normalize: int,
    order: int,
) -> None:
    """The entry gram_match."""
    scale, factor_s, factor_t, eps, gamma = scalars.tolist()
    samples, rows, _ = student.shape
    columns = rows if student_other is None else student_other.shape[1]
    splits = splits_of(samples, rows, columns, max(x.shape[2] for x in (student, teacher) if x is not None))
    shared = {"KIND": kind, "ORDER": order}
    with on(student.device):
        s = _model(student, student_other, factor_s, normalize, eps, splits)
        t = s if teacher is None else _model(teacher, teacher_other, factor_t, normalize, eps, splits)
        sides, dots, values = torch.empty(5, samples * rows, dtype=torch.float32, device=student.device).split(
            (2, 2, 1)
        )
        hyper = (eps, gamma, math.exp(-2 * gamma))
        statistics_kernel[(samples * rows,)](
            s.gram, t.gram, s.unit, t.unit, weights, sides, dots, values, samples, rows, columns, s.factor, t.factor,
            *hyper, **shared, B=min(ROW, max(triton.next_power_of_2(columns), 32)), num_warps=4,
        )  # fmt: skip
        loss_kernel[(1,)](values, loss, samples * rows, scale, B=BLOCK, num_warps=4)

        def gradient(
            dx: torch.Tensor | None, y: torch.Tensor, of_student: bool, turned: bool = False, first: int = 0
        ) -> None:
            if dx is None:
                return
            own, other = (s, t) if of_student else (t, s)
            mine, theirs = (0, 1) if of_student or teacher is None else (1, 0)
            blocks = samples * triton.cdiv(dx.shape[1], TILE) * triton.cdiv(dx.shape[2], TILE)
            gradient_kernel[(blocks,)](
                own.gram, other.gram, own.unit, other.unit, None if own.unit is None else own.through, sides[mine],
                dots[mine], sides[theirs], weights, own.lengths, y, dx, rows, columns, first, dx.shape[1], y.shape[1],
                dx.shape[2], *y.stride(), *dx.stride(), own.factor, other.factor, scale, *hyper, **shared,
                STUDENT=of_student, SYMMETRIC=student_other is None, TURNED=turned, T=TILE, F=GRADIENT_DEPTH, num_warps=8,
            )  # fmt: skip
            if own.lengths is not None:
                columns_kernel[(triton.cdiv(samples * dx.shape[2], VECTORS),)](
                    own.x, own.lengths, own.through, dx, samples, dx.shape[1], dx.shape[2], *own.x.stride(), *dx.stride(),
                    V=VECTORS, E=ELEMENTS, num_warps=4,
                )  # fmt: skip

        if teacher is None:  # the rows of both models in one matrix
            gradient(ds, s.x, True)
            gradient(dt, s.x, True, first=0 if dt is None else rows - dt.shape[1])
            return
        gradient(ds, s.y, True)
        gradient(dt, t.y, False)
        gradient(ds_other, s.x, True, turned=True)
        gradient(dt_other, t.x, False, turned=True)


def aot_signatures() -> list[dict]:
    """Representative compilations for kdkernels.bench.static."""
    float32 = (
        "side",
        "dot",
        "other_side",
        "sides",
        "dots",
        "values",
        "own",
        "other",
        "dx",
        "out",
        "student",
        "teacher",
    )
    hyper = ("factor", "other_factor", "factor_s", "factor_t", "scale", "eps", "gamma", "decay")

    def row(name: str, kernel: Any, given: dict[str, str | None], **constexprs: Any) -> dict:
        pointers = {n: "*fp32" for n in float32 if n in kernel.arg_names}
        pointers |= {n: t for n, t in given.items() if n in kernel.arg_names}
        # A stride of 1 is compiled in.
        constexprs |= {n: 1 for n in ("x_column", "y_column", "dx_column") if n in kernel.arg_names}
        warps = 8 if kernel in (product_kernel, gradient_kernel) else 4
        return signature(name, kernel, pointers, tuple(n for n in hyper if n in kernel.arg_names), warps, **constexprs)

    plain: dict[str, str | None] = dict.fromkeys(
        ("unit", "other_unit", "unit_s", "unit_t", "through", "weights", "lengths")
    )
    unit = plain | dict.fromkeys(("unit", "other_unit", "unit_s", "unit_t", "through"), "*fp32")
    tile = {"T": TILE, "F": DEPTH}
    rows = [
        row(
            f"products, {name}",
            product_kernel,
            {"x": f"*{x}", "y": f"*{x}", "lengths": lengths},
            SYMMETRIC=True,
            **tile,
        )
        for name, x, lengths in (("fp32", "fp32", None), ("bf16", "bf16", None), ("columns", "fp32", "*fp32"))
    ]
    for kind, given, order in ((Kind.ROWS, plain, 0), (Kind.PROBABILITIES, unit, 0), (Kind.SERIES, unit, 2)):
        flags = {"KIND": kind.value, "ORDER": order}
        rows.append(row(f"statistics, {kind.name.lower()}", statistics_kernel, given, **flags, B=ROW))
        flags |= {"STUDENT": True, "SYMMETRIC": True, "TURNED": False, **tile, "F": GRADIENT_DEPTH}
        rows.append(row(f"gradient, {kind.name.lower()}", gradient_kernel, {**given, "y": "*bf16"}, **flags))
    return rows
