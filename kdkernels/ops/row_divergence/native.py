"""Calls into the compiled kernels, CPU and CUDA alike."""

from __future__ import annotations

from typing import Any

from kdkernels import backends
from kdkernels.native import View


def _context(backend: str, student: View, scalars: Any) -> tuple[Any, tuple[int, ...]]:
    library = backends.library(backend)
    context = library.context(student.tensor)
    if backend != "cpu":
        context = (int(scalars.device.type == "cuda"), *context)
    return library, context


def forward(backend: str, student: View, teacher: View, *args: Any) -> None:
    """The entry row_divergence_forward; the arguments are op.py's."""
    library, context = _context(backend, student, args[3])
    library.call("row_divergence_forward", student, teacher, *args, *context)


def backward(backend: str, student: View, teacher: View, *args: Any) -> None:
    """The entry row_divergence_backward; the arguments are op.py's."""
    library, context = _context(backend, student, args[3])
    library.call("row_divergence_backward", student, teacher, *args, *context)
