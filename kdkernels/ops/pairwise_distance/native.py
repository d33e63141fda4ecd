"""Calls into the compiled kernels, CPU and CUDA alike."""

from __future__ import annotations

from typing import Any

import torch

from kdkernels import backends


def forward(backend: str, x: torch.Tensor, hi: torch.Tensor, lo: torch.Tensor | None) -> None:
    """The entry pairwise_distance_forward; the arguments are op.py's."""
    library = backends.library(backend)
    library.call("pairwise_distance_forward", x, hi, lo, *library.context(x))


def backward(backend: str, x: torch.Tensor, weights: torch.Tensor, dx: torch.Tensor) -> None:
    """The entry pairwise_distance_backward; the arguments are op.py's."""
    library = backends.library(backend)
    library.call("pairwise_distance_backward", x, weights, dx, *library.context(x))


def match(backend: str, student: torch.Tensor, *args: Any) -> None:
    """The CUDA kernels' entry distance_match; the arguments are op.py's."""
    library = backends.library(backend)
    scratch = student.new_empty(8 * -(-student.numel() // 1024) + 16)
    library.call("distance_match", student, *args, scratch, *library.context(student))
