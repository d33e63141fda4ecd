"""How a tensor with a class axis anywhere becomes rows, without copying it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kdkernels.native import View


def _collapse(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, int] | None:
    """(size, stride) of one dimension that walks these dimensions in order, or None."""
    size, step = 1, 0
    for n, s in zip(reversed(shape), reversed(stride)):
        if n == 1:
            continue
        if size == 1:
            size, step = n, s
        elif s == size * step:
            size *= n
        else:
            return None
    return size, step


def _split(x: torch.Tensor, dim: int, k: int) -> View | None:
    """x as (outer, classes, inner) with its first k row dimensions in outer, or None where strides forbid it."""
    shape, stride = list(x.shape), list(x.stride())
    classes, class_stride = shape.pop(dim), stride.pop(dim)
    outer, inner = _collapse(shape[:k], stride[:k]), _collapse(shape[k:], stride[k:])
    if outer is None or inner is None:
        return None
    return View(x, (outer[0], classes, inner[0]), (outer[1], class_stride, inner[1]))


def split_point(tensors: Sequence[torch.Tensor], dim: int) -> int:
    """How many row dimensions go to the outer axis so that as few tensors as can be need a copy.

    `dim` is non-negative, and the tensors have one shape.
    """
    rows = tensors[0].dim() - 1
    # Everything before the class axis is the usual answer: (N, V), (B, T, V) and (N, V, H, W).
    candidates = [dim, *(k for k in range(rows, -1, -1) if k != dim)]
    return max(candidates, key=lambda k: sum(_split(t, dim, k) is not None for t in tensors))


def as_rows(x: torch.Tensor, dim: int, k: int) -> View:
    """x as (outer, classes, inner), split after its first k row dimensions; copied only if it must be.

    Row r = o * inner + i; this is the row-major order of the shape without the class axis.
    """
    if x.dim() == 2 and dim == 1 and k == 1:
        n, classes = x.shape
        return View(x, (n, classes, 1), (*x.stride(), 1))
    view = _split(x, dim, k)
    if view is None:
        view = _split(x.contiguous(), dim, k)
        assert view is not None, "a contiguous tensor always splits"
    return view
