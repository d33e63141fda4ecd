"""Divergences over something other than a plain row of logits: label against rest, channels, pixels, heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kdkernels import checks
from kdkernels.losses.module import LossModule
from kdkernels.ops.row_divergence.kinds import Kind
from kdkernels.ops.row_divergence.op import row_divergence
from kdkernels.ops.scalars import Number, factor


def decoupled_kd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: Number = 4.0,
    alpha: Number = 1.0,
    beta: Number = 8.0,
    *,
    epoch: float | None = None,
    warmup_epochs: float = 20.0,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = True,
    dim: int = -1,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Decoupled knowledge distillation (DKD): alpha TCKD + beta NCKD, times T^2.

    Zhao et al. (2022, arXiv:2203.08679): TCKD is the KL of the label's probability against the rest, NCKD the KL
    among the other classes. Both are taken from log-sum-exps that leave the label out, never from 1 - p, so that a
    confident teacher loses nothing, and a problem of two classes is finite (its NCKD is 0).

    Args:
        student_logits: scores, float16, bfloat16, float32 or float64, (..., V) or with the class axis at `dim`.
        teacher_logits: the same shape on the same device; the dtype may differ.
        labels: class indices, the shape of the logits without the class axis.
        temperature: T > 0, a number or a tensor with one element; may require grad.
        alpha, beta: weights of TCKD and NCKD, numbers or tensors with one element.
        epoch: if given, the loss is multiplied by min(epoch / warmup_epochs, 1), as the authors warm it up.
        warmup_epochs: see epoch.

    The other arguments, the result and the errors are distillation_loss's. The cross-entropy with the labels is not in
    it: `distillation_loss(..., divergence="decoupled_kl")` has both in one pass.
    """
    checks.number("alpha", alpha, like=student_logits)
    checks.number("beta", beta, like=student_logits)
    checks.plain_number("warmup_epochs", warmup_epochs, low=0, open_low=True)
    checks.plain_number("epoch", epoch, low=0, optional=True)
    if labels is None:
        raise TypeError("labels must be a tensor: the label's class is what is decoupled")
    return row_divergence(
        "decoupled_kd_loss", Kind.DECOUPLED_KL, student_logits, teacher_logits, p0=alpha, p1=beta,
        kd_weight=1.0 if epoch is None else min(epoch / warmup_epochs, 1.0), temperature=temperature,
        teacher_temperature=teacher_temperature, scale_by_t2=scale_by_t2, dim=dim, reduction=reduction, weight=weight,
        labels=labels, ignore_index=ignore_index, num_items=num_items, backend=backend,
    )  # fmt: skip


