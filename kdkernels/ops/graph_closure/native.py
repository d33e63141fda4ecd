"""Calls into the compiled kernels."""

from __future__ import annotations

import torch

from kdkernels import backends


def forward(backend: str, costs: torch.Tensor, distances: torch.Tensor, visits: torch.Tensor) -> None:
    """The entry graph_closure_forward; the arguments are op.py's."""
    library = backends.library(backend)
    library.call("graph_closure_forward", costs, distances, visits, *library.context(costs))


def backward(
    backend: str,
    costs: torch.Tensor,
    distances: torch.Tensor,
    visits: torch.Tensor,
    upstream: torch.Tensor,
    d_costs: torch.Tensor,
) -> None:
    """The entry graph_closure_backward; the arguments are op.py's."""
    library = backends.library(backend)
    library.call("graph_closure_backward", costs, distances, visits, upstream, d_costs, *library.context(costs))
