"""The peer_divergence operators, their autograd, and the choice of backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kdkernels import backends
from kdkernels.native import View
from kdkernels.ops import layout
from kdkernels.ops.library import define, first_order, save
from kdkernels.ops.peer_divergence import native, reference
from kdkernels.ops.scalars import Number, detached, pack
from kdkernels.ops.scale.op import scaled


def _kernels(backend: str) -> Any:
    """(forward, backward) of a backend, with one argument list for all."""
    if backend == "triton":
        from kdkernels.ops.peer_divergence import triton

        return triton.forward, triton.backward
    return (lambda *a: native.forward(backend, *a)), (lambda *a: native.backward(backend, *a))


def _learners(first: torch.Tensor, others: Sequence[torch.Tensor], stacked: bool) -> int:
    return first.shape[0] if stacked else 1 + len(others)


def _empty_gradient(first: torch.Tensor, others: Sequence[torch.Tensor], stacked: bool) -> torch.Tensor:
    """One tensor for the gradients of all learners."""
    return torch.empty_like(first) if stacked else first.new_empty((1 + len(others), *first.shape))


def _stack(x: torch.Tensor, row: View) -> View:
    """A stack of learners as (learners, outer, classes, inner), from the rows of its first."""
    if row.tensor.stride() != x[0].stride():
        x = x.contiguous()  # as rows of one are only in a copy
    return View(x, (x.shape[0], *row.shape), (x.stride(0), *row.stride))


def _views(
    first: torch.Tensor, others: Sequence[torch.Tensor], stacked: bool, d: torch.Tensor, dim: int
) -> tuple[list[View], View | None]:
    one = (first[0],) if stacked else (first, *others)
    *parts, gradient = layout.rows(dim, *one, d[0] if d.numel() else None)
    return (
        [_stack(first, parts[0])] if stacked else [View(v.tensor, (1, *v.shape), (0, *v.stride)) for v in parts],
        None if gradient is None else _stack(d, gradient),
    )


def _rows(first: torch.Tensor, stacked: bool, dim: int) -> int:
    shape = list(first.shape[1:] if stacked else first.shape)
    del shape[dim]
    rows = 1
    for n in shape:
        rows *= n
    return rows


def _collect(d: torch.Tensor, view: View | None) -> None:
    """Brings a gradient home that could only be written as rows in a copy."""
    if view is not None and view.tensor is not d:
        d.copy_(view.tensor)


# The scalars are (temperature, factor). `dim` counts the axes of one learner.
def _forward(
    scalars: torch.Tensor,
    first: torch.Tensor,
    others: Sequence[torch.Tensor],
    labels: torch.Tensor | None,
    weight: torch.Tensor | None,
    divisor: torch.Tensor | None,
    count: int,
    ignore_index: int,
    dim: int,
    stacked: bool,
    want: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    options = {"dtype": torch.float32, "device": first.device}
    losses = torch.empty(_learners(first, others, stacked), _rows(first, stacked, dim), **options)
    total, used = torch.empty((), **options), torch.empty(1, **options)
    used.fill_(1.0) if divisor is None else used.copy_(divisor)
    d = _empty_gradient(first, others, stacked) if want else first.new_empty(0)
    parts, d_view = _views(first, others, stacked, d, dim)
    _kernels(backend)[0](
        parts, labels, weight, scalars, used if divisor is not None or count else None, losses, View(total, (1,), (1,)), d_view,
        count, ignore_index,
    )  # fmt: skip
    _collect(d, d_view)
    return total, losses, used, d


def _forward_fake(scalars, first, others, labels, weight, divisor, count, ignore_index, dim, stacked, want, backend):
    options = {"dtype": torch.float32, "device": first.device}
    return (
        torch.empty((), **options),
        torch.empty(_learners(first, others, stacked), _rows(first, stacked, dim), **options),
        torch.empty(1, **options),
        _empty_gradient(first, others, stacked) if want else first.new_empty(0),
    )


def _backward(
    scalars: torch.Tensor,
    first: torch.Tensor,
    others: Sequence[torch.Tensor],
    labels: torch.Tensor | None,
    weight: torch.Tensor | None,
    divisor: torch.Tensor,
    upstream: torch.Tensor,
    ignore_index: int,
    dim: int,
    stacked: bool,
    backend: str,
) -> torch.Tensor:
    d = _empty_gradient(first, others, stacked)
    if d.numel() == 0:
        return d
    parts, d_view = _views(first, others, stacked, d, dim)
    _kernels(backend)[1](
        parts, labels, weight, scalars, divisor, upstream.reshape(-1).contiguous().float(), d_view, ignore_index
    )
    _collect(d, d_view)
    return d


def _backward_fake(scalars, first, others, labels, weight, divisor, upstream, ignore_index, dim, stacked, backend):
    return _empty_gradient(first, others, stacked)


forward_op = define(
    "peer_divergence_forward(Tensor scalars, Tensor first, Tensor[] others, Tensor? labels, Tensor? weight, "
    "Tensor? divisor, int count, int ignore_index, int dim, bool stacked, bool want, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
backward_op = define(
    "peer_divergence_backward(Tensor scalars, Tensor first, Tensor[] others, Tensor? labels, Tensor? weight, "
    "Tensor divisor, Tensor upstream, int ignore_index, int dim, bool stacked, str backend) -> Tensor",
    _backward,
    _backward_fake,
)


class PeerDivergence(torch.autograd.Function):
    """Losses and all gradients in one pass where that is safe.

    As in row_divergence: a float16 gradient is not stored before its upstream scale is known, nor are
    gradients of one loss a row; there the backward reads the logits again.
    """

    @staticmethod
    def forward(ctx, labels, weight, scalars, divisor, options, *logits):
        count, ignore_index, dim, per_row, stacked, backend = options
        first, others = logits[0], list(logits[1:])
        wanted = any(ctx.needs_input_grad[5:])
        stored = wanted and not per_row and first.dtype != torch.float16
        total, losses, used, d = forward_op(
            scalars, first, others, labels, weight, divisor, count, ignore_index, dim, stacked, stored, backend
        )
        rows = list(first.shape[1:] if stacked else first.shape)
        del rows[dim]
        output = losses.view(losses.shape[0], *rows) if per_row else total
        ctx.stored, ctx.stacked, ctx.backend = stored, stacked, backend
        if stored:
            ctx.save_for_backward(output, d)
        elif wanted:
            save(ctx, output, labels, weight, scalars, used, *logits)
            ctx.options = ignore_index, dim, stacked, backend
        return output

    @staticmethod
    def backward(ctx, upstream):
        if ctx.stored:
            output, d = ctx.saved_tensors
            (d,) = scaled((d,), upstream, ctx.backend)
        else:
            output, labels, weight, scalars, used, first, *others = ctx.saved_tensors
            with torch.no_grad():
                d = backward_op(scalars, first, others, labels, weight, used, upstream, *ctx.options)
        grads = (d,) if ctx.stacked else d.unbind(0)
        grads = tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad[5:]))
        return (None, None, None, None, None, *first_order("peer_divergence", output, grads))


def peer_divergence(
    logits: torch.Tensor | Sequence[torch.Tensor],
    *,
    temperature: Number = 1.0,
    pair_weight: float = 1.0,
    scale_by_t2: bool = True,
    dim: int = -1,
    reduction: str = "rowmean",
    labels: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    backend: str = "auto",
    operation: str = "peer_divergence",
) -> torch.Tensor:
    """pair_weight * T^2 * the sum of KL(p_j, p_i) over all ordered pairs i != j, the gradient to p_i alone.

    The arguments are those of kdkernels.losses.mutual, already validated there; beyond them:

    Args:
        logits: one tensor (M, ...), or M of one shape and dtype.
        pair_weight: the factor of every pair.
        dim: the class axis of one learner's scores, negative or not.
        operation: the public name, for messages.
    """
    stacked = isinstance(logits, torch.Tensor)
    tensors = (logits,) if stacked else tuple(logits)
    one = tensors[0][0] if stacked else tensors[0]
    learners = tensors[0].shape[0] if stacked else len(tensors)
    supported = backends.BACKENDS if learners <= native.GPU_LEARNERS else ("cpu", "reference")
    backend = backends.resolve(operation, tensors, backend, supported)
    dim %= one.dim()
    if backend == "reference" or (backend not in backends.BACKENDS and learners > native.GPU_LEARNERS):
        return reference.peer_divergence(
            tensors[0].unbind(0) if stacked else tensors, temperature=temperature, pair_weight=pair_weight,
            scale_by_t2=scale_by_t2, dim=dim, reduction=reduction, labels=labels, weight=weight,
            ignore_index=ignore_index, num_items=num_items,
        )  # fmt: skip
    if not stacked and learners > native.PARTS:
        tensors, stacked = (torch.stack(tensors),), True
    factor: Number = pair_weight
    count, divisor = 0, None
    if reduction == "none" or (reduction == "sum" and num_items is None):
        pass
    elif isinstance(num_items, torch.Tensor):
        divisor = num_items.detach().to(one.device, torch.float32).reshape(1)
    elif num_items is not None:
        factor = factor / num_items
    elif reduction == "batchmean":
        factor = factor / max(one.shape[0], 1)
    elif reduction == "mean":
        factor = factor / max(one.numel(), 1)
    elif labels is None and weight is None:
        factor = factor / max(one.numel() // one.shape[dim], 1)
    else:
        count = 1
    if scale_by_t2:
        factor = factor * detached(temperature) ** 2
    return PeerDivergence.apply(
        layout.flat(labels, torch.int64), layout.flat(weight, torch.float32), pack((temperature, factor)), divisor,
        (count, ignore_index, dim, reduction == "none", stacked, backend), *tensors,
    )  # fmt: skip
