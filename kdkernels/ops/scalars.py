"""Hyper-parameters on their way into an operator.

An operator takes them as one small float32 tensor: numbers in a schema would make torch.compile
specialise, and recompile whenever a temperature is annealed. Plain numbers stay on the CPU and are
passed to a kernel by value; if one of them is a tensor on a GPU they all go there, and the kernel
reads them, so that nothing waits for the device.
"""

from __future__ import annotations

import functools
from typing import Union

import torch

Number = Union[float, int, torch.Tensor]


@functools.lru_cache(maxsize=4096)
def _constant(values: tuple[float, ...]) -> torch.Tensor:
    # Shared by every call with these values: operators only read it.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32)


def pack(values: tuple[Number, ...]) -> torch.Tensor:
    """A float32 vector of these values, detached."""
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    if torch.compiler.is_compiling():
        device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
        one = torch.ones((), device=device)
        return torch.stack([(v.detach().to(one) if isinstance(v, torch.Tensor) else one * v).reshape(()) for v in values])
    if not tensors:
        return _constant(tuple(float(v) for v in values))  # type: ignore[arg-type]
    device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
    if device.type == "cpu":
        return torch.tensor([float(v) for v in values], dtype=torch.float32)
    filled = [torch.full((), float(v), device=device) if not isinstance(v, torch.Tensor) or v.device.type == "cpu"
              else v.detach().to(torch.float32).reshape(()) for v in values]
    return torch.stack(filled)
