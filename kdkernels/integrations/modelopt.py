"""ModelOpt's loss of logits, by our kernels: change the import and nothing else.

    from kdkernels.integrations.modelopt import LogitsDistillationLoss

It goes where modelopt.torch.distill takes a criterion. Arguments, values and gradients are ModelOpt's; the teacher gets no
gradient, as there. What is deliberately not as there: a loss of half-precision logits is float32.
"""

from __future__ import annotations

import torch
from torch import nn

import kdkernels
from kdkernels import checks

__all__ = ["LogitsDistillationLoss"]


class LogitsDistillationLoss(nn.modules.loss._Loss):
    """T^2 KL(p_t, p_s) of logits (..., V).

    Args:
        temperature: T.
        reduction: "mean" divides by the number of elements, V included; "batchmean" by size(0), "sum" by nothing; "none"
            gives one value a row.
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "mean"):
        super().__init__(reduction=reduction)
        checks.choice("reduction", reduction, ("mean", "batchmean", "sum", "none"))
        self.temperature = temperature

    def forward(self, logits_s: torch.Tensor, logits_t: torch.Tensor) -> torch.Tensor:
        return kdkernels.kl_div(logits_s, logits_t.detach(), temperature=self.temperature, reduction=self.reduction)
