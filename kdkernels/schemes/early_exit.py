"""Self-distillation by auxiliary heads, and inference that stops at the first head that is sure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from kdkernels import checks
from kdkernels.losses.structured import auxiliary_heads_loss
from kdkernels.schemes.labels import cross_entropy
from kdkernels.typed import typed


def self_distillation_loss(logits: Sequence[torch.Tensor], labels: torch.Tensor, **options: Any) -> torch.Tensor:
    """Be your own teacher, the whole loss: the deepest head learns from labels, the others from labels and from it.

    CE(z_last, y) + auxiliary_heads_loss(z_others, z_last, y): Zhang et al. (2019, arXiv:1905.08094).

    Args:
        logits: scores of all heads, (..., V) each, the deepest last.
        labels: class indices, (...).
        options: keyword arguments of `auxiliary_heads_loss` (temperature, alpha, ...).

    Raises:
        ValueError: no head.
        ValueError, TypeError, IndexError, BackendError: as auxiliary_heads_loss.
    """
    stacked = isinstance(logits, torch.Tensor) and logits.dim() > 0
    logits = list(logits) if stacked else checks.tensors("logits", logits)
    if len(logits) == 0:
        raise ValueError("logits must hold at least the deepest head's, got none")
    for i, z in enumerate(logits):
        checks.float_tensor(f"logits[{i}]", z)
        if z.dim() == 0:
            raise ValueError(f"logits[{i}] must have a class axis, got a 0-d tensor")
    *heads, deepest = logits
    loss = cross_entropy(deepest, labels, options.get("ignore_index", -100))
    return loss + auxiliary_heads_loss(heads, deepest, labels, **options) if heads else loss


class EarlyExitNetwork(nn.Module):
    """A network in stages with a head after each; training sees all heads, inference as few as it needs.

        model = EarlyExitNetwork([stem, block_1, block_2], [head_0, head_1, head_2])
        loss = self_distillation_loss(model(x), y)
        logits, exits = model.infer(x, threshold=0.9)

    Args:
        stages: modules, each taking the one before's output, a tensor whose first axis is the batch.
        heads: one module a stage, from its output to scores (N, V).

    Raises:
        ValueError: no stage, or another number of heads.
    """

    @typed
    def __init__(self, stages: Iterable[nn.Module], heads: Iterable[nn.Module]):
        super().__init__()
        self.stages, self.heads = nn.ModuleList(stages), nn.ModuleList(heads)
        if len(self.stages) == 0 or len(self.stages) != len(self.heads):
            raise ValueError(
                f"stages and heads must be as many, at least one; got {len(self.stages)} and {len(self.heads)}"
            )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The scores of all heads, the deepest last."""
        logits = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            logits.append(head(x))
        return logits

    @torch.no_grad()
    @typed
    def infer(self, x: torch.Tensor, threshold: float | Sequence[float] = 0.95) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (N, V), each from the first head whose largest probability reaches the threshold, and which head.

        A sample that has left is not computed further: the remaining ones are gathered into a smaller batch, which
        waits for the device once a stage. Use eval mode: batch statistics would depend on who is left. As in
        BranchyNet (Teerapittayanon et al. 2016, arXiv:1709.01686), with probabilities for its entropies.

        Args:
            x: the batch.
            threshold: one number, or one for every head but the deepest, which takes whoever is left. At 0 all leave
                at the first head; above 1 all reach the deepest.

        Raises:
            ValueError: another number of thresholds.
            RuntimeError: in training mode.
        """
        early = len(self.heads) - 1
        thresholds = list(threshold) if isinstance(threshold, Sequence) else [threshold] * early
        if len(thresholds) != early:
            raise ValueError(f"threshold must be a number or {early} numbers, got {len(thresholds)}")
        for k, limit in enumerate(thresholds):
            checks.plain_number(f"threshold[{k}]", limit, low=0)
        if self.training:
            raise RuntimeError("infer needs eval(): in training mode a sample's scores depend on who left before it")
        left = torch.arange(len(x), device=x.device)
        exits = torch.full((len(x),), early, device=x.device)
        result: torch.Tensor | None = None
        for k, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            x = stage(x)
            logits = head(x)
            if result is None:
                result = logits.new_empty(len(left), *logits.shape[1:])
            if k == early:
                result[left] = logits
                break
            sure = logits.float().softmax(-1).amax(-1) >= thresholds[k]
            order, count = (~sure).byte().argsort(stable=True), int(sure.sum())  # who leaves first; one wait
            leaving, staying = order[:count], order[count:]
            result[left[leaving]] = logits[leaving]
            exits[left[leaving]] = k
            left, x = left[staying], x[staying]
            if len(left) == 0:
                break
        assert result is not None
        return result, exits
