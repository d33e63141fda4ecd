"""Exact stand-ins for torch.nn.functional.kl_div and torch.nn.KLDivLoss.

    from kdkernels.integrations.torch import kl_div, KLDivLoss

Signatures, values, gradients, result dtypes, warnings and errors are torch's. One kernel reads both
tensors and writes the gradient where torch reduces over tensors of one shape in float16, bfloat16 or
float32, and no gradient of a probability target is asked for; every other call is torch's own.

What is deliberately not as in torch, in the calls that a kernel runs:

* A class without mass in the target (0, or -inf with log_target) contributes 0 even where the input
  is -inf, which torch makes NaN: 0 * inf.
* Sums are float32 and rounded once to the result's dtype: torch rounds every element in float16 and
  bfloat16, and its float16 sum may overflow before it is divided.
* There is no second derivative, and an error says so; torch's own is kl_div under
  `kdkernels.use_backend("reference")`.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch.overrides import has_torch_function_variadic

from kdkernels import backends
from kdkernels.ops.row_divergence.kinds import Inputs, Kind
from kdkernels.ops.row_divergence.op import row_divergence

__all__ = ["KLDivLoss", "kl_div"]

FUSED_REDUCTIONS = ("batchmean", "mean", "sum")
SHORT, ROW = 64, 4096  # rows shorter than this are joined; elements of a joined row


def kl_div(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> torch.Tensor:
    """torch.nn.functional.kl_div, in one pass where a kernel covers the call.

    Args:
        input: log-probabilities, of any shape.
        target: probabilities, or log-probabilities with `log_target`; a shape that broadcasts with input's.
        size_average, reduce: deprecated in torch; they override `reduction`.
        reduction: "mean" (over all elements), "batchmean" (over input.size(0)), "sum" or "none".
        log_target: whether target holds log-probabilities.

    Returns:
        A scalar of the two dtypes' common dtype, or with "none" one value an element.
    """
    if (size_average, reduce) != (None, None) or not _covered(input, target, reduction, log_target):
        return F.kl_div(input, target, size_average, reduce, reduction, log_target)
    if reduction == "mean":
        # The beginning is torch's, so that filters written for it hold here too.
        warnings.warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size. "
            "'batchmean' divides by the batch size alone, as the Kullback-Leibler divergence is defined.",
            stacklevel=2,
        )
    student, teacher, dim = _rows(input, target)
    loss = row_divergence(
        "torch.nn.functional.kl_div",
        Kind.FORWARD_KL,
        student,
        teacher,
        scale_by_t2=False,
        dim=dim,
        reduction="sum",
        num_items={"mean": input.numel(), "batchmean": input.size(0)}.get(reduction),
        inputs=Inputs.LOG_PROBS if log_target else Inputs.LOG_PROBS_AND_PROBS,
    )
    if torch.is_autocast_enabled(input.device.type):
        return loss  # float32: kl_div is on autocast's list of what runs in it
    return loss.to(torch.promote_types(input.dtype, target.dtype))


def _covered(input: torch.Tensor, target: torch.Tensor, reduction: str, log_target: bool) -> bool:
    """Whether a kernel computes what torch does with these arguments."""
    if reduction not in FUSED_REDUCTIONS or has_torch_function_variadic(input, target):
        return False
    if not isinstance(input, torch.Tensor) or not isinstance(target, torch.Tensor):
        return False
    if input.dtype not in backends.FUSED_DTYPES or target.dtype not in backends.FUSED_DTYPES:
        return False
    if input.shape != target.shape or input.dim() == 0 or input.numel() == 0 or input.device != target.device:
        return False
    if target.requires_grad and torch.is_grad_enabled() and not log_target:
        return False
    if not torch.compiler.is_compiling() and backends.transformed():
        return False
    return backends.resolve("torch.nn.functional.kl_div", (input, target)) != "reference"


def _rows(input: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The tensors and the axis to call classes. The sum is over all elements, so any cut into rows will do."""
    if input.is_contiguous() and target.is_contiguous():
        rows = input.numel() // input.size(-1)
        if input.size(-1) < SHORT or (rows == 1 and input.numel() > ROW):
            cut = math.gcd(input.numel(), ROW)
            if cut > input.size(-1) or rows == 1:
                return input.view(-1, cut), target.view(-1, cut), 1
    # The densest axis, the last one if there is a choice.
    strides = [stride if size > 1 else input.numel() for size, stride in zip(input.shape, input.stride(), strict=True)]
    return input, target, max(d for d, stride in enumerate(strides) if stride == min(strides))


class KLDivLoss(torch.nn.KLDivLoss):
    """torch.nn.KLDivLoss(size_average=None, reduce=None, reduction="mean", log_target=False), by `kl_div` above."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return kl_div(input, target, reduction=self.reduction, log_target=self.log_target)
