"""Losses between embeddings and between the scores of right and wrong answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kdkernels import backends, checks
from kdkernels.losses.features import EPS, SUPPORTED, as_wide, checked, inverse_norms, normalized
from kdkernels.losses.module import LossModule
from kdkernels.ops.plans import remembered
from kdkernels.ops.weighted_match import margin as margins
from kdkernels.ops.weighted_match import op, sums
from kdkernels.ops.weighted_match.maps import of_channels

REDUCTIONS = ("mean", "sum", "none")


def _reduce(x: torch.Tensor, reduction: str) -> torch.Tensor:
    if reduction == "none":
        return x
    total = sums.ordered_sum(x)
    return total if reduction == "sum" else total / max(x.numel(), 1)


def cosine_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    dim: int = -1,
    eps: float = EPS,
    reduction: str = "mean",
    backend: str = "auto",
) -> torch.Tensor:
    """1 - cos(student, teacher) of every pair of vectors.

    The sums of products are float64, so that the loss of two vectors that nearly agree keeps its digits.

    Args:
        student: vectors, float16, bfloat16, float32 or float64, (N, D), (B, T, D), or maps with the channel axis `dim`.
        teacher: the same shape on the same device; the dtype may differ. Gets a gradient if it requires one.
        dim: the vectors' axis, not the first.
        eps: the least norm.
        reduction: "mean" over the vectors, "sum", or "none" for one value each (the shape without `dim`).
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar or tensor (float64 for float64 inputs). A zero vector has loss 1 and gets no gradient.

    Raises:
        ValueError: shapes or devices that differ, an unknown reduction.
        TypeError: vectors that are not floating point.
        BackendError: the backend asked for cannot run here.
    """
    dim, rows, backend = _cosine_plan((student, teacher), dim, eps, reduction, backend)
    if backend == "reference":
        x, y = (normalized(of_channels(v, dim), eps) for v in as_wide(student, teacher))
        return _reduce(1 - (x * y).sum(1).reshape(rows), reduction)
    found = sums.moments(student, teacher, channels=False, dim=dim, backend=backend)
    of_student, of_teacher = inverse_norms(found[2:4], eps).unbind()
    return _reduce(1 - (found[4] * of_student * of_teacher).reshape(rows), reduction).float()


@remembered
def _cosine_plan(
    tensors: tuple[torch.Tensor, torch.Tensor], dim: int, eps: float, reduction: str, backend: str
) -> tuple[int, tuple[int, ...], str]:
    """cosine_loss's axis, the shape without it and the backend, once its arguments are found to be right."""
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.plain_number("eps", eps, low=0)
    dim = checked(*tensors, dim, suffix="")
    shape = tensors[0].shape
    return dim, (*shape[:dim], *shape[dim + 1 :]), backends.resolve("cosine_loss", tensors, backend, SUPPORTED)


def margin_ranking_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    margin: float = 1.0,
    wrong: str = "all",
    reduction: str = "mean",
    ignore_index: int = -100,
    backend: str = "auto",
) -> torch.Tensor:
    """max(0, margin + s_wrong - s_correct): the mean over the wrong classes, or that of the hardest one.

    One read of the scores, and one more in the backward, which writes the gradient.

    Args:
        logits: scores, float16, bfloat16, float32 or float64, (..., V).
        labels: the correct classes, (...).
        margin: a number.
        wrong: "all" V - 1 wrong classes, or only the "hardest", the one that scores highest.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for one value a row.
        ignore_index: the label that leaves a row out.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs) or tensor, 0 for V = 1, and where all rows are left out.

    Raises:
        ValueError: labels of another shape, an unknown `wrong` or reduction.
        TypeError: logits that are not floating point, labels that are not integers.
        IndexError: a label outside 0..V-1 on a CPU.

    Against others: torch's multi_margin_loss divides by V, not by V - 1.
    """
    checks.choice("wrong", wrong, ("all", "hardest"))
    checks.choice("reduction", reduction, REDUCTIONS)
    if isinstance(margin, torch.Tensor):
        raise TypeError("margin must be a number, got a tensor")
    checks.plain_number("margin", margin)
    checks.scores("logits", logits, "logits", logits, -1)
    classes = logits.shape[-1]
    given = checks.labels_of(labels, tuple(logits.shape[:-1]), classes, ignore_index, logits.device)
    if given is None:
        raise TypeError("labels must be a tensor: the label's score is what the others are compared with")
    kept = given != ignore_index
    backend = backends.resolve("margin_ranking_loss", (logits,), backend, SUPPORTED)
    if backend != "reference":
        flat = logits.reshape(-1, classes)
        rows = margins.margin_rows(
            flat, given.reshape(-1), margin, hardest=wrong == "hardest", ignore_index=ignore_index, backend=backend
        ).view(given.shape)
    else:
        rows = _margin_rows(logits, given, kept, margin, wrong)
    if reduction == "mean":
        return sums.ordered_sum(rows) / kept.sum().clamp_min(1)
    return _reduce(rows, reduction)


