"""One model's side of a loss from hidden states: its logits a chunk of tokens at a time, and what becomes of their gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kdkernels.native import View
from kdkernels.ops.linear_divergence import gemm
from kdkernels.ops.scalars import Number, pack

FLOAT = 4  # bytes of a logit, whatever the inputs are
# Bounds of the automatic budget for a chunk's logits of both models.
MOST_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
LEAST_ROWS = 64


class Head(NamedTuple):
    """One model's side: softcap tanh(scale (hidden weight^T + bias) / softcap).

    `own` is one more class for every row alone: its score is hidden . own, and it stands last.
    """

    hidden: torch.Tensor  # (N, H)
    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None = None  # (V,)
    own: torch.Tensor | None = None  # (N, H)
    scale: Number | None = None
    softcap: Number | None = None


def pack_transforms(*heads: Head) -> tuple[torch.Tensor, int]:
    """(scales and softcaps of the heads, which of them count, a bit each), as an operator takes them."""
    each = [x for head in heads for x in (head.scale, head.softcap)]
    return pack(tuple(0.0 if x is None else x for x in each)), sum(1 << i for i, x in enumerate(each) if x is not None)


def unpack_transforms(packed: torch.Tensor, which: int, head: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(scale, softcap) of the head of that number."""
    scale, softcap = (packed[i] if which >> i & 1 else None for i in (2 * head, 2 * head + 1))
    return scale, softcap


def chunk_rows(rows: int, classes: int, width: int, chunk_bytes: int, buffers: int, device: str) -> int:
    """Rows of a chunk, all chunks but the last alike.

    Args:
        rows, classes: of the logits.
        width: the student's hidden size.
        chunk_bytes: what the logits of a chunk may take; 0 chooses. The float32 gradient of a weight is read and
            written once a chunk, which beside the product is little from about `width` rows on, and what such a
            chunk's logits take is that gradient's own size.
        buffers: how many tensors of a chunk's logits there are at a time.
    """
    row = FLOAT * classes * buffers
    if chunk_bytes == 0:
        chunk_bytes = max(min(row * width, MOST_BYTES.get(device, MOST_BYTES["cuda"])), row * LEAST_ROWS)
    most_rows = max(chunk_bytes // row, 1)
    if rows <= most_rows:
        return max(rows, 1)
    n = -(-rows // -(-rows // most_rows))  # as few chunks, but equal ones
    # A multiple of 8 where there is a choice: then slices of labels and losses are aligned.
    return n if n < 8 else min(-(-n // 8) * 8, most_rows // 8 * 8)


class Side:
    """A head with the accumulators of those of its gradients that are wanted."""

    def __init__(self, head: Head, wants: list[bool]):
        self.head = head
        self.any = any(wants)
        self.products = gemm.Products(head.hidden, head.weight)
        h, w, b, o = (t if want else None for t, want in zip(head[:4], wants, strict=True))
        f32 = {"dtype": torch.float32, "device": head.hidden.device}
        # What a float16 model gets stays wide until the backward knows its scale.
        self.d_hidden = None if h is None else torch.empty(h.shape, dtype=stored(h.dtype), device=h.device)
        self.d_weight = None if w is None else torch.empty(w.shape, **f32)
        self.d_bias = None if b is None else torch.zeros(b.shape, **f32)
        self.d_own = None if o is None else torch.empty(o.shape, dtype=stored(o.dtype), device=o.device)
        if self.d_weight is not None and head.hidden.shape[0] == 0:
            self.d_weight.zero_()

    def scores(self, rows: slice, out: torch.Tensor) -> None:
        head = self.head
        classes = head.weight.shape[0]
        self.products.scores(rows, out[:, :classes])
        if head.bias is not None:
            out[:, :classes].add_(head.bias)
        if head.own is not None:
            out[:, -1] = (head.hidden[rows].float() * head.own[rows]).sum(-1)
        if head.softcap is not None:
            out.mul_(1 / head.softcap if head.scale is None else head.scale / head.softcap).tanh_().mul_(head.softcap)
        elif head.scale is not None:
            out.mul_(head.scale)

    def accumulate(self, rows: slice, gradient: torch.Tensor, scores: torch.Tensor) -> None:
        """Takes the gradient of a chunk's scores; both are used up."""
        head, classes = self.head, self.head.weight.shape[0]
        if head.softcap is not None:
            gradient.mul_(scores.div_(head.softcap).square_().neg_().add_(1.0))
        if head.scale is not None:
            gradient.mul_(head.scale)
        hidden = head.hidden[rows]
        of_classes = gradient[:, :classes]
        if self.d_bias is not None:
            self.d_bias.add_(of_classes.sum(0))
        if self.d_hidden is not None or self.d_weight is not None:
            operand, factor = self.products.operand(of_classes)
        if self.d_hidden is not None:
            wide = self.d_hidden.dtype == torch.float32
            out = self.d_hidden[rows] if wide else torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
            self.products.by_hidden(operand, factor, out)
            if head.own is not None:
                out.addcmul_(gradient[:, -1:], head.own[rows].float())
            if not wide:
                self.d_hidden[rows] = out
        if self.d_own is not None:
            self.d_own[rows] = gradient[:, -1:] * hidden.float()
        if self.d_weight is not None:
            self.products.by_weight(rows, operand, factor, self.d_weight)

    def gradients(self) -> list[torch.Tensor]:
        """Those that are wanted, in the order of the head's tensors."""
        found = (self.d_hidden, self.d_weight, self.d_bias, self.d_own)
        return [d.to(stored(x.dtype)) for d, x in zip(found, self.head[:4]) if d is not None and x is not None]


def stored(dtype: torch.dtype) -> torch.dtype:
    """How a gradient waits for its upstream scale: float16 would underflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def view(x: torch.Tensor) -> View:
    """A chunk's logits as rows of the kernels."""
    return View(x, (*x.shape, 1), (*x.stride(), 1))
