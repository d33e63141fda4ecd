"""Calls into the compiled kernels, CPU and CUDA alike."""

from __future__ import annotations

from typing import Any

import torch

from kdkernels import backends


def relations(backend: str, student: torch.Tensor, *args: Any) -> None:
    """The CPU kernels' entry sample_relations; the arguments are op.py's."""
    library = backends.library(backend)
    library.call("sample_relations", student, *args, *library.context(student))


def forward(backend: str, student: torch.Tensor, *args: Any) -> None:
    """The CUDA kernels' entry triplet_angle; the arguments are op.py's."""
    library = backends.library(backend)
    scratch = student.new_empty((-(-student.shape[0] // 32)) ** 2)
    library.call("triplet_angle", student, *args, scratch, *library.context(student))
