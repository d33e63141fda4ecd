"""The matrix products around a chunk of logits: operands as they come, sums and results in float32.

A GPU multiplies 16-bit operands as they are and adds in float32. A CPU gets them widened, the weight a
slab of classes at a time, so that no float32 copy of a whole head is made.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

SLAB_BYTES = 8 << 20


def _narrow(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether the device multiplies these two as they are, though they are not float32."""
    return x.is_cuda and x.dtype == y.dtype != torch.float32


def _slabs(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The rows of a weight as float32, all at once where they already are."""
    if weight.dtype == torch.float32:
        yield slice(None), weight
        return
    step = max(SLAB_BYTES // (4 * max(weight.shape[1], 1)), 1)
    for start in range(0, weight.shape[0], step):
        part = slice(start, start + step)
        yield part, weight[part].float()


def scores(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out = hidden weight^T."""
    if _narrow(hidden, weight):
        torch.mm(hidden, weight.t(), torch.float32, out=out)
        return
    hidden = hidden.float()
    for part, w in _slabs(weight):
        torch.mm(hidden, w.t(), out=out[:, part])


def operand(
    gradient: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A float32 gradient as these two will meet it, and what the products are to be multiplied by.

    Float16 has no room for 1/N times a difference of probabilities: it takes the gradient times a power of two that
    brings its largest element near the top of the range. The device finds it, nobody waits.
    """
    if not _narrow(hidden, weight):
        return gradient, None
    if hidden.dtype != torch.float16:
        return gradient.to(hidden.dtype), None
    return fitted(gradient)


def fitted(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float16 gradient times a power of two, one over that power)."""
    top = gradient.abs().amax()
    exponent = torch.frexp(top.where(top.isfinite() & (top > 0), 1.0)).exponent.clamp(min=-100)
    scale = torch.ldexp(torch.ones_like(top), 14 - exponent)
    return (gradient * scale).half(), 1 / scale


def by_hidden(gradient: torch.Tensor, factor: torch.Tensor | None, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out = gradient weight, out in float32."""
    if gradient.dtype != torch.float32:
        torch.mm(gradient, weight, torch.float32, out=out)
        if factor is not None:
            out.mul_(factor)
        return
    for i, (part, w) in enumerate(_slabs(weight)):
        out.addmm_(gradient[:, part], w, beta=0 if i == 0 else 1)


def by_weight(
    gradient: torch.Tensor, factor: torch.Tensor | None, hidden: torch.Tensor, total: torch.Tensor, first: bool
) -> None:
    """total += gradient^T hidden, total in float32 (= where it is the first)."""
    beta = 0 if first else 1
    if gradient.dtype == torch.float32:
        total.addmm_(gradient.t(), hidden.float(), beta=beta)
    elif factor is None:
        torch.addmm(total, gradient.t(), hidden, torch.float32, beta=beta, out=total)
    else:
        part = torch.mm(gradient.t(), hidden, torch.float32).mul_(factor)
        total.copy_(part) if first else total.add_(part)