def _margin_rows(
    logits: torch.Tensor, labels: torch.Tensor, kept: torch.Tensor, margin: float, wrong: str
) -> torch.Tensor:
    right = labels.where(kept, 0).unsqueeze(-1)
    (x,) = as_wide(logits)
    x = x.masked_fill(~kept.unsqueeze(-1), 0.0)  # whatever an ignored row holds
    over = (x - x.gather(-1, right) + margin).scatter(-1, right, -torch.inf)
    if x.shape[-1] == 1:
        rows = x.sum(-1) * 0.0
    elif wrong == "hardest":
        rows = over.amax(-1).clamp_min(0)
    else:
        rows = over.clamp_min(0).sum(-1) / (x.shape[-1] - 1)
    return rows.where(kept, 0.0)


def margin_mse_loss(
    student_positive: torch.Tensor,
    student_negative: torch.Tensor,
    teacher_positive: torch.Tensor,
    teacher_negative: torch.Tensor,
    *,
    reduction: str = "mean",
    backend: str = "auto",
) -> torch.Tensor:
    """MarginMSE of retrieval: the squared difference between both models' margins of a right over a wrong passage.

    ((s+ - s-) - (t+ - t-))^2: Hofstätter et al. (2020, arXiv:2010.02666).

    Args:
        student_positive, student_negative: scores of the relevant and of another passage, (...), float16, bfloat16,
            float32 or float64; the negative ones may have a further axis, (..., K) with positive (..., 1).
        teacher_positive, teacher_negative: the teacher's, of shapes that broadcast with them.
        reduction: "mean", "sum" or "none".
        backend: "auto", "triton", "cpu" or "reference". On a CPU few scores, and anywhere one value a pair or other shapes
            than (..., K) with (..., 1), are composed of torch operations: there is nothing to gain.

    Returns:
        A float32 scalar or tensor (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not go together, an unknown reduction.
        TypeError: scores that are not floating point.
        BackendError: the backend asked for cannot run here.
    """
    scores = student_positive, student_negative, teacher_positive, teacher_negative
    backend, rows = _margin_plan(scores, reduction, backend)
    if rows is not None:
        # Both margins' difference is that of the wrong scores, plus one number a query.
        factor = 1.0 / student_negative.numel() if reduction == "mean" else 1.0
        s_right, t_right = as_wide(student_positive, teacher_positive)
        apart = (s_right - t_right).reshape(1, rows)
        s_wrong, t_wrong = student_negative.reshape(1, rows, -1), teacher_negative.reshape(1, rows, -1)
        return op.match(t_wrong, s_wrong, channel_offset=apart, factor=factor, backend=backend)
    s_right, s_wrong, t_right, t_wrong = as_wide(*scores)
    of_student, of_teacher = s_right - s_wrong, t_right - t_wrong
    if of_student.shape != of_teacher.shape:
        of_student, of_teacher = torch.broadcast_tensors(of_student, of_teacher)
    if reduction == "none" or 0 < of_student.numel() < 2 * sums.AT_ONCE:
        return F.mse_loss(of_student, of_teacher, reduction=reduction)
    each = F.mse_loss(of_student, of_teacher, reduction="none")
    # No row is shared among threads, whose number would show in the sum.
    total = sums.ordered_sum(each.sum(-1) if each.dim() > 1 else each)
    return total if reduction == "sum" else total / max(each.numel(), 1)


FEW_SCORES = 2**17  # up to which torch operations take less on a CPU than a call of our own with its gradient


@remembered
def _margin_plan(scores: tuple[torch.Tensor, ...], reduction: str, backend: str) -> tuple[str, int | None]:
    """The backend, and how many queries there are where a kernel can take them as the rows of a map."""
    checks.choice("reduction", reduction, REDUCTIONS)
    names = "student_positive", "student_negative", "teacher_positive", "teacher_negative"
    named = dict(zip(names, scores, strict=True))
    for name, x in named.items():
        checks.float_tensor(name, x)
    s_right, s_wrong, t_right, t_wrong = (x.shape for x in scores)
    try:
        torch.broadcast_shapes(s_right, s_wrong, t_right, t_wrong)
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
        raise ValueError(f"scores must go together, got {shapes}") from None
    checks.same_device(**named)
    backend = backends.resolve("margin_mse_loss", scores, backend, SUPPORTED)
    alike = s_right == t_right and s_wrong == t_wrong and s_wrong.numel() > 0 and len(s_right) == len(s_wrong) > 0
    few = backend == "cpu" and s_wrong.numel() < FEW_SCORES
    if backend == "reference" or reduction == "none" or few or not alike or s_right != (*s_wrong[:-1], 1):
        return backend, None
    return backend, s_right.numel()


class CosineLoss(LossModule):
    """`cosine_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(cosine_loss)


class MarginRankingLoss(LossModule):
    """`margin_ranking_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(margin_ranking_loss)


class MarginMSELoss(LossModule):
    """`margin_mse_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(margin_mse_loss)
