"""Liger Kernel's distillation losses, by our kernels: change the import and nothing else.

    from kdkernels.integrations.liger import LigerFusedLinearJSDLoss

Names, constructor and call arguments, values and gradients are Liger's. What is deliberately not as there: a JSD of
half-precision tensors is float32; -inf in both models' log-probabilities counts 0 (there: NaN); heads of different
vocabularies are an error (there: the smaller one is padded with logits of 0); teachers get no gradient, as there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import kdkernels
from kdkernels.integrations.torch import KLDivLoss

__all__ = ["LigerFusedLinearJSD", "LigerFusedLinearJSDLoss", "LigerJSD", "LigerKLDIVLoss"]


class LigerKLDIVLoss(KLDivLoss):
    """torch.nn.KLDivLoss of log-probabilities and a target.

    Args:
        eps: accepted and not needed: a class without mass in the target contributes 0.
        args, kwargs: of torch.nn.KLDivLoss.
    """

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, y_pred: torch.Tensor, y_true: torch.Tensor) -> torch.Tensor:
        return super().forward(y_pred, y_true.detach())


class LigerJSD(nn.Module):
    """Generalised Jensen-Shannon divergence of log-probabilities (N, V), the mean over the rows that count.

    Args:
        beta: the teacher's share of the mixture; 0 is the forward KL and 1 the reverse one.
        ignore_index: the label that leaves a row out.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100):
        super().__init__()
        self.beta, self.ignore_index = beta, ignore_index

    def forward(
        self, log_q: torch.Tensor, log_p: torch.Tensor, shift_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        return kdkernels.generalized_js_div(
            log_q, log_p.detach(), beta=self.beta, labels=shift_labels, ignore_index=self.ignore_index,
            from_log_probs=True,
        )  # fmt: skip


class LigerFusedLinearJSD(nn.Module):
    """LigerJSD from hidden states (N, H) and heads (V, H), without T^2.

    Args:
        jsd_beta, ignore_index: as in LigerJSD.
        temperature: T.
    """

    def __init__(self, jsd_beta: float = 0.5, ignore_index: int = -100, temperature: float = 1.0):
        super().__init__()
        self.jsd_beta, self.ignore_index, self.temperature = jsd_beta, ignore_index, temperature

    def forward(
        self,
        student_input: torch.Tensor,
        student_weight: torch.Tensor,
        teacher_input: torch.Tensor,
        teacher_weight: torch.Tensor,
        shift_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return kdkernels.linear_generalized_js_div(
            student_input, student_weight, teacher_input.detach(), teacher_weight.detach(), beta=self.jsd_beta,
            labels=shift_labels, ignore_index=self.ignore_index, temperature=self.temperature, scale_by_t2=False,
        )  # fmt: skip


class LigerFusedLinearJSDLoss(nn.Module):
    """weight_hard_loss CE + weight_soft_loss JSD from hidden states and heads, both means over the tokens that count.

    Args:
        weight_hard_loss, weight_soft_loss: at least 0.
        beta, ignore_index: as in LigerJSD.
        temperature: T of the soft term, without T^2.
        compiled, chunk_size: accepted and not needed.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
    ):
        super().__init__()
        if weight_hard_loss < 0 or weight_soft_loss < 0 or weight_hard_loss + weight_soft_loss == 0:
            raise ValueError(
                "weight_hard_loss and weight_soft_loss must be at least 0 and one of them more, "
                f"got {weight_hard_loss} and {weight_soft_loss}"
            )
        self.weight_hard_loss, self.weight_soft_loss, self.beta = weight_hard_loss, weight_soft_loss, beta
        self.ignore_index, self.temperature = ignore_index, temperature

    def forward(
        self,
        student_input: torch.Tensor,
        student_weight: torch.Tensor,
        teacher_input: torch.Tensor,
        teacher_weight: torch.Tensor,
        true_labels: torch.Tensor,
        student_bias: torch.Tensor | None = None,
        teacher_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        total = self.weight_hard_loss + self.weight_soft_loss
        return total * kdkernels.linear_distillation_loss(
            student_input, student_weight, teacher_input.detach(), teacher_weight.detach(), true_labels, self.temperature,
            self.weight_soft_loss / total, divergence="js", divergence_options={"beta": self.beta},
            student_bias=student_bias, teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
            scale_by_t2=False, ignore_index=self.ignore_index,
        )  # fmt: skip
