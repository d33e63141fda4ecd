"""Linear divergences in plain PyTorch: the whole logits, then the row reference."""

from __future__ import annotations

from typing import Any

import torch

from kdkernels.ops.row_divergence import reference
from kdkernels.ops.row_divergence.kinds import Inputs
from kdkernels.ops.scalars import Number


def logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    own: torch.Tensor | None,
    scale: Number | None,
    softcap: Number | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """softcap tanh(scale (hidden weight^T + bias) / softcap) in `dtype`, last the row's own class."""
    z = hidden.to(dtype) @ weight.to(dtype).transpose(-1, -2)
    if bias is not None:
        z = z + bias.to(dtype)
    if own is not None:
        z = torch.cat([z, (hidden.to(dtype) * own.to(dtype)).sum(-1, keepdim=True)], -1)
    if scale is not None:
        z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def linear_divergence(student: Any, teacher: Any, **options: Any) -> torch.Tensor:
    """The same operation as op.linear_divergence; student and teacher are its Heads."""
    heads = [student] if teacher is None else [student, teacher]
    dtype = torch.float64 if torch.float64 in [x.dtype for h in heads for x in (h.hidden, h.weight)] else torch.float32
    scores = [logits(h.hidden, h.weight, h.bias, h.own, h.scale, h.softcap, dtype) for h in heads]
    s, t = scores[0], scores[-1].detach() if teacher is None else scores[-1]
    return reference.row_divergence(s, t, dim=-1, inputs=Inputs.LOGITS, **options)
