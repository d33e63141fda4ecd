"""The operator of soft shortest paths, its autograd, and the choice of backend."""

from __future__ import annotations

import math

import torch

from kdkernels.ops.graph_closure import native, reference
from kdkernels.ops.library import define, first_order, save
from kdkernels.ops.scalars import Number

BACKENDS = ("triton", "cpu", "reference")


def _forward(costs: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    distances, visits = _forward_fake(costs, backend)
    if costs.numel() == 0:
        return distances, visits
    if backend == "triton":
        from kdkernels.ops.graph_closure import triton

        triton.forward(costs, distances, visits)
    else:
        native.forward(backend, costs, distances, visits)
    return distances, visits


def _forward_fake(costs, backend):
    return torch.empty_like(costs, dtype=torch.float64), costs.new_empty(costs.shape[:-1])


def _backward(
    costs: torch.Tensor, distances: torch.Tensor, visits: torch.Tensor, upstream: torch.Tensor, backend: str
) -> torch.Tensor:
    d_costs = torch.empty_like(costs)
    if costs.numel() == 0:
        return d_costs
    args = costs, distances, visits, upstream.contiguous(), d_costs
    if backend == "triton":
        from kdkernels.ops.graph_closure import triton

        triton.backward(*args)
    else:
        native.backward(backend, *args)
    return d_costs


def _backward_fake(costs, distances, visits, upstream, backend):
    return torch.empty_like(costs)


forward_op = define("graph_closure_forward(Tensor costs, str backend) -> (Tensor, Tensor)", _forward, _forward_fake)
backward_op = define(
    "graph_closure_backward(Tensor costs, Tensor distances, Tensor visits, Tensor upstream, str backend) -> Tensor",
    _backward,
    _backward_fake,
)


class GraphClosure(torch.autograd.Function):
    """The gradient is made in the backward, from the costs and what the forward found.

    Its terms are e to the differences of distances: they are kept in float64.
    """

    @staticmethod
    def forward(ctx, costs, backend):
        distances, visits = forward_op(costs, backend)
        output = distances.float()
        save(ctx, output, costs, distances, visits)
        ctx.backend = backend
        return output

    @staticmethod
    def backward(ctx, upstream):
        output, costs, distances, visits = ctx.saved_tensors
        with torch.no_grad():
            d_costs = backward_op(costs, distances, visits, upstream, ctx.backend)
        (d_costs,) = first_order("graph_closure", output, (d_costs,))
        return d_costs, None


def graph_closure(costs: torch.Tensor, *, backend: str) -> torch.Tensor:
    """-log of the weight of all walks from i to their first visit of j, an edge's weight being exp(-cost).

    Args:
        costs: of the edges from i to j, float32 (graphs, N, N), finite; the diagonal is not looked at. The weights of
            the edges out of a vertex must add up to less than 1.
        backend: a resolved one.

    Returns:
        (graphs, N, N), the diagonal 0.
    """
    if backend == "reference":
        return reference.graph_closure(costs)
    return GraphClosure.apply(costs.contiguous(), backend)


def soft_shortest_paths(lengths: torch.Tensor, temperature: Number, *, backend: str) -> torch.Tensor:
    """Lengths of the shortest paths from i to j, softly: all walks count, the longer the less.

    A walker leaves each vertex for another one, all as likely, or gives up (1 of N), and gives up underway with
    probability 1 - exp(-length / temperature); this is -temperature log of the probability that it arrives.
    Between the shortest path's length and that plus `temperature log N` for each of its edges.

    Args:
        lengths: of the edges, non-negative, finite, (graphs, N, N), the diagonal not looked at.
        temperature: positive.
        backend: a resolved one.
    """
    n = lengths.shape[-1]
    return temperature * graph_closure(lengths / temperature + math.log(max(n, 1)), backend=backend)
