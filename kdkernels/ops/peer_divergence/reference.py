"""Peer divergence in plain PyTorch: the oracle of the tests (in float64) and the fallback everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def _kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher, student) of rows of log-probabilities; a class without mass adds 0."""
    p = teacher.exp()
    mass = (p != 0) | teacher.isnan() | student.isnan()  # a NaN is seen wherever it is
    return (p * (teacher.where(mass, 0.0) - student.where(mass, 0.0))).sum(-1)


def peer_divergence(
    logits: Sequence[torch.Tensor],
    *,
    temperature: float | torch.Tensor,
    pair_weight: float,
    scale_by_t2: bool,
    dim: int,
    reduction: str,
    labels: torch.Tensor | None,
    weight: torch.Tensor | None,
    ignore_index: int,
    num_items: float | torch.Tensor | None,
) -> torch.Tensor:
    """The same operation as op.peer_divergence, whose docstring says what each argument is."""
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32
    rows = [x.movedim(dim, -1).to(dtype) for x in logits]
    shape = rows[0].shape[:-1]
    w = torch.ones(shape, dtype=dtype, device=rows[0].device) if weight is None else weight.to(dtype)
    if labels is not None:
        w = w.masked_fill(labels == ignore_index, 0.0)
    kept = w != 0
    # Masked before the arithmetic: autograd makes NaN of an infinity that is masked after it.
    log_p = [torch.log_softmax(x.where(kept.unsqueeze(-1), 0.0) / temperature, -1) for x in rows]
    losses = []
    for i, own in enumerate(log_p):
        loss = torch.zeros(shape, dtype=dtype, device=own.device) + 0.0 * own.where(own.isfinite(), 0.0).sum(-1)
        for j, peer in enumerate(log_p):
            if i != j:
                loss = loss + _kl(peer.detach(), own)
        losses.append((w * loss).where(kept, 0.0))
    factor = pair_weight * temperature**2 if scale_by_t2 else pair_weight
    each = torch.stack(losses) * factor
    if reduction == "none":
        return each
    if num_items is not None:
        divisor = torch.as_tensor(num_items, dtype=dtype, device=each.device).reshape(())
    elif reduction == "rowmean":
        divisor = w.sum()
    else:
        sizes = {"sum": 1, "batchmean": logits[0].shape[0], "mean": logits[0].numel()}
        divisor = torch.tensor(float(sizes[reduction]), dtype=dtype, device=each.device)
    empty = divisor == 0
    return each.sum().where(~empty, 0.0) / divisor.where(~empty, 1.0)
