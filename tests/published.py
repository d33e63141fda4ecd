"""Comparing a loss and its gradients with a published form of it, in float64."""

from __future__ import annotations

from typing import Any

import torch
from targets import Target

F64 = torch.float64


def embeddings(n: int, ds: int, dt: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, ds, generator=generator), torch.randn(n, dt, generator=generator)


def gradients(function: Any, *inputs: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """The loss and the gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = function(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def close(got: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    """Errors relative to the largest element of each."""
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        scale = e.abs().max().clamp_min(1e-30)
        assert float((g.to(e) - e).abs().max() / scale) <= tolerance


def same(got: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-12) -> None:
    """Element by element, whatever the dtypes."""
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=1e-14)


def agrees(
    function: Any, published: Any, inputs: tuple[torch.Tensor, ...], target: Target, near_zero: bool = False,
    **options: Any,
) -> None:  # fmt: skip
    """Value and gradients of the published form in float64, to what float32 allows; on the reference to float64's.

    A float32 reference keeps few digits of a loss near 0.
    """
    exact = gradients(published, *(x.to(F64) for x in inputs))
    if not (near_zero and target.backend == "reference"):
        close(gradients(function, *inputs, **options, backend=target.backend), exact, 5e-6)
    if target.backend == "reference":
        close(gradients(function, *(x.to(F64) for x in inputs), **options), exact, 1e-10)


def runs_here(target: Target) -> str:
    """The target's backend, the reference where a family has no CUDA C++."""
    return "reference" if target.backend in ("cuda", "cuda_on_cpu") else target.backend
