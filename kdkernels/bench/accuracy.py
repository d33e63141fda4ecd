"""How far a kernel may be from the truth. The bar:

    err(kernel) <= 2 * err(float32 PyTorch) + one rounding of the output's dtype

The truth is the reference in float64 on the very values that the kernel was given; float32 PyTorch is the reference, or what
people write today, in float32 on those values. (PyTorch in bfloat16 is several times worse than rounded float32, so it is no
bar.) err(float32 PyTorch) is the largest over the inputs at hand and some draws of their like, since the error of a few scalars
can be next to nothing by luck and would then condemn a kernel that is as good.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kdkernels import backends
from kdkernels.bench.inputs import Loss, dtype_name, evaluate, make, moved
from kdkernels.ops.registry import Case, Inputs, Shape, Spec

FACTOR = 2.0
WIDEST = 2**24  # elements of a row that are still checked


def draws(shape: Shape) -> int:
    """How many draws stand behind float32 PyTorch's error: on few elements it is now and then right by luck."""
    n = math.prod(shape)
    return 64 if n <= 512 else 16 if n <= 20_000 else 6 if n <= 100_000 else 2


@dataclass(frozen=True)
class Result:
    """One output of one case on one backend: its largest error and the bar at that element."""

    family: str
    case: str
    shape: Shape
    dtype: str
    backend: str
    device: str
    output: str
    error: float
    bar: float
    note: str = ""

    @property
    def ratio(self) -> float:
        """Error over bar; passed at 1 or below."""
        return 0.0 if self.error == 0 else self.error / self.bar if self.bar > 0 else math.inf

    @property
    def passed(self) -> bool:
        return self.ratio <= 1 and not self.note

    def record(self) -> dict[str, Any]:
        finite = {k: v if math.isfinite(v) else str(v) for k, v in (("error", self.error), ("bar", self.bar))}
        return {**asdict(self), **finite, "shape": list(self.shape), "passed": self.passed}


