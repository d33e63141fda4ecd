"""How feature tensors of any layout become maps (batch, rows, lanes) for the kernels, without torch views.

A map's lanes lie side by side in memory: its rows are the channels of an NCHW tensor, and its lanes where they come last.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from kdkernels.native import View
from kdkernels.ops.layout import _collapse


class Plan(NamedTuple):
    """How tensors of one shape and stride are read, and where their gradients lie.

    Attributes:
        channels_last: whether the channels are the lanes.
        shape, stride: the map.
        readable: whether that is the tensor as it lies; a copy is to be made else.
        dense: strides of a tensor of the same shape that lies as the map does, without holes.
        whole: whether the tensor itself lies so.
    """

    channels_last: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    readable: bool
    dense: tuple[int, ...]
    whole: bool


def _plan(shape: tuple[int, ...], stride: tuple[int, ...], dim: int, channels_last: bool | None) -> Plan:
    axes = [d for d in range(1, len(shape)) if d != dim]
    found = _collapse([shape[d] for d in axes], [stride[d] for d in axes])
    batch, channels, pixels = shape[0], shape[dim], 1
    for d in axes:
        pixels *= shape[d]
    if channels_last is None:
        step = found[1] if found else 0
        # `not`, for with symbolic sizes a comparison is no bool yet.
        channels_last = not (pixels != 1 and (stride[dim] != 1 or step == 1))
    rows, lanes = (pixels, channels) if channels_last else (channels, pixels)
    steps = (found[1] if found else 0, stride[dim])
    by_row, by_lane = steps if channels_last else steps[::-1]
    dense, size = [0] * len(shape), 1
    for d in reversed([0, *axes, dim] if channels_last else [0, dim, *axes]):
        dense[d] = size
        size *= shape[d]
    readable = found is not None and not (by_lane != 1 and lanes != 1)
    whole = all(a == b or n == 1 for a, b, n in zip(stride, dense, shape))
    if whole:
        map_stride = (rows * lanes, lanes, 1)
    else:
        map_stride = (stride[0], by_row, 1)
    return Plan(channels_last, (batch, rows, lanes), map_stride, readable or whole, tuple(dense), whole)


_cached = functools.lru_cache(maxsize=4096)(_plan)


def plan(x: torch.Tensor, dim: int, channels_last: bool | None = None) -> Plan:
    """The plan for x, whose channels are its axis `dim` and samples its first.

    Args:
        channels_last: whether channels are to be the lanes; by default whichever needs no copy.
    """
    if torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter):
        return _plan(x.shape, x.stride(), dim, channels_last)  # sizes may be symbols
    return _cached(x.shape, x.stride(), dim, channels_last)


def as_map(x: torch.Tensor, by: Plan) -> View:
    """x as the map of its plan, copied only where it does not lie as one."""
    if by.readable:
        return View(x, by.shape, by.stride)
    copy = torch.empty_strided(x.shape, by.dense, dtype=x.dtype, device=x.device).copy_(x)
    return as_dense(copy, by)


def as_dense(x: torch.Tensor, by: Plan) -> View:
    """What lies as `like` makes it, as the map."""
    _, rows, lanes = by.shape
    return View(x, by.shape, (rows * lanes, lanes, 1))


def is_dense(x: View) -> bool:
    _, rows, lanes = x.shape
    return x.stride == (rows * lanes, lanes, 1)


def as_line(x: View) -> View:
    """A dense map as a single long row, for where nothing tells its rows apart."""
    n = x.shape[0] * x.shape[1] * x.shape[2]
    return View(x.tensor, (1, 1, n), (n, n, 1))


def like(x: torch.Tensor, by: Plan) -> torch.Tensor:
    """Room for x's gradient."""
    return torch.empty_strided(x.shape, by.dense, dtype=x.dtype, device=x.device)


def of_channels(x: torch.Tensor, dim: int) -> torch.Tensor:
    """(batch, channels, pixels), for plain torch."""
    if x.dim() == 2:
        return x.unsqueeze(2)
    x = x.movedim(dim, 1) if dim != 1 else x
    return x.flatten(2) if x.dim() > 3 else x
