"""The operator kdkernels::scale_."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch._C import _len_torch_dispatch_stack
from torch._C._autograd import _get_current_graph_task_keep_graph
from torch.compiler import is_compiling

from kdkernels import backends
from kdkernels.native import is_one
from kdkernels.ops.library import define, first_order, looked_at


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


def scaled(grads: Sequence[torch.Tensor], factor: torch.Tensor, backend: str) -> Sequence[torch.Tensor]:
    """Dense gradients that were saved, times a 0-d factor that stays on its device; for a backward pass.

    In place, and without touching them where the factor is 1, unless that pass was asked to retain its
    graph: then they will be needed again as they are.
    """
    seen = looked_at(factor)
    # Under the compiler operators are functionalised: nothing saved is overwritten.
    if not (seen and is_compiling()) and _get_current_graph_task_keep_graph():
        # Also where the factor is 1: whoever receives a gradient may go on writing into it.
        grads = [g.clone() for g in grads]
    if not seen and factor.is_cpu and is_one(factor):
        return grads  # the usual case, and on a CPU it can be looked at
    for g in grads:
        scale_(g, factor, backend)
    return grads


class StoredGradients(torch.autograd.Function):
    """Joins a loss to inputs whose gradients were made with it, for an upstream gradient of 1: in float32, or in their dtype."""

    @staticmethod
    def forward(
        ctx: Any, about: tuple[str, str], made: tuple[torch.Tensor, ...], *inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.about = about
        ctx.save_for_backward(*made)
        return made[0]

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        operation, backend = ctx.about
        output, *made = ctx.saved_tensors
        grads = scaled(made, upstream, backend)
        if torch.is_grad_enabled():
            grads = first_order(operation, output, grads)
        # Autograd itself brings a float32 gradient of a half precision input to that precision.
        return (None, None, *grads)


# Function.apply is a layer of Python for functorch's transforms over this one, and takes 2 us.
_apply = super(torch.autograd.Function, StoredGradients).apply
# The node's own apply would first find out which of backward and vjp there is.
StoredGradients._backward_cls.apply = StoredGradients.backward


def with_gradients(
    operation: str, backend: str, loss: torch.Tensor, grads: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The loss, through which `inputs` get `grads`: dense tensors, float32 or of their inputs' dtypes, which this takes over."""
    join = StoredGradients.apply if is_compiling() or _len_torch_dispatch_stack() else _apply
    return join((operation, backend), (loss, *grads), *inputs)


def learners(tensors: Sequence[Any], wanted: Sequence[bool]) -> tuple[torch.Tensor, ...]:
    """Those whose gradients are wanted: the inputs of `with_gradients`."""
    return tuple(itertools.compress(tensors, wanted))
