"""The operator kdkernels::scale_."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kdkernels import backends
from kdkernels.ops.library import define
from kdkernels.ops.scalars import readable


def _scale(x: torch.Tensor, factor: torch.Tensor, backend: str) -> None:
    if x.numel() == 0:
        return
    factor = factor.to(torch.float32)
    # A stored gradient is dense, in whatever order its axes lie.
    flat = x.as_strided((x.numel(),), (1,))
    if backend == "triton":
        from kdkernels.ops.scale import triton

        triton.scale_in_place(flat, factor)
    else:
        library = backends.library(backend)
        library.call("scale_in_place", flat, factor.reshape(1), *library.context(x))


def _fake(x: torch.Tensor, factor: torch.Tensor, backend: str) -> None:
    return None


scale_ = define("scale_(Tensor(a!) x, Tensor factor, str backend) -> ()", _scale, _fake)


def scaled(grads: Sequence[torch.Tensor], factor: torch.Tensor, backend: str, keep: bool) -> Sequence[torch.Tensor]:
    """Dense gradients times a 0-d factor that stays on its device.

    In place, and without touching them where the factor is 1, unless `keep` says that they will be
    needed again as they are.
    """
    if keep:
        # Also where the factor is 1: whoever receives a gradient may go on writing into it.
        grads = tuple([g.clone() for g in grads])
    if factor.is_cpu and readable(factor) and factor.item() == 1:
        return grads  # the usual case, and on a CPU it can be looked at
    for g in grads:
        scale_(g, factor, backend)
    return grads
