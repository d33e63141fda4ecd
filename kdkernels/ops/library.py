"""The torch.library namespace `kdkernels`, and the idioms every operator here shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

LIBRARY = torch.library.Library("kdkernels", "DEF")
TENSORS = {torch.Tensor, torch.nn.Parameter}  # and no subclass, whose operations may be its own


def looked_at(*tensors: torch.Tensor) -> bool:
    """Whether something looks on: torch.compile, a dispatch mode, a transform of torch.func, a tensor subclass."""
    # What backends.transformed says, without a call: every small loss asks this three times.
    if (
        is_compiling()
        or _len_torch_dispatch_stack()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return True
    for x in tensors:  # noqa: SIM110 (a generator would take three times as long)
        if type(x) not in TENSORS:
            return True
    return False


def learns(*tensors: torch.Tensor | None) -> bool:
    """Whether a gradient is wanted of any: an autograd.Function that none is wanted of takes 6 us for nothing."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines an operator: one implementation for every device, and its shapes for tracing.

    define + impl costs a third of torch.library.custom_op per call, and opcheck passes either way.

    Returns:
        What our own code calls: the operator where something looks on, else the implementation
        itself, which saves the dispatcher's share of a small call.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kdkernels::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.kdkernels, name).default

    def call(x: torch.Tensor, *args: Any) -> Any:
        if looked_at(x):
            with torch.no_grad():  # gradients are our own business
                return operator(x, *args)
        return implementation(x, *args)

    return call


def savable(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors; of a teacher's that were made under torch.inference_mode, copies: autograd keeps no such."""
    if is_compiling() or torch.is_inference_mode_enabled():
        return tensors
    return tuple([x.clone() if x is not None and x.is_inference() else x for x in tensors])


def save(ctx: Any, *tensors: torch.Tensor | None) -> None:
    """Saves tensors for the backward."""
    ctx.save_for_backward(*savable(*tensors))


class FirstOrderOnly(torch.autograd.Function):
    """Passes gradients through, and says what to do when somebody differentiates them again."""

    @staticmethod
    def forward(ctx: Any, operation: str, output: torch.Tensor, *grads: torch.Tensor | None) -> Any:
        ctx.operation = operation
        ctx.set_materialize_grads(False)
        return grads

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"the fused kernels of {ctx.operation} have no second derivative; "
            "call it with backend='reference', which has"
        )


def first_order(
    operation: str, output: torch.Tensor, grads: Sequence[torch.Tensor | None]
) -> Sequence[torch.Tensor | None]:
    """The gradients a backward returns; under create_graph=True they refuse a second backward.

    `output` is what the forward returned and saved. Upstream gradients seldom require grad, but the
    way from the gradients to the inputs leads through `output`, so that nobody gets there silently.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return FirstOrderOnly.apply(operation, output, *grads)
    return grads
