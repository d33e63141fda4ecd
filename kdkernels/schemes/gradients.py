"""Control over what flows back."""

from __future__ import annotations

from typing import Any

import torch

from kdkernels import checks


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.factor, None


def scale_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """x, whose gradient is multiplied by `factor` on its way back: 0 stops it, -1 reverses it."""
    checks.float_tensor("x", x)
    checks.plain_number("factor", factor)
    if factor == 0:
        return x.detach()
    return x if factor == 1 else _ScaleGradient.apply(x, factor)
