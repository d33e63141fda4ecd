"""Calls into the compiled kernels."""

from __future__ import annotations

from typing import Any

import torch

from kdkernels import backends


def values(backend: str, x: torch.Tensor, *args: Any) -> None:
    """The entry edge_values; the arguments are op.py's."""
    library = backends.library(backend)
    library.call("edge_values", x, *args, *library.context(x))


def gradient(backend: str, x: torch.Tensor, *args: Any) -> None:
    """The entry edge_gradient; the arguments are op.py's."""
    library = backends.library(backend)
    library.call("edge_gradient", x, *args, *library.context(x))
