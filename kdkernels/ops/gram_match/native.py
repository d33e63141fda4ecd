"""Calls into the compiled kernels, CPU and CUDA alike."""

from __future__ import annotations

from typing import Any

import torch

from kdkernels import backends


def forward(backend: str, student: torch.Tensor, *args: Any) -> None:
    """The entry gram_match; the arguments are op.py's."""
    library = backends.library(backend)
    library.call("gram_match", student, *args, *library.context(student))
