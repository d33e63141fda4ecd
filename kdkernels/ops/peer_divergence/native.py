"""Calls into the compiled kernels, CPU and CUDA alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kdkernels import backends
from kdkernels.native import View

PARTS = 16  # tensors that an entry takes; each holds one learner or several, one behind the other
GPU_LEARNERS = 16  # what the kernels of a GPU hold in registers


def _call(name: str, backend: str, parts: Sequence[View], scalars: torch.Tensor, args: Sequence[Any]) -> None:
    library = backends.library(backend)
    context = library.context(parts[0].tensor)
    if backend != "cpu":
        context = (int(scalars.device.type == "cuda"), *context)
    library.call(name, *parts, *[None] * (PARTS - len(parts)), *args, *context)


def forward(backend: str, parts: Sequence[View], labels: Any, weight: Any, scalars: torch.Tensor, *args: Any) -> None:
    """The entry peer_divergence_forward; the arguments are op.py's."""
    _call("peer_divergence_forward", backend, parts, scalars, (labels, weight, scalars, *args))


def backward(backend: str, parts: Sequence[View], labels: Any, weight: Any, scalars: torch.Tensor, *args: Any) -> None:
    """The entry peer_divergence_backward; the arguments are op.py's."""
    _call("peer_divergence_backward", backend, parts, scalars, (labels, weight, scalars, *args))
