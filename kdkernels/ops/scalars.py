"""Hyper-parameters on their way into an operator.

An operator takes them as one small float32 tensor: numbers in a schema would make torch.compile
specialise, and recompile whenever a temperature is annealed. Plain numbers stay on the CPU and are
passed to a kernel by value; if one of them is a tensor on a GPU they all go there, and the kernel
reads them, so that nothing waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

Number = float | int | torch.Tensor


_PLAIN = {float, int, bool, str, type(None), torch.Size, torch.dtype}
_KINDS = {torch.Tensor, torch.nn.Parameter}


def readable(*tensors: torch.Tensor) -> bool:
    """Whether there are values to look at: nothing is being traced, by the compiler or with fake tensors."""
    return not torch.compiler.is_compiling() and _KINDS.issuperset([type(x) for x in tensors])


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """functools.lru_cache, passed by where an argument is a tensor (its value may change) or something looks on.

    The function takes positional arguments only, and what it returns is shared: nobody writes into it.
    """
    cached = functools.lru_cache(maxsize=4096)(function)

    def call(*arguments: Any) -> Any:
        # A dispatch mode (fake tensors) would make a tensor of its own kind, which must not be kept.
        if (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack()
            or not _PLAIN.issuperset(map(type, arguments))
        ):
            return function(*arguments)
        return cached(*arguments)

    return call


@remembered
def _constant(*values: float) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32)


def pack(values: tuple[Number, ...]) -> torch.Tensor:
    """A float32 vector of these values, detached."""
    if not torch.compiler.is_compiling() and {float, int}.issuperset(map(type, values)):
        return _constant(*values)
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    if not readable(*tensors):
        device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
        one = torch.ones((), device=device)
        return torch.stack(
            [(v.detach().to(one) if isinstance(v, torch.Tensor) else one * v).reshape(()) for v in values]
        )
    if not tensors:
        return _constant(*[float(v) for v in values])  # type: ignore[arg-type]
    device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
    if device.type == "cpu":
        return torch.tensor(
            [float(v.detach() if isinstance(v, torch.Tensor) else v) for v in values], dtype=torch.float32
        )
    filled = [
        torch.full((), float(v), device=device)
        if not isinstance(v, torch.Tensor) or v.device.type == "cpu"
        else v.detach().to(torch.float32).reshape(())
        for v in values
    ]
    return torch.stack(filled)
