"""A loss of one line in the registry's form, right or wrong on demand: what the bench's own tests run on."""

from __future__ import annotations

import torch

from kdkernels.ops.registry import Case, Shape, Spec


def make(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(shape, generator=generator)}


def eager(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return scale * x.float().square().mean()


def right(x: torch.Tensor, scale: float = 1.0, backend: str = "auto") -> torch.Tensor:
    return scale * (x if x.dtype == torch.float64 else x.float()).square().mean()


def wrong(x: torch.Tensor, scale: float = 1.0, backend: str = "auto") -> torch.Tensor:
    """Off by a hundredth of a percent on every backend but the reference."""
    return right(x, scale) * (1.0 if backend == "reference" else 1.0001)


def raising(x: torch.Tensor, scale: float = 1.0, backend: str = "auto") -> torch.Tensor:
    if backend != "reference":
        raise RuntimeError("no such kernel")
    return right(x, scale)


def spec(function=right) -> Spec:
    case = Case(
        "toy", function, make, {"scale": 3.0}, eager, grads=("x",), shapes=((3, 5), (2, 70)), bench={"small": (64, 50)},
        bench_gpu={"small": (64, 50)}, floor_bytes=lambda shape, size, backward: (2 if backward else 1) * 3200 * size,
        headline=True,
    )  # fmt: skip
    return Spec("toy_family", ("reference", "cpu"), (case,))
