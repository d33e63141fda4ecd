"""Relations along edges in plain PyTorch: the oracle of the tests, and the fallback."""

from __future__ import annotations

import torch


def edge_values(x: torch.Tensor, source: torch.Tensor, target: torch.Tensor, products: bool) -> torch.Tensor:
    """The same operation as op.edge_values."""
    a, b = x[source], x[target]
    return (a * b).sum(1) if products else (a - b).pow(2).sum(1)


def log_softmax(x: torch.Tensor, target: torch.Tensor, nodes: int) -> torch.Tensor:
    """Over the edges that lead to one node."""
    top = x.detach().new_full((nodes,), -torch.inf).scatter_reduce(0, target, x.detach(), "amax")
    shifted = x - top[target]
    total = x.new_zeros(nodes).index_add(0, target, shifted.exp())
    return shifted - total[target].log()


def edge_divergence(
    student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, nodes: int, squares: bool
) -> torch.Tensor:
    """The same operation as op.edge_divergence."""
    own, other = log_softmax(student, target, nodes), log_softmax(teacher, target, nodes)
    if squares:
        return (own.exp() - other.exp()).pow(2).sum()
    return (other.exp() * (other - own)).sum()