def rounding(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The largest error that rounding each element to `dtype` can make: half the least subnormal near zero."""
    output = torch.finfo(dtype)
    return (exact.abs() * (output.eps / 2)).clamp(min=output.tiny * output.eps / 2)


def same_special(value: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Where both are finite, or the same infinity, or both NaN."""
    both = exact.isfinite() & value.isfinite()
    return both | (value == exact) | (value.isnan() & exact.isnan())


def _scale(exact: torch.Tensor) -> float:
    """The largest finite magnitude; 1 where all is 0, for what cancels there is of the order of 1."""
    return (float(exact.where(exact.isfinite(), 0.0).abs().amax()) if exact.numel() else 0.0) or 1.0


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error over the largest finite magnitude."""
    exact = exact.double()
    value = value.to(exact.device, torch.float64)
    if not same_special(value, exact).all():
        return math.inf
    error = (value - exact).where(exact.isfinite(), 0.0).abs()
    return float(error.amax()) / _scale(exact) if error.numel() else 0.0


def compare(value: torch.Tensor, exact: torch.Tensor, allowed: float) -> tuple[float, float]:
    """(error, bar) at the element that is worst against its bar.

    Args:
        value: what a kernel returned.
        exact: the same in float64.
        allowed: `relative_error` of float32 PyTorch.
    """
    exact = exact.double()
    wide = value.to(exact.device, torch.float64)
    if not same_special(wide, exact).all():
        return math.inf, FACTOR * allowed * _scale(exact)
    if exact.numel() == 0:
        return 0.0, 0.0
    kept = exact.isfinite()
    error = (wide - exact).where(kept, 0.0).abs()
    # What cancels to 0 everywhere is of the order of 1 on the way, and rounded as float32.
    cancelled = 0.0 if exact.any() else torch.finfo(torch.float32).eps / 2
    bar = FACTOR * allowed * _scale(exact) + rounding(exact.where(kept, 0.0), value.dtype).clamp(min=cancelled)
    at = int((error / bar).argmax())
    return float(error.flatten()[at]), float(bar.flatten()[at])


def upstream_for(value: torch.Tensor, seed: int) -> torch.Tensor:
    """A gradient to hand to the loss: 1 or 1/2 for a scalar (no rounding of its own), uneven for one a row."""
    if value.dim() == 0:
        return torch.tensor(0.5 if seed % 2 else 1.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + torch.rand(value.shape, generator=generator, dtype=torch.float32).double()


def oracle(case: Case) -> Loss:
    """The loss in plain PyTorch, right in float64."""

    def loss(**inputs: Any) -> torch.Tensor:
        return case.function(**inputs, backend="reference")

    return loss


def yardstick(case: Case, shape: Shape, device: torch.device, seeds: int) -> dict[str, float]:
    """`relative_error` of float32 PyTorch for every output, the worst of several draws.

    One figure serves inputs of every dtype; `check` adds what PyTorch does on the very values in hand.
    """
    plain = [loss for loss in (case.eager, oracle(case)) if loss is not None]
    worst: dict[str, float] = {}
    for seed in range(seeds):
        inputs = make(case, shape, torch.float32, device, seed)
        exact, upstream = exact_values(case, inputs, device, seed)
        for loss in plain:
            for name, value in evaluate(loss, inputs, dict(case.options), case.grads, upstream).items():
                worst[name] = max(worst.get(name, 0.0), relative_error(value, exact[name]))
    return {name: _finite(error) for name, error in worst.items()}


def _finite(error: float) -> float:
    """No excuse is taken from a yardstick that is not finite itself."""
    return error if math.isfinite(error) else 0.0


def exact_values(case: Case, inputs: Inputs, device: torch.device, seed: int) -> tuple[Inputs, torch.Tensor]:
    """Every output in float64, and the upstream gradient that it was made with."""
    wide, options = moved(case, inputs, device, torch.float64), dict(case.options)
    with torch.no_grad():
        upstream = upstream_for(oracle(case)(**wide, **options), seed)
    return evaluate(oracle(case), wide, options, case.grads, upstream), upstream


def check(
    spec: Spec,
    case: Case,
    shape: Shape,
    dtypes: tuple[torch.dtype, ...],
    names: tuple[str, ...],
    device: torch.device,
    oracle_device: torch.device | None = None,
    seeds: int = 2,
) -> Iterator[Result]:
    """Every output of one case in every dtype on every backend named, its worst draw."""
    oracle_device = oracle_device or device
    allowed = yardstick(case, shape, oracle_device, max(seeds, draws(shape)))
    for dtype in dtypes:
        worst: dict[tuple[str, str], Result] = {}
        for seed in range(seeds):
            inputs = make(case, shape, dtype, oracle_device, seed)
            exact, upstream = exact_values(case, inputs, oracle_device, seed)
            same = evaluate(
                oracle(case),
                moved(case, inputs, oracle_device, torch.float32),
                dict(case.options),
                case.grads,
                upstream,
            )
            here = {name: max(allowed[name], _finite(relative_error(x, exact[name]))) for name, x in same.items()}
            there = moved(case, inputs, device, dtype)
            for backend in names:
                about = (spec.family, case.name, shape, dtype_name(dtype), backend, device.type)
                options = {**case.options, "backend": backend}
                try:
                    values = evaluate(case.function, there, options, case.grads, upstream.to(device))
                except Exception as error:  # one broken kernel must not hide the others
                    worst[backend, ""] = Result(*about, "", math.inf, 0.0, f"{type(error).__name__}: {error}")
                    continue
                for output, value in values.items():
                    result = Result(*about, output, *compare(value, exact[output], here[output]))
                    if (backend, output) not in worst or result.ratio > worst[backend, output].ratio:
                        worst[backend, output] = result
        yield from worst.values()


def available(spec: Spec, device: torch.device, wanted: str | None = None) -> tuple[str, ...]:
    """The backends of a family that run on this device; `wanted` narrows them to one."""
    candidates = spec.backends if wanted in (None, "auto") else (wanted,)
    return tuple(b for b in candidates if backends.unavailable(b, device.type) is None)


def wide_shapes(case: Case, gpu: bool) -> tuple[Shape, ...]:
    """The benchmark's shapes cut to two rows, so that the long-row paths are checked too; less those with whole matrices
    behind a row, as of weights, whose float64 takes minutes."""
    real = case.bench_gpu if gpu else case.bench
    cut = dict.fromkeys((min(2, n), *rest) for n, *rest in real.values())
    return tuple(shape for shape in cut if math.prod(shape[1:]) <= WIDEST)


def shapes_of(case: Case, gpu: bool, small: bool) -> tuple[Shape, ...]:
    """What to check a case at; `small` is for tools that slow a kernel down a hundred times."""
    if not small:
        return tuple(dict.fromkeys((*case.shapes, *wide_shapes(case, gpu))))
    chosen = case.shapes[len(case.shapes) // 3 :: max(1, len(case.shapes) // 3)]
    return (*chosen, *wide_shapes(case, gpu)[-1:]) if gpu else chosen