def channel_wise_div(
    student_features: torch.Tensor,
    teacher_features: torch.Tensor,
    *,
    temperature: Number = 4.0,
    scale_by_t2: bool = True,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    num_items: Number | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Channel-wise distillation (CWD): T^2 KL between softmaxes over the positions of every channel, over N C.

    Shu et al. (2021, arXiv:2011.13256). Works on log-probabilities throughout: maps whose softmax underflows stay
    finite, unlike with softmax().log().

    Args:
        student_features: maps, float16, bfloat16, float32 or float64, (N, C, ...) with at least one spatial axis.
        teacher_features: the same shape and device; the dtype may differ. (Put a 1x1 convolution before it where C differs.)
        temperature: T > 0, a number or a tensor with one element; may require grad.
        scale_by_t2: multiply by T^2.
        reduction: "rowmean" divides by N C (the paper), "batchmean" by N, "mean" by the number of elements, "sum" by
            nothing; "none" gives (N, C).
        weight: a weight for every channel of every image, (N, C).
        num_items: divides the sum instead.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs), or (N, C) of them.

    Raises:
        ValueError, TypeError, BackendError: as kl_div; ValueError also for features without a spatial axis.
    """
    checks.float_tensor("student_features", student_features)
    checks.float_tensor("teacher_features", teacher_features)
    if student_features.shape != teacher_features.shape:
        raise ValueError(
            f"student_features has shape {tuple(student_features.shape)} and teacher_features "
            f"{tuple(teacher_features.shape)}: they must be the same (add a 1x1 convolution where channels differ)"
        )
    if student_features.dim() < 3:
        raise ValueError(f"features must be (N, C, ...) with a spatial axis, got shape {tuple(student_features.shape)}")
    return row_divergence(
        "channel_wise_div", Kind.FORWARD_KL, student_features.flatten(2), teacher_features.flatten(2), what="features",
        temperature=temperature, scale_by_t2=scale_by_t2, reduction=reduction, weight=weight, num_items=num_items,
        backend=backend,
    )  # fmt: skip


def pixel_wise_div(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    form: str = "kl",
    temperature: Number = 1.0,
    scale_by_t2: bool = True,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Pixel-wise distillation of a segmentation: T^2 KL over the classes of every pixel, without a permuted copy.

    Args:
        student_logits: scores, float16, bfloat16, float32 or float64, (N, V, ...): the class axis is 1.
        teacher_logits: the same shape on the same device; the dtype may differ.
        form: "kl", or "soft_cross_entropy" (the same gradient to the student, a larger value).
        temperature: T > 0, a number or a tensor with one element; may require grad.
        scale_by_t2: multiply by T^2.
        reduction: "rowmean" divides by the number of pixels (N H W; kept pixels where some are masked), "map" by the
            pixels of one image, "batchmean" by N, "mean" by the number of elements, "sum" by nothing; "none" gives (N, ...).
        weight, labels, ignore_index: a weight, or a label, for every pixel, (N, ...); ignored pixels are left out.
        num_items: divides the sum instead.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs), or (N, ...) of them; 0 where all pixels are left out.

    Raises:
        ValueError, TypeError, IndexError, BackendError: as kl_div.

    Against others: CIRKD is form="kl"; structured distillation (Liu et al. 2019, arXiv:1903.04197) in its authors' code is
    form="soft_cross_entropy", reduction="map", temperature=1.
    """
    checks.choice("form", form, ("kl", "soft_cross_entropy"))
    checks.choice("reduction", reduction, (*checks.REDUCTIONS, "map"))
    checks.float_tensor("student_logits", student_logits)
    if student_logits.dim() < 2:
        raise ValueError(f"student_logits must be (N, V, ...), got shape {tuple(student_logits.shape)}")
    if reduction == "map":
        if num_items is None:
            num_items = max(student_logits[0, 0].numel() if student_logits.numel() else 1, 1)
        reduction = "sum"
    return row_divergence(
        "pixel_wise_div", Kind.FORWARD_KL if form == "kl" else Kind.SOFT_CROSS_ENTROPY, student_logits, teacher_logits,
        temperature=temperature, scale_by_t2=scale_by_t2, dim=1, reduction=reduction, weight=weight, labels=labels,
        ignore_index=ignore_index, num_items=num_items, backend=backend,
    )  # fmt: skip


