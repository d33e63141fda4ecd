"""Soft shortest paths in plain PyTorch: the oracle of the tests, and the fallback.

One vertex after another is let into the interior of the walks, in logarithms throughout.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

NO_EDGE = 1e30  # finite, for the difference of two infinities is none
STEPS = 32  # vertices between two matrices that are kept for the backward


def _with_vertices(d: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """-log of the weight of all walks of at least one edge, their interiors below `start`, then below `stop`."""
    for k in range(start, stop):
        # Any number of returns to k on the way: 1 / (1 - w_kk).
        returns = torch.log(-torch.expm1(-d[..., k, k]))
        to, onward = d[..., :, k] + returns[..., None], d[..., k, :]
        d = -torch.logaddexp(-d, -(to[..., :, None] + onward[..., None, :]))
    return d


def graph_closure(costs: torch.Tensor) -> torch.Tensor:
    """The same operation as op.graph_closure, whose docstring says what each argument is."""
    n = costs.shape[-1]
    itself = torch.eye(n, dtype=torch.bool, device=costs.device)
    d = costs.masked_fill(itself, NO_EDGE)
    if n <= STEPS:
        d = _with_vertices(d, 0, n)
    else:
        for start in range(0, n, STEPS):
            d = checkpoint(_with_vertices, d, start, min(start + STEPS, n), use_reentrant=False)
    visits = torch.nn.functional.softplus(-d.diagonal(dim1=-2, dim2=-1))
    return (d + visits[..., None, :]).masked_fill(itself, 0.0)
