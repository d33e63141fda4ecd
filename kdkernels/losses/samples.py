"""What losses between samples share: lengths, distances, and the least that counts."""

from __future__ import annotations

import torch

from kdkernels.ops.pairwise_distance import op as pairwise
from kdkernels.ops.pairwise_distance import reference as pairwise_reference

EPS = 1e-12  # the least squared distance, or length, that is not taken for 0


def wide(x: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def normalized(x: torch.Tensor) -> torch.Tensor:
    """Rows of length 1, at least in float32; a zero row stays zero and gets no gradient."""
    x = wide(x)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)  # its own gradient at 0 is 0
    return x / length.clamp_min(EPS).masked_fill(length == 0, torch.inf)


def squared_distances(x: torch.Tensor, backend: str, *, exact: bool = False) -> torch.Tensor:
    """Of all pairs of rows; `exact` ones, by kernels, are float64, for what would magnify a rounding to float32."""
    if backend == "reference":
        return pairwise_reference.squared_distances(wide(x))
    hi, lo = pairwise.squared_distances(x, backend=backend, split=exact)
    return hi.double() + lo if exact else hi


def off_diagonal(x: torch.Tensor) -> torch.Tensor:
    return ~torch.eye(x.shape[0], dtype=torch.bool, device=x.device)


def mean_square(x: torch.Tensor) -> torch.Tensor:
    return x.pow(2).sum() / max(x.numel(), 1)
