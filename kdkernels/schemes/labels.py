"""The labels' share of a loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kdkernels import checks


def known_labels(labels: torch.Tensor, logits: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Labels of the rows of logits (..., V), checked, as int64."""
    checks.float_tensor("logits", logits)
    found = checks.labels_of(labels, tuple(logits.shape[:-1]), logits.shape[-1], ignore_index, logits.device)
    if found is None:
        raise TypeError("labels must be a tensor, got NoneType")
    return found


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """torch's over the last axis, in float32 or wider; 0, not NaN, where every row is left out, as the fused losses."""
    labels = known_labels(labels, logits, ignore_index)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(wide.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp_min(1)
