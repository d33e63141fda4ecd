"""How a tensor with a class axis anywhere becomes rows, without copying it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from kdkernels.native import View


def collapse(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, int] | None:
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


def _split(
    shape: Sequence[int], stride: Sequence[int], dim: int, k: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
    """Shape and stride of (outer, classes, inner), the first k row dimensions in outer; None where strides forbid it."""
    rows, steps = list(shape), list(stride)
    classes, class_stride = rows.pop(dim), steps.pop(dim)
    outer, inner = collapse(rows[:k], steps[:k]), collapse(rows[k:], steps[k:])
    if outer is None or inner is None:
        return None
    return (outer[0], classes, inner[0]), (outer[1], class_stride, inner[1])


class _Split(NamedTuple):
    shape: tuple[int, int, int]
    stride: tuple[int, int, int]
    copied: bool


Splits = tuple[tuple[_Split | None, ...] | None, int]  # of each tensor; how many of them must be copied
AS_ROWS: Splits = (None, 0)  # matrices, a row each: the CPU kernels read these as they are


@functools.lru_cache(maxsize=4096)
def _splits(shape: tuple[int, ...], strides: tuple[tuple[int, ...] | None, ...], dim: int) -> Splits:
    """How each of these tensors of one shape splits, at the place that leaves the fewest to be copied."""
    # Everything before the class axis is the usual answer: (N, V), (B, T, V) and (N, V, H, W). There every copy splits.
    candidates = [dim, *(k for k in range(len(shape) - 1, -1, -1) if k != dim)]
    found = []
    for k in candidates:
        copy = _split(shape, _contiguous(shape), dim, k)
        splits = []
        for stride in strides:
            split = None if stride is None else _split(shape, stride, dim, k)
            if split is not None:
                splits.append(_Split(*split, copied=False))
            else:
                splits.append(None if stride is None or copy is None else _Split(*copy, copied=True))
        if all((x is None) == (stride is None) for x, stride in zip(splits, strides, strict=True)):
            found.append(tuple(splits))
    copies = [sum(x is not None and x.copied for x in splits) for splits in found]
    return found[copies.index(min(copies))], min(copies)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(max(n, 1) for n in shape[d + 1 :]) for d in range(len(shape)))


def splits(dim: int, *tensors: torch.Tensor | None) -> Splits:
    """How `rows` sees tensors like these, for `views`."""
    strides = tuple([None if x is None else x.stride() for x in tensors])
    return _splits(tensors[0].shape, strides, dim)  # type: ignore[union-attr]


def views(by: Splits, *tensors: torch.Tensor | None) -> Sequence[View | torch.Tensor | None]:
    """`rows`, where it is known how."""
    each, copies = by
    if each is None:
        return tensors
    if copies:
        tensors = tuple(x if x is None or not split.copied else x.contiguous() for x, split in zip(tensors, each))
    # The constructor that NamedTuple writes would take longer than all the rest.
    new = tuple.__new__
    return [None if x is None else new(View, (x, split[0], split[1])) for x, split in zip(tensors, each)]


def rows(dim: int, *tensors: torch.Tensor | None) -> list[View | None]:
    """Tensors of one shape as (outer, classes, inner), all split at one place; None stays None.

    Row r = o * inner + i; this is the row-major order of the shape without the class axis, wherever it was split. A view
    is of a copy only where the strides of its tensor allow no other. `dim` is non-negative, and the first tensor given.
    """
    return views(splits(dim, *tensors), *tensors)


def side_by_side(x: torch.Tensor) -> torch.Tensor:
    """Rows (N, D) with their features side by side; the rows themselves may lie anywhere."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def flat(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """One value a row, or a class, as kernels walk it: without strides, and without a gradient."""
    if x is None or (x.dim() == 1 and x.dtype == dtype and x.is_contiguous() and not x.requires_grad):
        return x
    # A view of a slice is still a slice.
    return x.detach().reshape(-1).to(dtype).contiguous()
