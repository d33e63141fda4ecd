"""Whether a result meets the bar of kdkernels.bench.accuracy. Two measures, and it must pass both, tensor by tensor:

- normwise: the 2-norm of the whole error. A small bias everywhere fails here.
- elementwise: the largest error of one element. One wrong element fails here.
"""

from __future__ import annotations

import dataclasses

import torch

from kdkernels.bench.accuracy import FACTOR, rounding, same_special


@dataclasses.dataclass(frozen=True)
class Level:
    """The errors of fp32 eager for one kind of result: the largest of what `seen` was shown."""

    norm: float = 0.0
    element: float = 0.0

    def seen(self, eager: torch.Tensor, exact: torch.Tensor) -> Level:
        error = (eager.double() - exact).abs()
        largest = float(error.amax()) if error.numel() else 0.0
        return Level(max(self.norm, float(error.norm())), max(self.element, largest))


def assert_accurate(got: torch.Tensor, exact: torch.Tensor, level: Level, what: str) -> None:
    """Fails unless `got` meets the bar against `exact`, both finite or both not in the same way.

    Args:
        got: the kernel's result, in its own dtype, on any device.
        exact: the same in float64.
        level: the errors of fp32 eager.
        what: for the message.
    """
    got_dtype, got, exact = got.dtype, got.detach().double().cpu(), exact.detach().double().cpu()
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)} instead of {tuple(exact.shape)}"
    same = same_special(got, exact)
    if not same.all():
        at = tuple((~same).nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {float(got[at])} at {at} instead of {float(exact[at])}, and {int((~same).sum())} in all"
        )
    finite = exact.isfinite()
    exact, got = exact.where(finite, 0.0), got.where(finite, 0.0)
    error, ulp = (got - exact).abs(), rounding(exact, got_dtype)

    norm, bar = float(error.norm()), FACTOR * level.norm + float(ulp.norm())
    assert norm <= bar, (
        f"{what}: the error's norm is {norm:.3g}; the bar is {bar:.3g}, of which fp32 eager's own error is {level.norm:.3g}"
    )
    excess = error - (FACTOR * level.element + ulp)
    if excess.numel() and float(excess.amax()) > 0:
        at = _unravel(int(excess.argmax()), excess.shape)
        raise AssertionError(
            f"{what}: {float(got[at])!r} at {at} instead of {float(exact[at])!r}: off by {float(error[at]):.3g}, where "
            f"{float(error[at] - excess[at]):.3g} is allowed ({int((excess > 0).sum())} of {excess.numel()} elements)"
        )


def _unravel(index: int, shape: torch.Size) -> tuple[int, ...]:
    at: list[int] = []
    for size in reversed(shape):
        at.append(index % size)
        index //= size
    return tuple(at[::-1])


def draws(numel: int) -> tuple[int, int]:
    """How many draws stand behind err(fp32 eager) of the loss, and of the gradients: few elements need many."""
    return (64, 32) if numel <= 64 else (32, 24) if numel <= 1024 else (16, 12) if numel <= 32768 else (2, 2)
