"""row_gather in plain PyTorch: the oracle of the tests (in float64) and the fallback everywhere."""

from __future__ import annotations

import math

import torch


def row_gather(
    student: torch.Tensor,
    indices: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    live: torch.Tensor | None,
    outside: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The same operation as op.row_gather, whose docstring says what each argument is."""
    classes = student.shape[-1]
    s = student.to(dtype)
    bad = ((indices < -1) | (indices >= classes)).any(-1, keepdim=True)
    if live is not None:
        s = s.where(live.unsqueeze(-1), 0.0)
        bad = bad & live.unsqueeze(-1)
    # A factor, so that the gradient of such a row is NaN as well.
    s = s * torch.ones((), dtype=dtype, device=s.device).where(~bad, math.nan)
    log_p = torch.log_softmax(s / temperature, -1)
    gathered = log_p.gather(-1, indices.clamp(0, classes - 1))
    if live is not None:
        gathered = gathered.where(live.unsqueeze(-1), 0.0)
    gathered = gathered.masked_fill(indices == -1, -math.inf)
    if not outside:
        return gathered, None, None
    others = torch.ones(*student.shape[:-1], classes + 1, dtype=torch.bool, device=s.device)
    others = others.scatter(-1, indices.where((indices >= 0) & (indices < classes), classes), False)[..., :-1]
    left = log_p.masked_fill(~others, -math.inf)
    empty = (left == -math.inf).all(-1)
    rest = left.masked_fill(empty.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(empty, -math.inf)
    total = log_p.where(others, 0.0).sum(-1) if outside == 2 else None
    if live is not None:
        rest = rest.where(live, 0.0)
        total = None if total is None else total.where(live, 0.0)
    return gathered, rest, total
