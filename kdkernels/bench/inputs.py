"""Inputs of a registry case, on any device and in any dtype, and one evaluation of a loss on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kdkernels.ops.registry import Case, Inputs, Shape

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Loss = Callable[..., torch.Tensor]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make(case: Case, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """The case's inputs, drawn where they will be used: a billion normals take a CPU half a minute."""
    with torch.device(device):
        drawn = case.make(shape, torch.Generator(device).manual_seed(seed))
    return {name: x.to(dtype) if name in case.grads else x for name, x in drawn.items()}


def moved(case: Case, inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    """The same values elsewhere, the floating ones that get gradients in another dtype."""
    return {name: x.to(device, dtype if name in case.grads else x.dtype) for name, x in inputs.items()}


def bench_grads(case: Case) -> tuple[str, ...]:
    """The inputs that get a gradient when timed."""
    return case.bench_grads or case.grads[:1]


def with_leaves(inputs: Inputs, names: tuple[str, ...]) -> Inputs:
    """The inputs with fresh leaves under `names`, sharing memory."""
    return {name: x.detach().requires_grad_() if name in names else x for name, x in inputs.items()}


def evaluate(
    loss: Loss, inputs: Inputs, options: dict[str, Any], names: tuple[str, ...], upstream: torch.Tensor | None = None
) -> Inputs:
    """{"loss": value, "d <name>": gradient}; `upstream` is the gradient handed to the loss (default 1)."""
    leaves = with_leaves(inputs, names)
    value = loss(**leaves, **options)
    wanted = [leaves[n] for n in names]
    grads = torch.autograd.grad(value, wanted, None if upstream is None else upstream.to(value), allow_unused=True)
    found = {f"d {n}": torch.zeros_like(x) if g is None else g for n, x, g in zip(names, wanted, grads)}
    return {"loss": value.detach(), **found}
