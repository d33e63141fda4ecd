"""Calls into the compiled kernels, CPU and CUDA alike."""

from __future__ import annotations

from typing import Any

import torch

from kdkernels import backends


def forward(backend: str, student: torch.Tensor, *args: Any) -> None:
    """The entry triplet_angle; the arguments are op.py's."""
    library = backends.library(backend)
    scratch = () if backend == "cpu" else (student.new_empty((-(-student.shape[0] // 32)) ** 2),)
    library.call("triplet_angle", student, *args, *scratch, *library.context(student))
