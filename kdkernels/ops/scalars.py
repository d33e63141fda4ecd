"""Hyper-parameters on their way into an operator.

An operator takes them as one small float32 tensor: numbers in a schema would make torch.compile
specialise, and recompile whenever a temperature is annealed. Plain numbers stay on the CPU and are
passed to a kernel by value; if one of them is a tensor on a GPU they all go there, and the kernel
reads them, so that nothing waits for the device.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from kdkernels.ops.library import TENSORS, looked_at

Number = float | int | torch.Tensor
_CONSTANT = {float, int, bool, str, type(None)}


def readable(*tensors: torch.Tensor) -> bool:
    """Whether there are values to look at: nothing is being traced, by the compiler or with fake tensors."""
    return not torch.compiler.is_compiling() and TENSORS.issuperset([type(x) for x in tensors])


def remembers(arguments: tuple[Any, ...]) -> bool:
    """Whether what follows from these arguments may be kept for a later call with the same.

    Not where one is a tensor, whose value may change, nor while something looks on: a dispatch mode (fake tensors) makes
    tensors of its own kind.
    """
    return _CONSTANT.issuperset(map(type, arguments)) and not looked_at()


def detached(value: Number) -> Number:
    """A hyper-parameter on its way into a kernel, which knows nothing of gradients."""
    return value.detach() if isinstance(value, torch.Tensor) else value


def factor(value: Number) -> Number:
    """A hyper-parameter that a loss is multiplied by, without axes that the loss would take over."""
    return value.reshape(()) if isinstance(value, torch.Tensor) else value


@functools.lru_cache(maxsize=4096)
def _constant(*values: float) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32)


def pack(values: tuple[Number, ...]) -> torch.Tensor:
    """A float32 vector of these values, detached."""
    if remembers(values):
        return _constant(*values)  # shared by every call with these values: operators only read it
    values = tuple([detached(v) for v in values])
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    device = next((t.device for t in tensors if not t.is_cpu), torch.device("cpu"))
    if not readable(*tensors):
        one = torch.ones((), device=device)
        return torch.stack([(v.to(one) if isinstance(v, torch.Tensor) else one * v).reshape(()) for v in values])
    if device.type == "cpu":
        return torch.tensor([float(v) for v in values], dtype=torch.float32)
    return torch.stack([
        v.float().reshape(()) if isinstance(v, torch.Tensor) and not v.is_cpu else torch.full((), float(v), device=device)
        for v in values
    ])  # fmt: skip
