"""The operations on maps (batch, rows, lanes) in plain PyTorch: the oracle of the tests, and the fallback."""

from __future__ import annotations

import torch

BOXES_AT_ONCE = 8  # of an image, while they are drawn: a map of its size for each
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


def box_masks(
    boxes: torch.Tensor, size: tuple[int, int], scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """FGD's masks of the foreground and the background, (N, H, W) each.

    A box covers the pixels from its floored to its ceiled corners, both included, and counts 1 / (its height x width in
    those) there; where boxes overlap the smallest counts. The background is 1 over its number of pixels. All of it stays
    on the device, whatever the number of boxes.

    Args:
        boxes: (N, M, 4), x1, y1, x2, y2; one with a side below 0, or NaN, is none.
        size: (H, W) of the map.
        scale: what corners are multiplied by, (N or 1, 1, 4), or None.
    """
    height, width = size
    known = (boxes[..., 2:] >= boxes[..., :2]).all(-1)
    corners = boxes if scale is None else boxes * scale.to(boxes.dtype)
    low, high = corners[..., :2].floor(), corners[..., 2:].ceil()
    sides = (high - low + 1).clamp_min(1)
    weight = (1.0 / (sides[..., 0] * sides[..., 1])).where(known, 0.0)
    x, y = torch.arange(width, device=boxes.device), torch.arange(height, device=boxes.device)
    across = (x >= low[..., :1]) & (x <= high[..., :1])  # (N, M, W)
    down = ((y >= low[..., 1:]) & (y <= high[..., 1:])) * weight.unsqueeze(2)  # (N, M, H)
    front = boxes.new_zeros(boxes.shape[0], height, width)
    for at in range(0, boxes.shape[1], BOXES_AT_ONCE):
        some = slice(at, at + BOXES_AT_ONCE)
        front = torch.maximum(front, (down[:, some, :, None] * across[:, some, None, :]).amax(1))
    back = (front <= 0).to(front)
    return front, back / back.sum((1, 2), keepdim=True).clamp_min(1.0)
