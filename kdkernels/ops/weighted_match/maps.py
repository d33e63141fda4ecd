"""How feature tensors of any layout become maps (batch, rows, lanes) for the kernels, without torch views.

A map's lanes lie side by side in memory: its rows are the channels of an NCHW tensor, and its lanes where they come last.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from kdkernels.native import View
from kdkernels.ops.layout import collapse


class Plan(NamedTuple):
    """How tensors of one shape and stride are read, and where their gradients lie.

    Attributes:
        channels_last: whether the channels are the lanes.
        shape, stride: the map.
        readable: whether that is the tensor as it lies; a copy is to be made else.
        dense: strides of a tensor of the same shape that lies as the map does, without holes.
        whole: whether the map has no holes.
        line: shape and stride of a map without holes as a single long row, for where nothing tells its rows apart.
    """

    channels_last: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    readable: bool
    dense: tuple[int, ...]
    whole: bool
    line: tuple[tuple[int, ...], tuple[int, ...]]


def _plan(shape: tuple[int, ...], stride: tuple[int, ...], dim: int, channels_last: bool | None) -> Plan:
    axes = [d for d in range(1, len(shape)) if d != dim]
    found = collapse([shape[d] for d in axes], [stride[d] for d in axes])
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
    lies_so = all(a == b or n == 1 for a, b, n in zip(stride, dense, shape))
    readable = lies_so or (found is not None and not (by_lane != 1 and lanes != 1))
    whole = lies_so or not readable  # a copy is
    map_stride = (rows * lanes, lanes, 1) if whole else (stride[0], by_row, 1)
    line = (1, 1, size), (size, size, 1)
    return Plan(channels_last, (batch, rows, lanes), map_stride, readable, tuple(dense), whole, line)


_cached = functools.lru_cache(maxsize=4096)(_plan)


def plan(x: torch.Tensor, dim: int, channels_last: bool | None = None) -> Plan:
    """The plan for x, whose channels are its axis `dim` and samples its first.

    Args:
        channels_last: whether channels are to be the lanes; by default whichever needs no copy.
    """
    if torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter):
        return _plan(x.shape, x.stride(), dim, channels_last)  # sizes may be symbols
    return _cached(x.shape, x.stride(), dim, channels_last)


def readable(x: torch.Tensor, by: Plan) -> torch.Tensor:
    """x, copied only where it does not lie as a map."""
    return x if by.readable else like(x, by).copy_(x)


def as_map(x: torch.Tensor, by: Plan) -> View:
    """x as the map of its plan."""
    return View(readable(x, by), by.shape, by.stride)


def as_dense(x: torch.Tensor, by: Plan) -> View:
    """What lies as `like` makes it, as the map."""
    _, rows, lanes = by.shape
    return View(x, by.shape, (rows * lanes, lanes, 1))


def like(x: torch.Tensor, by: Plan) -> torch.Tensor:
    """Room for x's gradient."""
    return torch.empty_strided(x.shape, by.dense, dtype=x.dtype, device=x.device)


def of_channels(x: torch.Tensor, dim: int) -> torch.Tensor:
    """(batch, channels, pixels), for plain torch."""
    if x.dim() == 2:
        return x.unsqueeze(2)
    x = x.movedim(dim, 1) if dim != 1 else x
    return x.flatten(2) if x.dim() > 3 else x
