"""Calls into the compiled kernels, CPU and CUDA alike."""

from __future__ import annotations

from typing import Any

import torch

from kdkernels import backends


def forward(backend: str, student: torch.Tensor, *args: Any) -> None:
    """The entry triplet_angle; the arguments are op.py's."""
    library = backends.library(backend)
    library.call("triplet_angle", student, *args, *library.context(student))
