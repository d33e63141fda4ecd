"""The operators of relations along edges, their autograd, and the choice of backend."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kdkernels.ops.edge_relation import native, reference
from kdkernels.ops.library import define, first_order, learns, save
from kdkernels.ops.scale.op import learners, with_gradients

BACKENDS = ("triton", "cpu", "reference")


class Edges(NamedTuple):
    """A graph's edges in the order of the nodes that they lead to.

    Attributes:
        source, target: the nodes of each edge.
        arriving: where the edges to each node begin, and the last ones end, (N + 1,).
        leaving: the same of the edges from each node in `by_source`.
        by_source: the edges in the order of the nodes that they come from.
    """

    source: torch.Tensor
    target: torch.Tensor
    arriving: torch.Tensor
    leaving: torch.Tensor
    by_source: torch.Tensor


def ordered(edge_index: torch.Tensor, nodes: int) -> Edges:
    """Edges (2, E) of a graph, in order."""
    target, order = torch.sort(edge_index[1], stable=True)
    source = edge_index[0][order]
    of_source, by_source = torch.sort(source, stable=True)
    borders = torch.arange(nodes + 1, device=edge_index.device)
    return Edges(
        source,
        target,
        torch.searchsorted(target, borders),
        torch.searchsorted(of_source, borders),
        by_source,
    )


def _values(x: torch.Tensor, source: torch.Tensor, target: torch.Tensor, products: bool, backend: str) -> torch.Tensor:
    out = x.new_empty(source.shape)
    if out.numel() == 0:
        return out
    if backend == "triton":
        from kdkernels.ops.edge_relation import triton

        triton.values(x, source, target, out, products)
    else:
        native.values(backend, x, source, target, out, products)
    return out


def _gradient(
    x: torch.Tensor,
    weights: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    arriving: torch.Tensor,
    leaving: torch.Tensor,
    by_source: torch.Tensor,
    products: bool,
    backend: str,
) -> torch.Tensor:
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx
    args = x, weights.contiguous(), source, target, arriving, leaving, by_source, dx, products
    if backend == "triton":
        from kdkernels.ops.edge_relation import triton

        triton.gradient(*args)
    else:
        native.gradient(backend, *args)
    return dx


def _divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    arriving: torch.Tensor,
    squares: bool,
    want_student: bool,
    want_teacher: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """By torch's reductions of segments, in float64: there are E numbers, and in the features E D."""
    nodes = arriving.shape[0] - 1
    empty = student.new_empty(0)
    if student.numel() == 0:
        return student.new_zeros(()), torch.empty_like(student) if want_student else empty, \
            torch.empty_like(teacher) if want_teacher else empty  # fmt: skip
    at = target.clamp(0, max(nodes - 1, 0))  # a wrong index on a GPU reads nothing out of bounds

    def reduce(x: torch.Tensor, how: str) -> torch.Tensor:
        return torch.segment_reduce(x, how, offsets=arriving, unsafe=True)[at]

    def log_softmax(x: torch.Tensor) -> torch.Tensor:
        x = x.double()
        x = x - reduce(x, "max")
        return x - reduce(x.exp(), "sum").log()

    own, other = log_softmax(student), log_softmax(teacher)
    p_s, p_t = own.exp(), other.exp()
    if squares:
        difference = p_s - p_t
        total, h_s, h_t = difference.square().sum(), 2 * difference, -2 * difference
    else:
        h_t = other - own
        total, h_s = (p_t * h_t).sum(), None

    def through(p: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return (p * (h - reduce(p * h, "sum"))).float()

    ds = dt = empty
    if want_student:
        ds = (p_s - p_t).float() if h_s is None else through(p_s, h_s)
    if want_teacher:
        dt = through(p_t, h_t)
    return total.float(), ds, dt


def _divergence_fake(student, teacher, target, arriving, squares, want_student, want_teacher):
    return (
        student.new_empty(()),
        torch.empty_like(student) if want_student else student.new_empty(0),
        torch.empty_like(teacher) if want_teacher else student.new_empty(0),
    )


values_op = define(
    "edge_values(Tensor x, Tensor source, Tensor target, bool products, str backend) -> Tensor",
    _values,
    lambda x, source, target, products, backend: x.new_empty(source.shape),
)
gradient_op = define(
    "edge_gradient(Tensor x, Tensor weights, Tensor source, Tensor target, Tensor arriving, Tensor leaving, "
    "Tensor by_source, bool products, str backend) -> Tensor",
    _gradient,
    lambda x, *_: torch.empty_like(x),
)
divergence_op = define(
    "edge_divergence(Tensor student, Tensor teacher, Tensor target, Tensor arriving, bool squares, bool want_student, "
    "bool want_teacher) -> (Tensor, Tensor, Tensor)",
    _divergence,
    _divergence_fake,
)


class EdgeValues(torch.autograd.Function):
    """No tensor of edges times features, in either direction."""

    @staticmethod
    def forward(ctx, x, edges, products, backend):
        values = values_op(x, edges.source, edges.target, products, backend)
        save(ctx, values, x, *edges)
        ctx.options = products, backend
        return values

    @staticmethod
    def backward(ctx, weights):
        values, x, *edges = ctx.saved_tensors
        with torch.no_grad():
            dx = gradient_op(x, weights, *edges, *ctx.options)
        (dx,) = first_order("edge_relation", values, (dx,))
        return dx, None, None, None


def edge_values(x: torch.Tensor, edges: Edges, *, products: bool, backend: str) -> torch.Tensor:
    """Squared distances (or scalar products) of the two nodes of every edge.

    Args:
        x: nodes' features, float32 (N, D).
        products: scalar products.
        backend: a resolved one.
    """
    if backend == "reference":
        return reference.edge_values(x, edges.source, edges.target, products)
    return EdgeValues.apply(x.contiguous(), edges, products, backend)


def edge_divergence(
    student: torch.Tensor, teacher: torch.Tensor, edges: Edges, *, squares: bool, backend: str
) -> torch.Tensor:
    """The sum over nodes of the divergence of softmaxes over the edges that lead there.

    Args:
        student, teacher: a number for every edge, float32 (E,).
        squares: squared differences of probabilities instead of KL(teacher, student).
        backend: a resolved one.
    """
    if backend == "reference":
        return reference.edge_divergence(student, teacher, edges.target, edges.arriving.shape[0] - 1, squares)
    wants = [learns(student), learns(teacher)]
    with torch.no_grad():
        loss, *made = divergence_op(student, teacher, edges.target, edges.arriving, squares, *wants)
    if not any(wants):
        return loss
    grads = [g for g, want in zip(made, wants) if want]
    return with_gradients("edge_relation", backend, loss, grads, learners((student, teacher), wants))