def lwf_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: Number = 2.0,
    uniform: float = 1e-5,
    dim: int = -1,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    num_items: Number | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Learning without forgetting: -sum p_t log((p_s + u / V) / (1 + u)), p = softmax(z / T).

    Li and Hoiem (2016, arXiv:1606.09282), whose p^(1/T) renormalised is that softmax; the uniform mass u under the
    student's logarithm is what the continual-learning codebases add.

    Args:
        student_logits: the present model's scores for the old task's classes, (..., V) or with the class axis at `dim`.
        teacher_logits: the old model's, the same shape on the same device; the dtype may differ.
        temperature: T > 0, a number or a tensor with one element; may require grad.
        uniform: u, at least 0.
        dim, reduction, weight, num_items, backend: as kl_div.

    Returns:
        What kl_div returns: a float32 scalar (float64 for float64 inputs), or one value a row.

    Raises:
        ValueError, TypeError, BackendError: as kl_div.
    """
    checks.plain_number("uniform", uniform, low=0)
    checks.scores("student_logits", student_logits, "teacher_logits", teacher_logits, dim)
    classes = student_logits.shape[dim]
    return row_divergence(
        "lwf_loss", Kind.SOFT_CROSS_ENTROPY, student_logits, teacher_logits, p0=uniform, p1=uniform / max(classes, 1),
        temperature=temperature, scale_by_t2=False, dim=dim, reduction=reduction, weight=weight, num_items=num_items,
        backend=backend,
    )  # fmt: skip


def auxiliary_heads_loss(
    head_logits: torch.Tensor | Sequence[torch.Tensor],
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: Number = 3.0,
    alpha: Number = 0.1,
    beta: Number = 1e-6,
    head_features: Sequence[torch.Tensor] = (),
    teacher_feature: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Be your own teacher (BYOT): auxiliary heads learn from labels and from the deepest head, in one launch.

    Zhang et al. (2019, arXiv:1905.08094). Summed over the M heads, averaged over the rows:
    (1 - alpha) CE(head, y) + alpha T^2 (-sum p_t log p_head) + beta sum (f_head - f_t)^2 where either map is positive.
    The deepest head teaches and gets no gradient here; add its own cross-entropy to the result.

    Args:
        head_logits: scores of the auxiliary heads, float16, bfloat16, float32 or float64, (M, ..., V), or a sequence of M
            tensors (..., V), which is stacked.
        teacher_logits: the deepest head's, (..., V); read once a head, never expanded in memory.
        labels: class indices, the shape of teacher_logits without the class axis.
        temperature: T > 0, a number or a tensor with one element.
        alpha: the weight of the soft term, between 0 and 1, a number or a tensor with one element.
        beta: the weight of the feature term.
        head_features: one feature map a head, each of teacher_feature's shape; empty: no feature term.
        teacher_feature: the deepest head's feature map; gets no gradient.
        ignore_index: rows with this label are left out of both logit terms.
        num_items: divides instead of the number of rows kept.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, IndexError, BackendError: as distillation_loss; ValueError also for feature maps that differ.
    """
    if not isinstance(head_logits, torch.Tensor):
        head_logits = _stacked("head_logits", head_logits)
    checks.float_tensor("head_logits", head_logits)
    checks.float_tensor("teacher_logits", teacher_logits)
    checks.number("alpha", alpha, low=0, high=1, like=teacher_logits)
    checks.number("beta", beta, low=0, like=teacher_logits)
    if head_logits.dim() < 2 or head_logits.shape[1:] != teacher_logits.shape:
        raise ValueError(
            "head_logits must be (M, *teacher_logits.shape): they have shapes "
            f"{tuple(head_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if labels is None:
        raise TypeError("labels must be a tensor, got NoneType")
    checks.integers("labels", labels, tuple(teacher_logits.shape[:-1]), teacher_logits.device)
    checks.items(num_items, teacher_logits)
    heads = head_logits.shape[0]
    features = _features_of_heads(head_features, teacher_feature, head_logits.device)
    # The mean over M N rows, M times: summed over heads, averaged over rows.
    loss = row_divergence(
        "auxiliary_heads_loss", Kind.SOFT_CROSS_ENTROPY, head_logits, teacher_logits.detach().expand_as(head_logits),
        kd_weight=alpha * heads, ce_weight=(1 - alpha) * heads, temperature=temperature,
        labels=labels.expand(heads, *labels.shape), ignore_index=ignore_index,
        num_items=None if num_items is None else num_items * heads, backend=backend,
    )  # fmt: skip
    for feature in features:
        target = teacher_feature.detach()  # type: ignore[union-attr]
        difference = torch.where((feature > 0) | (target > 0), feature - target, 0.0)
        loss = loss + factor(beta) * difference.float().square().sum()
    return loss


def _stacked(name: str, given: Sequence[torch.Tensor]) -> torch.Tensor:
    members = checks.tensors(name, given)
    if not members:
        raise ValueError(f"{name} must have at least one member, got none")
    for i, x in enumerate(members):
        checks.float_tensor(f"{name}[{i}]", x)
        if x.shape != members[0].shape or x.device != members[0].device:
            raise ValueError(
                f"{name} must be alike: {name}[0] is {tuple(members[0].shape)} on {members[0].device}, "
                f"{name}[{i}] {tuple(x.shape)} on {x.device}"
            )
    return torch.stack(members)


def _features_of_heads(
    head_features: Sequence[torch.Tensor], teacher_feature: torch.Tensor | None, device: torch.device
) -> list[torch.Tensor]:
    """Maps of the teacher's shape."""
    features = checks.tensors("head_features", head_features)
    if teacher_feature is None:
        if features:
            raise ValueError("head_features need a teacher_feature to be compared with")
        return features
    checks.float_tensor("teacher_feature", teacher_feature)
    if teacher_feature.device != device:
        raise ValueError(f"teacher_feature must be on {device} with the scores, got {teacher_feature.device}")
    for k, feature in enumerate(features):
        checks.float_tensor(f"head_features[{k}]", feature)
        if feature.shape != teacher_feature.shape:
            raise ValueError(
                f"head_features[{k}] has shape {tuple(feature.shape)} and teacher_feature {tuple(teacher_feature.shape)}"
            )
        if feature.device != teacher_feature.device:
            raise ValueError(
                f"head_features[{k}] is on {feature.device} and teacher_feature on {teacher_feature.device}"
            )
    return features


class DecoupledKDLoss(LossModule):
    """`decoupled_kd_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(decoupled_kd_loss)


class ChannelWiseDivLoss(LossModule):
    """`channel_wise_div` as a module: its keyword arguments are the options."""

    function = staticmethod(channel_wise_div)


class PixelWiseDivLoss(LossModule):
    """`pixel_wise_div` as a module: its keyword arguments are the options."""

    function = staticmethod(pixel_wise_div)


class LwFLoss(LossModule):
    """`lwf_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(lwf_loss)


class AuxiliaryHeadsLoss(LossModule):
    """`auxiliary_heads_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(auxiliary_heads_loss)
