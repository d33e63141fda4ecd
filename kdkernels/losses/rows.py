"""What losses composed over rows of scores share: the rows' weights, and what a sum over rows is divided by."""

from __future__ import annotations

import math

import torch

from kdkernels.ops.scalars import Number


def row_weights(
    weight: torch.Tensor | None, labels: torch.Tensor | None, ignore_index: int, dtype: torch.dtype
) -> torch.Tensor | None:
    """The weight of every row, 0 where its label is ignored; None if all are 1."""
    w = None if weight is None else weight.detach().to(dtype)
    if labels is None:
        return w
    return (labels != ignore_index).to(dtype) if w is None else w.masked_fill(labels == ignore_index, 0.0)


def reduced(
    losses: torch.Tensor, w: torch.Tensor | None, reduction: str, student: torch.Tensor, num_items: Number | None
) -> torch.Tensor:
    """The weighted losses of the rows as `reduction` says, w being their weights."""
    if reduction == "none":
        return losses
    return divided(losses.sum(), divisor(w, reduction, tuple(student.shape), num_items))


def divisor(w: torch.Tensor | None, reduction: str, shape: tuple[int, ...], num_items: Number | None) -> Number:
    """Of the sum over rows of scores of this shape, w being their weights."""
    if reduction == "none":
        return 1
    if num_items is not None:
        return num_items.detach().reshape(()) if isinstance(num_items, torch.Tensor) else num_items
    if reduction == "rowmean" and w is not None:
        return w.sum()
    by = {"rowmean": math.prod(shape[:-1]), "batchmean": shape[0], "mean": math.prod(shape), "sum": 1}
    return max(by[reduction], 1)


def divided(x: torch.Tensor, by: Number) -> torch.Tensor:
    """x / by; 0 where nothing counts."""
    if not isinstance(by, torch.Tensor):
        return x / by
    by = by.to(x)
    return x.where(by != 0, 0.0) / by.where(by != 0, 1.0)
