"""The operations on maps (batch, rows, lanes) in plain PyTorch: the oracle of the tests, and the fallback."""

from __future__ import annotations

import torch

MEASURES = ("squared", "absolute", "smooth_l1")


def wide(*tensors: torch.Tensor) -> torch.dtype:
    """What to compute in: float64 where anything is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def match(
    student: torch.Tensor,
    teacher: torch.Tensor,
    row_weight: torch.Tensor | None,
    lane_weight: torch.Tensor | None,
    row_offset: torch.Tensor | None,
    lane_offset: torch.Tensor | None,
    *,
    measure: str,
    beta: float,
) -> torch.Tensor:
    """The same operation as op.match, whose docstring says what each argument is."""
    dtype = wide(student, teacher)
    d = student.to(dtype) - teacher.to(dtype)
    if row_offset is not None:
        d = d + row_offset.unsqueeze(2)
    if lane_offset is not None:
        d = d + lane_offset.unsqueeze(1)
    if measure == "squared":
        value = d * d
    elif measure == "absolute":
        value = d.abs()
    else:
        value = torch.where(d.abs() < beta, 0.5 * d * d / beta, d.abs() - 0.5 * beta)
    if row_weight is not None:
        value = value * row_weight.unsqueeze(2)
    if lane_weight is not None:
        value = value * lane_weight.unsqueeze(1)
    return value.sum()


def power(x: torch.Tensor, p: float, signed: bool) -> torch.Tensor:
    """|x|^p, or x^p; the gradient at 0 is 0, also where p = 1."""
    x = x.to(wide(x))
    if signed:
        return x.pow(p)
    return x.abs() if p == 1 else x.abs().pow(p)


def power_sums(
    x: torch.Tensor,
    p: float,
    signed: bool,
    rows: bool,
    lanes: bool,
    row_weight: torch.Tensor | None,
    lane_weight: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The same operation as op.power_sums."""
    y = power(x, p, signed)
    of_rows = y if lane_weight is None else y * lane_weight.unsqueeze(1)
    of_lanes = y if row_weight is None else y * row_weight.unsqueeze(2)
    return of_rows.sum(2) if rows else None, of_lanes.sum(1) if lanes else None
