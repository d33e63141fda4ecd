"""torchtune's distillation losses, by our kernels: change the import and nothing else.

    from kdkernels.integrations.torchtune import ForwardKLLoss

Names, constructor and call arguments, values and gradients are torchtune's: its forward KL is the cross-entropy with the
teacher's distribution, without the teacher's entropy. What is deliberately not as there: where one model has mass on a
class to which the other gives -inf the loss is infinite (there: that class counts 0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

import kdkernels

__all__ = [
    "ForwardKLLoss",
    "ForwardKLWithChunkedOutputLoss",
    "ReverseKLLoss",
    "ReverseKLWithChunkedOutputLoss",
    "SymmetricKLLoss",
    "SymmetricKLWithChunkedOutputLoss",
]


class _OfLogits(nn.Module):
    """A loss of logits (B T, V) and labels, over the tokens that are not `ignore_index`.

    Call it with (student_logits, teacher_logits, labels, normalize=True): the mean over those tokens, or their sum.
    """

    divergence: Callable[..., torch.Tensor]

    def __init__(self, ignore_index: int = -100):
        super().__init__()
        self.ignore_index = ignore_index

    def forward(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        labels: torch.Tensor,
        normalize: bool = True,
    ) -> torch.Tensor:
        student, teacher = (x.flatten(0, -2) for x in (student_logits, teacher_logits))
        return type(self).divergence(
            student, teacher, weight=(labels != self.ignore_index).flatten(),
            reduction="rowmean" if normalize else "sum",
        )  # fmt: skip


class ForwardKLLoss(_OfLogits):
    """-sum p_t log p_s.

    Args:
        ignore_index: the label that leaves a token out.
    """

    divergence = staticmethod(kdkernels.soft_cross_entropy)


class ReverseKLLoss(_OfLogits):
    """KL(p_s, p_t).

    Args:
        ignore_index: the label that leaves a token out.
    """

    divergence = staticmethod(kdkernels.reverse_kl_div)


class SymmetricKLLoss(nn.Module):
    """sym_kd_ratio ForwardKLLoss + (1 - sym_kd_ratio) ReverseKLLoss.

    Args:
        sym_kd_ratio: between 0 and 1.
        ignore_index: the label that leaves a token out.
    """

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100):
        super().__init__()
        if not 0 <= sym_kd_ratio <= 1:
            raise ValueError(f"sym_kd_ratio must be between 0 and 1, got {sym_kd_ratio}")
        self.sym_kd_ratio, self.ignore_index = sym_kd_ratio, ignore_index
        self.fkl, self.rkl = ForwardKLLoss(ignore_index), ReverseKLLoss(ignore_index)

    def forward(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        labels: torch.Tensor,
        normalize: bool = True,
    ) -> torch.Tensor:
        forward, reverse = (f(student_logits, teacher_logits, labels, normalize) for f in (self.fkl, self.rkl))
        return self.sym_kd_ratio * forward + (1 - self.sym_kd_ratio) * reverse


class _OfChunks(nn.Module):
    """One of the losses above, of logits that come as lists of chunks (B, T / num_output_chunks, V) of the tokens.

    Call it with (student_logits, teacher_logits, labels), labels (B, T): the mean over the tokens that count. Our losses from
    hidden states (`kdkernels.linear_kl_div` and others) need no chunks of the caller.
    """

    def __init__(self, loss: nn.Module, num_output_chunks: int, ignore_index: int):
        super().__init__()
        self.loss, self.num_output_chunks, self.ignore_index = loss, num_output_chunks, ignore_index

    def forward(
        self, student_logits: Sequence[torch.Tensor], teacher_logits: Sequence[torch.Tensor], labels: torch.Tensor
    ) -> torch.Tensor:
        chunks = zip(student_logits, teacher_logits, labels.chunk(self.num_output_chunks, 1))
        losses = [self.loss(s, t, y, normalize=False) for s, t, y in chunks]
        return sum(losses[1:], losses[0]) / (labels != self.ignore_index).sum().clamp(min=1)


class ForwardKLWithChunkedOutputLoss(_OfChunks):
    """ForwardKLLoss of chunks.

    Args:
        num_output_chunks: how many.
        ignore_index: the label that leaves a token out.
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100):
        super().__init__(ForwardKLLoss(ignore_index), num_output_chunks, ignore_index)


class ReverseKLWithChunkedOutputLoss(_OfChunks):
    """ReverseKLLoss of chunks.

    Args:
        num_output_chunks: how many.
        ignore_index: the label that leaves a token out.
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100):
        super().__init__(ReverseKLLoss(ignore_index), num_output_chunks, ignore_index)


class SymmetricKLWithChunkedOutputLoss(_OfChunks):
    """SymmetricKLLoss of chunks.

    Args:
        num_output_chunks: how many.
        sym_kd_ratio: between 0 and 1.
        ignore_index: the label that leaves a token out.
    """

    def __init__(self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100):
        super().__init__(SymmetricKLLoss(sym_kd_ratio, ignore_index), num_output_chunks, ignore_index)
