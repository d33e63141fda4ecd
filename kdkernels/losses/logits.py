"""Losses between the class scores of a student and a teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from kdkernels import checks
from kdkernels.losses.module import LossModule
from kdkernels.ops.row_divergence.kinds import Kind
from kdkernels.ops.row_divergence.op import row_divergence
from kdkernels.ops.scalars import Number

# The soft terms that distillation_loss can take: kind, and the names and defaults of its parameters.
DIVERGENCES: dict[str, tuple[Kind, dict[str, float]]] = {
    "forward_kl": (Kind.FORWARD_KL, {}),
    "reverse_kl": (Kind.REVERSE_KL, {}),
    "symmetric_kl": (Kind.SYMMETRIC_KL, {"ratio": 0.5}),
    "js": (Kind.JSD, {"beta": 0.5}),
    "skew_kl": (Kind.SKEW_KL, {"skew": 0.1}),
    "skew_reverse_kl": (Kind.SKEW_REVERSE_KL, {"skew": 0.1}),
    "total_variation": (Kind.TOTAL_VARIATION, {}),
    "alpha_beta": (Kind.ALPHA_BETA, {"alpha": 0.5, "beta": 0.5}),
    "soft_cross_entropy": (Kind.SOFT_CROSS_ENTROPY, {}),
    "decoupled_kl": (Kind.DECOUPLED_KL, {"alpha": 1.0, "beta": 8.0}),
}


def soft_term(divergence: str, options: Mapping[str, Number] | None, like: torch.Tensor) -> tuple[Kind, list[Number]]:
    """The kind of a divergence and its parameters, checked."""
    checks.choice("divergence", divergence, tuple(DIVERGENCES))
    kind, defaults = DIVERGENCES[divergence]
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"divergence_options must be a dictionary, got {type(options).__name__}")
    for name, value in (options or {}).items():
        if name not in defaults:
            raise ValueError(
                f"divergence_options: {divergence!r} has no option {name!r}; it has {sorted(defaults) or 'none'}"
            )
        bounded = kind not in (Kind.ALPHA_BETA, Kind.DECOUPLED_KL)
        low, high = (0, 1) if bounded else (-math.inf, math.inf)
        checks.number(f"divergence_options[{name!r}]", value, low=low, high=high, like=like)
    values: list[Number] = list({**defaults, **(options or {})}.values())
    return kind, (values + [0.0, 0.0])[:2]


def kl_div(
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
    """Forward KL divergence of the student from the teacher, at a temperature.

    T^2 KL(p_t, p_s) with p = softmax(logits / T): knowledge distillation as Hinton, Vinyals and Dean
    (2015, arXiv:1503.02531) define it.

    Args:
        student_logits: scores, float16, bfloat16, float32 or float64, (..., V) or with the class axis at `dim`.
        teacher_logits: the same shape on the same device; the dtype may differ. Gets a gradient if it requires one.
        temperature: T > 0, a number or a tensor with one element; if that requires grad it gets a gradient.
        teacher_temperature: the teacher's own T; default: the student's.
        scale_by_t2: multiply by the square of the student's temperature.
        dim: the class axis.
        reduction: "rowmean" divides by the sum of row weights, "batchmean" by student_logits.size(0), "mean" by
            the number of elements (these two as torch's kl_div), "sum" by nothing; "none" gives one value a row.
        weight: a weight (or boolean mask) for every row: the shape of the logits without the class axis.
        labels: integers of that shape; a row where they equal `ignore_index` is left out.
        ignore_index: the label that leaves a row out.
        num_items: divides the sum instead of what `reduction` says: the number of items in the whole batch
            where this call sees a micro-batch of it.
        from_log_probs: both inputs are log-probabilities, already at their temperature; T enters only as T^2.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs), or one value a row. If all rows are left out: 0, with zero
        gradients. A class where the teacher has mass and the student's logit is -inf makes it +inf.

    Raises:
        ValueError: shapes, class counts or devices that differ, a temperature that is not positive, an unknown
            reduction.
        TypeError: integer logits, labels that are not integers.
        IndexError: a label outside 0..V-1 (on a GPU: NaN in that row, unless KDKERNELS_DEBUG=1).
        BackendError: the backend asked for cannot run here.

    Against others: Hugging Face examples, torchdistill's and mdistiller's KD are `reduction="batchmean"`; ModelOpt's
    default is `reduction="mean"`.
    """
    checks.flag("from_log_probs", from_log_probs)
    return row_divergence(
        "kl_div", Kind.FORWARD_KL, student_logits, teacher_logits, temperature=temperature,
        teacher_temperature=teacher_temperature, scale_by_t2=scale_by_t2, dim=dim, reduction=reduction, weight=weight,
        labels=labels, ignore_index=ignore_index, num_items=num_items, inputs=int(from_log_probs), backend=backend,
    )  # fmt: skip


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: Number = 4.0,
    alpha: Number = 0.9,
    *,
    divergence: str = "forward_kl",
    divergence_options: Mapping[str, Number] | None = None,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = True,
    label_smoothing: float = 0.0,
    class_weight: torch.Tensor | None = None,
    dim: int = -1,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Cross-entropy with the labels and distillation from the teacher, in one pass over the logits.

    (1 - alpha) CE(z_s, y) + alpha T^2 KL(p_t, p_s): the loss of Hinton, Vinyals and Dean (2015,
    arXiv:1503.02531). The cross-entropy is at temperature 1.

    Args:
        student_logits: scores, float16, bfloat16, float32 or float64, (..., V) or with the class axis at `dim`.
        teacher_logits: the same shape on the same device; the dtype may differ.
        labels: class indices, the shape of the logits without the class axis.
        temperature: T > 0 of the distillation term, a number or a tensor with one element; may require grad.
        alpha: the weight of the distillation term, between 0 and 1, a number or a tensor with one element.
        divergence: the distillation term: "forward_kl", or "reverse_kl", "symmetric_kl", "js", "skew_kl",
            "skew_reverse_kl", "total_variation", "alpha_beta", "soft_cross_entropy", "decoupled_kl".
        divergence_options: its parameters by name, e.g. {"beta": 0.1} for "js"; see the function of that divergence.
        teacher_temperature: the teacher's own T; default: the student's.
        scale_by_t2: multiply the distillation term by the square of the student's temperature.
        label_smoothing: as in torch's cross_entropy, between 0 and 1.
        class_weight: a weight for every class in the cross-entropy, (V,).
        dim: the class axis.
        reduction: "rowmean" averages each term over its own weights: the distillation over the row weights, the
            cross-entropy over row weight times class weight of the label, as torch does. "mean" is that for the
            cross-entropy and the mean over all elements for the distillation; "batchmean" divides both by
            student_logits.size(0), "sum" by nothing; "none" gives one value a row.
        weight: a weight (or boolean mask) for every row, for both terms.
        ignore_index: rows with this label are left out of both terms.
        num_items: divides both sums instead of what `reduction` says.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs), or one value a row.

    Raises:
        ValueError, TypeError, IndexError, BackendError: as kl_div; ValueError also for alpha or
            label_smoothing outside 0 to 1.

    Against others: torchdistill's alpha weighs the cross-entropy (pass 1 - alpha).
    """
    kind, (p0, p1) = soft_term(divergence, divergence_options, student_logits)
    checks.number("alpha", alpha, low=0, high=1, like=student_logits)
    checks.plain_number("label_smoothing", label_smoothing, low=0, high=1)
    if labels is None:
        raise TypeError("labels must be a tensor; without labels use kl_div")
    return row_divergence(
        "distillation_loss", kind, student_logits, teacher_logits, temperature=temperature,
        teacher_temperature=teacher_temperature, scale_by_t2=scale_by_t2, dim=dim, reduction=reduction, weight=weight,
        labels=labels, ignore_index=ignore_index, num_items=num_items, class_weight=class_weight,
        label_smoothing=label_smoothing, kd_weight=alpha, ce_weight=1 - alpha, p0=p0, p1=p1,
        backend=backend,
    )  # fmt: skip


class KLDivLoss(LossModule):
    """`kl_div` as a module: KLDivLoss(temperature=4.0)(student_logits, teacher_logits)."""

    function = staticmethod(kl_div)


class DistillationLoss(LossModule):
    """`distillation_loss` as a module: DistillationLoss(temperature=4.0, alpha=0.9)(student_logits, teacher_logits, labels)."""

    function = staticmethod(distillation_loss)
