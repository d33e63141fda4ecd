"""Divergences between the class scores of a student and a teacher, beyond the forward KL.

All share `kl_div`'s canonical signature: shapes, dtypes, reductions, masks, errors and results are
those of its docstring, and only what a divergence adds is described at its own function. They also
serve as the soft term of `distillation_loss(..., divergence=...)`.
"""

from __future__ import annotations

import torch

from kdkernels import checks
from kdkernels.losses.module import LossModule
from kdkernels.ops.row_divergence.kinds import Kind
from kdkernels.ops.row_divergence.op import row_divergence
from kdkernels.ops.scalars import Number


def reverse_kl_div(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = True,
    dim: int = -1,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    from_log_probs: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """T^2 KL(p_s, p_t): mode-seeking, as MiniLLM (Gu et al. 2024, arXiv:2306.08543) distils.

    The arguments, the result and the errors are kl_div's. Where the student has mass on a class whose teacher logit
    is -inf it is +inf.
    """
    checks.flag("from_log_probs", from_log_probs)
    return row_divergence(
        "reverse_kl_div", Kind.REVERSE_KL, student_logits, teacher_logits, temperature=temperature,
        teacher_temperature=teacher_temperature, scale_by_t2=scale_by_t2, dim=dim, reduction=reduction, weight=weight,
        labels=labels, ignore_index=ignore_index, num_items=num_items, inputs=int(from_log_probs), backend=backend,
    )  # fmt: skip


def symmetric_kl_div(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    ratio: Number = 0.5,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = True,
    dim: int = -1,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    from_log_probs: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """T^2 (ratio KL(p_t, p_s) + (1 - ratio) KL(p_s, p_t)); at ratio 0.5 half of the divergence of Jeffreys (1946).

    Args:
        ratio: the forward KL's weight, between 0 and 1, a number or a tensor with one element; at 0 and 1 the other
            side is left out altogether, infinities included.

    The other arguments, the result and the errors are kl_div's.

    Against others: torchtune's ratio weighs the forward KL too, DistiLLM's the reverse one (pass 1 - ratio).
    """
    checks.number("ratio", ratio, low=0, high=1, like=student_logits)
    checks.flag("from_log_probs", from_log_probs)
    return row_divergence(
        "symmetric_kl_div", Kind.SYMMETRIC_KL, student_logits, teacher_logits, p0=ratio, temperature=temperature,
        teacher_temperature=teacher_temperature, scale_by_t2=scale_by_t2, dim=dim, reduction=reduction, weight=weight,
        labels=labels, ignore_index=ignore_index, num_items=num_items, inputs=int(from_log_probs), backend=backend,
    )  # fmt: skip


def js_div(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = True,
    dim: int = -1,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    from_log_probs: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """T^2 times the Jensen-Shannon divergence: 0.5 KL(p_t, m) + 0.5 KL(p_s, m), m = (p_t + p_s) / 2 (Lin 1991).

    At T = 1 a row's value lies between 0 and ln 2. The arguments, the result and the errors are kl_div's.
    """
    checks.flag("from_log_probs", from_log_probs)
    return row_divergence(
        "js_div", Kind.JSD, student_logits, teacher_logits, p0=0.5, temperature=temperature,
        teacher_temperature=teacher_temperature, scale_by_t2=scale_by_t2, dim=dim, reduction=reduction, weight=weight,
        labels=labels, ignore_index=ignore_index, num_items=num_items, inputs=int(from_log_probs), backend=backend,
    )  # fmt: skip


def generalized_js_div(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    beta: Number = 0.5,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = True,
    dim: int = -1,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    from_log_probs: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """T^2 (beta KL(p_t, m) + (1 - beta) KL(p_s, m)), m = beta p_t + (1 - beta) p_s.

    The generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2024, arXiv:2306.13649).

    Args:
        beta: the teacher's share of the mixture, between 0 and 1, a number or a tensor with one element. By GKD's
            convention beta = 0 is KL(p_t, p_s) and beta = 1 is KL(p_s, p_t), though the formula above tends to 0 there.

    The other arguments, the result and the errors are kl_div's.

    Against others: TRL's, Liger's and ms-swift's beta is this one, without T^2 (`scale_by_t2=False`); DistiLLM's lambda is
    the student's share (pass 1 - lambda).
    """
    checks.number("beta", beta, low=0, high=1, like=student_logits)
    checks.flag("from_log_probs", from_log_probs)
    return row_divergence(
        "generalized_js_div", Kind.JSD, student_logits, teacher_logits, p0=beta, temperature=temperature,
        teacher_temperature=teacher_temperature, scale_by_t2=scale_by_t2, dim=dim, reduction=reduction, weight=weight,
        labels=labels, ignore_index=ignore_index, num_items=num_items, inputs=int(from_log_probs), backend=backend,
    )  # fmt: skip


def skew_kl_div(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    skew: Number = 0.1,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = True,
    dim: int = -1,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    from_log_probs: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """T^2 KL(p_t, skew p_t + (1 - skew) p_s): the skewed forward KL of DistiLLM (Ko et al. 2024, arXiv:2402.03898).

    Args:
        skew: the teacher's share of the mixture, between 0 and 1, a number or a tensor with one element; 0 is kl_div.

    The other arguments, the result and the errors are kl_div's.

    Against others: DistiLLM's published code leaves the teacher's entropy out, which changes the value and not the
    student's gradient.
    """
    checks.number("skew", skew, low=0, high=1, like=student_logits)
    checks.flag("from_log_probs", from_log_probs)
    return row_divergence(
        "skew_kl_div", Kind.SKEW_KL, student_logits, teacher_logits, p0=skew, temperature=temperature,
        teacher_temperature=teacher_temperature, scale_by_t2=scale_by_t2, dim=dim, reduction=reduction, weight=weight,
        labels=labels, ignore_index=ignore_index, num_items=num_items, inputs=int(from_log_probs), backend=backend,
    )  # fmt: skip


def skew_reverse_kl_div(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    skew: Number = 0.1,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = True,
    dim: int = -1,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    from_log_probs: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """T^2 KL(p_s, (1 - skew) p_t + skew p_s): the skewed reverse KL of DistiLLM (Ko et al. 2024, arXiv:2402.03898).

    Args:
        skew: the student's share of the mixture, between 0 and 1, a number or a tensor with one element; 0 is
            reverse_kl_div.

    The other arguments, the result and the errors are kl_div's.
    """
    checks.number("skew", skew, low=0, high=1, like=student_logits)
    checks.flag("from_log_probs", from_log_probs)
    return row_divergence(
        "skew_reverse_kl_div", Kind.SKEW_REVERSE_KL, student_logits, teacher_logits, p0=skew, temperature=temperature,
        teacher_temperature=teacher_temperature, scale_by_t2=scale_by_t2, dim=dim, reduction=reduction, weight=weight,
        labels=labels, ignore_index=ignore_index, num_items=num_items, inputs=int(from_log_probs), backend=backend,
    )  # fmt: skip


def total_variation(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = True,
    dim: int = -1,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    from_log_probs: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """T^2 0.5 sum |p_s - p_t|, as f-distill (Wen et al. 2023, arXiv:2307.15190) uses it.

    The derivative where both probabilities are equal is taken as 0. The arguments, the result and the errors are
    kl_div's.

    Against others: Liger's takes probabilities, and has a derivative of -0.5 at ties.
    """
    checks.flag("from_log_probs", from_log_probs)
    return row_divergence(
        "total_variation", Kind.TOTAL_VARIATION, student_logits, teacher_logits, temperature=temperature,
        teacher_temperature=teacher_temperature, scale_by_t2=scale_by_t2, dim=dim, reduction=reduction, weight=weight,
        labels=labels, ignore_index=ignore_index, num_items=num_items, inputs=int(from_log_probs), backend=backend,
    )  # fmt: skip


def alpha_beta_div(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    alpha: Number = 0.5,
    beta: Number = 0.5,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = True,
    dim: int = -1,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    from_log_probs: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """T^2 times the alpha-beta divergence of ABKD (Wang et al. 2025, arXiv:2505.04560; Cichocki, Cruces and Amari 2011).

    -1/(alpha beta) sum [p_t^alpha p_s^beta - alpha/(alpha+beta) p_t^(alpha+beta) - beta/(alpha+beta) p_s^(alpha+beta)],
    and its limits where alpha, beta or their sum is 0, evaluated so that values near a limit lose nothing.

    Args:
        alpha, beta: any finite numbers, or tensors with one element. (1, 0) is the forward KL, (0, 1) the reverse one.

    The other arguments, the result and the errors are kl_div's. Where one model has no mass on a class of the other it is
    +inf unless alpha and beta are both positive (or the limit is finite).
    """
    checks.number("alpha", alpha, like=student_logits)
    checks.number("beta", beta, like=student_logits)
    checks.flag("from_log_probs", from_log_probs)
    return row_divergence(
        "alpha_beta_div", Kind.ALPHA_BETA, student_logits, teacher_logits, p0=alpha, p1=beta, temperature=temperature,
        teacher_temperature=teacher_temperature, scale_by_t2=scale_by_t2, dim=dim, reduction=reduction, weight=weight,
        labels=labels, ignore_index=ignore_index, num_items=num_items, inputs=int(from_log_probs), backend=backend,
    )  # fmt: skip


def soft_cross_entropy(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = True,
    dim: int = -1,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    from_log_probs: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """T^2 times the cross-entropy of the student with the teacher's soft targets, -sum p_t log p_s.

    The soft term as Hinton, Vinyals and Dean (2015, arXiv:1503.02531) write it. It is kl_div plus the teacher's entropy: the
    same gradient to the student. The arguments, the result and the
    errors are kl_div's.

    Against others: torchtune calls this ForwardKL.
    """
    checks.flag("from_log_probs", from_log_probs)
    return row_divergence(
        "soft_cross_entropy", Kind.SOFT_CROSS_ENTROPY, student_logits, teacher_logits, temperature=temperature,
        teacher_temperature=teacher_temperature, scale_by_t2=scale_by_t2, dim=dim, reduction=reduction, weight=weight,
        labels=labels, ignore_index=ignore_index, num_items=num_items, inputs=int(from_log_probs), backend=backend,
    )  # fmt: skip


class ReverseKLDivLoss(LossModule):
    """`reverse_kl_div` as a module: its keyword arguments are the options."""

    function = staticmethod(reverse_kl_div)


class SymmetricKLDivLoss(LossModule):
    """`symmetric_kl_div` as a module: its keyword arguments are the options."""

    function = staticmethod(symmetric_kl_div)


class JSDivLoss(LossModule):
    """`js_div` as a module: its keyword arguments are the options."""

    function = staticmethod(js_div)


class GeneralizedJSDivLoss(LossModule):
    """`generalized_js_div` as a module: its keyword arguments are the options."""

    function = staticmethod(generalized_js_div)


class SkewKLDivLoss(LossModule):
    """`skew_kl_div` as a module: its keyword arguments are the options."""

    function = staticmethod(skew_kl_div)


class SkewReverseKLDivLoss(LossModule):
    """`skew_reverse_kl_div` as a module: its keyword arguments are the options."""

    function = staticmethod(skew_reverse_kl_div)


class TotalVariationLoss(LossModule):
    """`total_variation` as a module: its keyword arguments are the options."""

    function = staticmethod(total_variation)


class AlphaBetaDivLoss(LossModule):
    """`alpha_beta_div` as a module: its keyword arguments are the options."""

    function = staticmethod(alpha_beta_div)


class SoftCrossEntropyLoss(LossModule):
    """`soft_cross_entropy` as a module: its keyword arguments are the options."""

    function = staticmethod(soft_cross_entropy)
