"""The operators of pairwise distances, their autograd, and the choice of backend."""

from __future__ import annotations

from typing import Any

import torch

from kdkernels.ops.layout import side_by_side
from kdkernels.ops.library import define, first_order, save
from kdkernels.ops.pairwise_distance import native

REDUCTIONS = ("mean", "pairs", "sum")


def run(entry: str, backend: str, *args: Any) -> None:
    """The kernel of this name, forward, backward or match, of a backend: one argument list for all."""
    if backend == "triton":
        from kdkernels.ops.pairwise_distance import triton

        getattr(triton, entry)(*args)
    else:
        getattr(native, entry)(backend, *args)


def _forward(x: torch.Tensor, split: bool, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    n = x.shape[0]
    hi = torch.empty(n, n, dtype=torch.float32, device=x.device)
    lo = hi.new_empty((n, n) if split else 0)
    if n:
        run("forward", backend, side_by_side(x), hi, lo if split else None)
    return hi, lo


def _forward_fake(x, split, backend):
    n = x.shape[0]
    hi = torch.empty(n, n, dtype=torch.float32, device=x.device)
    return hi, hi.new_empty((n, n) if split else 0)


def _backward(x: torch.Tensor, weights: torch.Tensor, backend: str) -> torch.Tensor:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.shape[0]:
        run("backward", backend, side_by_side(x), weights.contiguous(), dx)
    return dx


def _backward_fake(x, weights, backend):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


distances = define(
    "pairwise_distance_forward(Tensor x, bool split, str backend) -> (Tensor, Tensor)", _forward, _forward_fake
)
distances_backward = define(
    "pairwise_distance_backward(Tensor x, Tensor weights, str backend) -> Tensor", _backward, _backward_fake
)


class SquaredDistances(torch.autograd.Function):
    """(hi, lo) of |x_i - x_j|^2; the gradient of hi stands for that of the sum.

    The features' gradient is made in the backward, when its upstream scale is known, so that it is
    right in float16 too.
    """

    @staticmethod
    def forward(ctx, x, split, backend):
        hi, lo = distances(x, split, backend)
        ctx.mark_non_differentiable(lo)
        save(ctx, x, hi)
        ctx.backend = backend
        return hi, lo

    @staticmethod
    def backward(ctx, weights, _):
        x, hi = ctx.saved_tensors
        with torch.no_grad():
            dx = distances_backward(x, weights, ctx.backend)
        (dx,) = first_order("pairwise_distance", hi, (dx,))
        return dx, None, None


def squared_distances(x: torch.Tensor, *, backend: str, split: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """|x_i - x_j|^2 of samples (N, D), as float32 (N, N).

    Args:
        backend: a resolved one, not "auto" or "reference".
        split: sum in float64 and also return what float32 leaves over.

    Returns:
        (hi, lo); lo is empty without split.
    """
    return SquaredDistances.apply(x, split, backend)
