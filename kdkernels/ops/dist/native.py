"""Calls into the compiled kernels, CPU and CUDA alike."""

from __future__ import annotations

from typing import Any

from kdkernels import backends
from kdkernels.native import View


def _call(name: str, backend: str, student: View, args: tuple[Any, ...]) -> None:
    library = backends.library(backend)
    context = library.context(student.tensor)
    if backend != "cpu":
        context = (int(args[3].device.type == "cuda"), *context)
    library.call(name, student, *args, *context)


def forward(backend: str, student: View, *args: Any) -> None:
    """The entry dist_forward; the arguments are op.py's."""
    _call("dist_forward", backend, student, args)


def backward(backend: str, student: View, *args: Any) -> None:
    """The entry dist_backward; the arguments are op.py's."""
    _call("dist_backward", backend, student, args)
