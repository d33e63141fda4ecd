"""Hinges between the right class of each row of scores and its wrong ones: operator and autograd."""

from __future__ import annotations

import torch

from kdkernels.native import View
from kdkernels.ops.layout import side_by_side
from kdkernels.ops.library import define, first_order, learns, save
from kdkernels.ops.scalars import pack
from kdkernels.ops.weighted_match.sums import kernels


def _margin_rows(
    x: torch.Tensor, labels: torch.Tensor, scalars: torch.Tensor, upstream: torch.Tensor | None, hardest: bool,
    ignore_index: int, backend: str,
) -> torch.Tensor:  # fmt: skip
    out = _margin_fake(x, labels, scalars, upstream, hardest, ignore_index, backend)
    if x.numel():
        (rows, classes), x = x.shape, side_by_side(x)
        map_of = View(x, (1, rows, classes), (0, x.stride(0), 1))
        made = (out, None) if upstream is None else (None, View(out, (1, rows, classes), (0, classes, 1)))
        kernels(backend)(backend, "margin_rows", map_of, labels, scalars, upstream, *made, hardest, ignore_index)
    return out


def _margin_fake(x, labels, scalars, upstream, hardest, ignore_index, backend):
    if upstream is None:
        return torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


margin_op = define(
    "margin_rows(Tensor x, Tensor labels, Tensor scalars, Tensor? upstream, bool hardest, int ignore_index, str backend) "
    "-> Tensor",
    _margin_rows,
    _margin_fake,
)


class MarginRows(torch.autograd.Function):
    """Which hinges are open is seen again in the backward: it reads the scores once more and stores nothing."""

    @staticmethod
    def forward(ctx, x, labels, scalars, options):
        rows = margin_op(x, labels, scalars, None, *options)
        save(ctx, rows, x, labels, scalars)
        ctx.options = options
        return rows

    @staticmethod
    def backward(ctx, upstream):
        rows, x, labels, scalars = ctx.saved_tensors
        with torch.no_grad():
            dx = margin_op(x, labels, scalars, upstream.float().contiguous(), *ctx.options)
        return (*first_order("margin_rows", rows, (dx,)), None, None, None)


def margin_rows(
    x: torch.Tensor,
    labels: torch.Tensor,
    margin: float | torch.Tensor,
    *,
    hardest: bool,
    ignore_index: int,
    backend: str,
) -> torch.Tensor:
    """Of each row of scores (rows, classes) the mean over the wrong classes of max(0, margin + wrong - right), or the largest.

    Args:
        x: scores.
        labels: int64 (rows,); a row labelled ignore_index is 0.
        margin: a number.
        hardest: the largest only.
        backend: a resolved one, not "reference".
    """
    labels, scalars, options = labels.contiguous(), pack((margin, 0.0)), (hardest, ignore_index, backend)
    return MarginRows.apply(x, labels, scalars, options) if learns(x) else margin_op(x, labels, scalars, None, *options)
