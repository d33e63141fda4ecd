"""Calls into the compiled kernels, CPU and CUDA alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kdkernels import backends


def entry(backend: str, name: str) -> Callable[..., None]:
    """The entry row_divergence_forward or _backward of a backend; the arguments are op.py's."""

    def on_cpu(*args: Any) -> None:
        backends.library(backend).call(name, *args, torch.get_num_threads())

    def on_device(*args: Any) -> None:
        library = backends.library(backend)
        library.call(name, *args, int(args[5].device.type == "cuda"), *library.context(args[0][0]))

    return on_cpu if backend == "cpu" else on_device
