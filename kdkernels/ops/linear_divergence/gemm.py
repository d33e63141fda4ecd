"""The matrix products around a chunk of logits: operands as they come, sums and results in float32.

A GPU multiplies 16-bit operands as they are and adds in float32. A CPU gets them widened, the weight a
slab of classes at a time: no float32 copy of a whole head is made, and the product finds its slab in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Classes of a slab. For a CPU so few that its rows are still in the cache when the product packs them: MKL multiplies a
# quarter faster than with 32000 classes at once.
SLAB = {"cpu": 1024, "cuda": 16384}
WIDENS = "dtype_out" in torch.ops.aten.mm.overloads()  # a product may be wider than its operands: from torch 2.8 on


class Products:
    """The products of one model's hidden states (N, H) and weight (V, H), rows by rows."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor):
        self.hidden, self.weight = hidden, weight
        # Whether the device multiplies the two as they are, though they are not float32.
        self.narrow = WIDENS and hidden.is_cuda and hidden.dtype == weight.dtype != torch.float32
        self._slab: torch.Tensor | None = None

    def scores(self, rows: slice, out: torch.Tensor) -> None:
        """out = hidden weight^T."""
        if self.narrow:
            torch.mm(self.hidden[rows], self.weight.t(), torch.float32, out=out)
            return
        hidden = self.hidden[rows].float()
        for part, weight in self._slabs():
            torch.mm(hidden, weight.t(), out=out[:, part])

    def operand(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A float32 gradient of scores as the two products below take it: itself, or with what undoes its scaling."""
        if not self.narrow:
            return gradient, None
        if self.hidden.dtype != torch.float16:
            return gradient.to(self.hidden.dtype), None
        return fitted(gradient)

    def by_hidden(self, gradient: torch.Tensor, factor: torch.Tensor | None, out: torch.Tensor) -> None:
        """out = gradient weight, in float32."""
        if self.narrow:
            torch.mm(gradient, self.weight, torch.float32, out=out)
            if factor is not None:
                out.mul_(factor)
            return
        if self.weight.dtype == torch.float32:
            torch.mm(gradient, self.weight, out=out)
            return
        out.zero_()
        for part, weight in self._slabs():
            out.addmm_(gradient[:, part], weight)

    def by_weight(self, rows: slice, gradient: torch.Tensor, factor: torch.Tensor | None, total: torch.Tensor) -> None:
        """total += gradient^T hidden, in float32; = for the first rows."""
        hidden, beta = self.hidden[rows], 0 if rows.start == 0 else 1
        if not self.narrow:
            total.addmm_(gradient.t(), hidden.float(), beta=beta)
        elif factor is None:
            torch.addmm(total, gradient.t(), hidden, torch.float32, beta=beta, out=total)
        else:
            torch.add(torch.mm(gradient.t(), hidden, torch.float32).mul_(factor), total if beta else 0.0, out=total)

    def _slabs(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The weight in float32, some rows at a time."""
        classes, width = self.weight.shape
        step = min(SLAB.get(self.weight.device.type, SLAB["cuda"]), classes)
        if self.weight.dtype != torch.float32 and self._slab is None:
            # One memory for all, as fresh pages cost more than what is done with them.
            self._slab = torch.empty(step, width, dtype=torch.float32, device=self.weight.device)
        for start in range(0, classes, max(step, 1)):
            part = slice(start, min(start + step, classes))
            rows = self.weight[part]
            yield part, rows if self._slab is None else self._slab[: len(rows)].copy_(rows)


def fitted(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float16 gradient times a power of two, one over that power).

    Float16 has no room for 1/N times a difference of probabilities; this brings the largest element near the top of its
    range. The device finds the power, nobody waits.
    """
    top = gradient.abs().amax()
    exponent = torch.frexp(top.where(top.isfinite() & (top > 0), 1.0)).exponent.clamp(min=-100)
    scale = torch.ldexp(torch.ones_like(top), 14 - exponent)
    return (gradient * scale).half(), 1 / scale
