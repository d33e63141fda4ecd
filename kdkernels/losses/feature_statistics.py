"""Losses between feature maps through their statistics: variances, correlations, averages at several scales."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kdkernels import backends, checks
from kdkernels.losses.features import REDUCTIONS, SUPPORTED, adapted, as_wide, checked, hint_loss, share
from kdkernels.losses.module import LossModule
from kdkernels.ops.plans import remembered
from kdkernels.ops.scalars import pack
from kdkernels.ops.weighted_match import context, op, sums
from kdkernels.ops.weighted_match.maps import of_channels
from kdkernels.typed import typed


def variational_information_loss(
    student_features: torch.Tensor,
    teacher_features: torch.Tensor,
    raw_variance: torch.Tensor,
    *,
    adapter: nn.Module | None = None,
    eps: float = 1e-5,
    dim: int = 1,
    reduction: str = "mean",
    backend: str = "auto",
) -> torch.Tensor:
    """Variational information distillation (VID): the negative log-likelihood of the teacher's features.

    1/2 [(mu - t)^2 / var + log var] with mu the (adapted) student's features and var = softplus(raw) + eps for
    every channel: Ahn et al. (2019, arXiv:1904.05835).

    Args:
        student_features: float16, bfloat16, float32 or float64, (N, C, H, W), (N, C, ...) or, with dim=-1, (B, T, D).
        teacher_features: the same shape (after the adapter) on the same device; the dtype may differ.
        raw_variance: one number a channel, (C,), learned with the student; it gets a gradient.
        adapter: a module that the student's features go through first: the authors have three 1x1 convolutions.
        eps: the least variance.
        dim: the channel axis.
        reduction: "mean" over all elements, "batchmean" over samples, or "sum".
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs), 0 for an empty batch.

    Raises:
        ValueError: shapes that differ (for channels the message names the adapter), differing devices, raw_variance of
            another shape, an unknown reduction.
        TypeError: features that are not floating point.
        BackendError: the backend asked for cannot run here.
    """
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.plain_number("eps", eps, low=0)
    s, t = adapted(adapter, student_features), teacher_features
    dim = checked(s, t, dim)
    batch, channels = s.shape[0], s.shape[dim]
    checks.float_tensor("raw_variance", raw_variance)
    if tuple(raw_variance.shape) != (channels,):
        raise ValueError(f"raw_variance must have one number a channel, ({channels},); got {tuple(raw_variance.shape)}")
    checks.same_device(student_features=s, raw_variance=raw_variance)
    backend = backends.resolve("variational_information_loss", (s, t), backend, SUPPORTED)
    factor = share(s, reduction)
    (raw,) = as_wide(raw_variance if backend != "reference" else raw_variance.to(s.dtype))
    variance = F.softplus(raw) + eps
    weight = (0.5 / variance).expand(batch, -1)
    squares = op.match(s, t, dim=dim, channel_weight=weight, factor=factor, backend=backend)
    return squares + 0.5 * factor * (s.numel() // channels) * variance.log().sum()


def pearson_feature_loss(
    student_features: torch.Tensor,
    teacher_features: torch.Tensor,
    *,
    adapter: nn.Module | None = None,
    eps: float = 1e-6,
    resize: str | None = None,
    dim: int = 1,
    backend: str = "auto",
) -> torch.Tensor:
    """PKD: half the mean squared difference of channels that are normalised over batch and pixels.

    z = (x - mean) / (std + eps) for every channel, with the unbiased standard deviation; 1 minus the mean Pearson
    correlation of the channels, but for eps: Cao et al. (2022, arXiv:2207.02039). All moments are float64 sums from one
    read of both maps.

    Args:
        student_features: float16, bfloat16, float32 or float64, (N, C, H, W), (N, C, ...) or, with dim=-1, (B, T, D).
        teacher_features: the same shape (after adapter and resize) on the same device; the dtype may differ. Gets a
            gradient if it requires one.
        adapter: a module that the student's features go through first.
        eps: added to each standard deviation.
        resize: "student" or "teacher": which of two maps (N, C, H, W) is interpolated bilinearly to the other's size.
        dim: the channel axis.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs), 0 for an empty batch. A channel that is constant counts as z = 0 and
        gets no gradient.

    Raises:
        ValueError: shapes that differ (for channels the message names the adapter), differing devices, an unknown resize.
        TypeError: features that are not floating point.
        BackendError: the backend asked for cannot run here.

    Against others: the authors' code and mmrazor interpolate the student by default: resize="student".
    """
    if resize is not None:
        checks.choice("resize", resize, ("student", "teacher"))
    checks.plain_number("eps", eps, low=0)
    student, teacher = adapted(adapter, student_features), teacher_features
    if resize == "student" and student.dim() == 4 and student.shape[2:] != teacher.shape[2:]:
        student = F.interpolate(student, tuple(teacher.shape[2:]), mode="bilinear")
    elif resize == "teacher" and teacher.dim() == 4 and student.shape[2:] != teacher.shape[2:]:
        teacher = F.interpolate(teacher, tuple(student.shape[2:]), mode="bilinear")
    dim = checked(student, teacher, dim)
    backend = backends.resolve("pearson_feature_loss", (student, teacher), backend, SUPPORTED)
    channels, n = student.shape[dim], student.numel() // student.shape[dim]
    if backend == "reference":
        x, y = (_standardized(of_channels(v, dim).transpose(0, 1).flatten(1), eps) for v in as_wide(student, teacher))
        return 0.5 * (x - y).pow(2).sum() / max(channels * n, 1)
    n = max(n, 1)
    found = sums.moments(student, teacher, channels=True, dim=dim, backend=backend).sum(1)
    of_each, squares = found[:2], found[2:4]
    centred = squares - of_each.square() / n
    inverse = _inverse_std(centred, squares, n, eps)
    products = (found[4] - of_each[0] * of_each[1] / n) * inverse[0] * inverse[1]
    apart = (centred * inverse.square()).sum(0) - 2 * products
    return (0.5 * apart.sum() / (channels * n)).float()


CONSTANT = 1e-13  # of the sum of squares: what float64 sums leave of a constant channel's variance


def _standardized(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Rows less their mean, over their unbiased standard deviation + eps; constant rows become 0."""
    if x.shape[1] < 2:
        return x * 0.0
    centred = x - x.mean(1, keepdim=True)
    squares = centred.pow(2).sum(1, keepdim=True)
    varied = squares > CONSTANT * x.pow(2).sum(1, keepdim=True)
    std = (squares.where(varied, 1.0) / (x.shape[1] - 1)).sqrt() + eps
    return (centred / std).where(varied, 0.0)


def _inverse_std(centred: torch.Tensor, squares: torch.Tensor, n: int, eps: float) -> torch.Tensor:
    """1 / (std + eps) from sums of squares about the mean and about 0; 0 for constant channels."""
    varied = centred > CONSTANT * squares
    return (1.0 / ((centred.where(varied, 1.0) / max(n - 1, 1)).sqrt() + eps)).where(varied, 0.0)


def hierarchical_context_loss(
    student_features: torch.Tensor | Sequence[torch.Tensor],
    teacher_features: torch.Tensor | Sequence[torch.Tensor],
    *,
    levels: Sequence[int] = (4, 2, 1),
    backend: str = "auto",
) -> torch.Tensor:
    """ReviewKD's hierarchical context loss: mean squared differences of the maps and of their averages at several sizes.

    For each pair of maps (1 mse(s, t) + 1/2 mse at 4 x 4 + 1/4 mse at 2 x 2 + 1/8 mse at 1 x 1) over the sum of those
    weights, sizes as large as the map left out; summed over pairs. Chen et al. (2021, arXiv:2104.09044). On a CPU all levels
    come from one read of the maps. In Triton the averages are torch's adaptive pooling, each from the next larger one where
    the windows nest, and maps in half precision are copied to float32, so that the levels' gradients add up before they
    are rounded.

    Args:
        student_features: a map (N, C, H, W) or a list of them, float16, bfloat16, float32 or float64.
        teacher_features: as many, of the same shapes, on the same device; dtypes may differ.
        levels: the sizes, falling.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs).

    Raises:
        ValueError: a different number of maps, shapes that differ, maps that are not (N, C, H, W), levels that do not fall.
        TypeError, BackendError: as hint_loss.
    """
    students, teachers = (
        checks.tensors("student_features", student_features),
        checks.tensors("teacher_features", teacher_features),
    )
    if len(students) != len(teachers) or not students:
        raise ValueError(
            "student_features and teacher_features must be as many maps, at least one; "
            f"got {len(students)} and {len(teachers)}"
        )
    if not isinstance(levels, (list, tuple)):
        raise TypeError(f"levels must be a sequence of integers, got {type(levels).__name__}")
    for i, level in enumerate(levels):
        checks.integer(f"levels[{i}]", level)
    if any(a <= b for a, b in itertools.pairwise(levels)) or any(level < 1 for level in levels):
        raise ValueError(f"levels must fall and be at least 1, got {tuple(levels)}")
    for s, t in zip(students, teachers):
        checked(s, t, 1)
    total: Any = 0.0
    for pair in zip(students, teachers, strict=True):
        scalars, chosen = _context_plan(pair, backend, *levels)
        one = _pooled(*pair, levels, chosen) if scalars is None else context.context(*pair, scalars, backend=chosen)
        total = total + one if len(students) > 1 else one
    return total


@remembered
def _context_plan(
    pair: tuple[torch.Tensor, torch.Tensor], backend: str, *levels: int
) -> tuple[torch.Tensor | None, str]:
    """The factors of one pair of maps, where a kernel has all levels at once, and the backend."""
    checked(*pair, 1)
    s = pair[0]
    if s.dim() != 4:
        raise ValueError(f"maps must be (N, C, H, W), got shape {tuple(s.shape)}")
    backend = backends.resolve("hierarchical_context_loss", pair, backend, SUPPORTED)
    if backend in ("triton", "reference"):
        return None, backend
    sizes = [level for level in levels if level < s.shape[2]]
    weights = [0.5**k for k in range(len(sizes) + 1)]
    counts = [s.numel(), *(s.shape[0] * s.shape[1] * size**2 for size in sizes)]
    factors = [weight / (sum(weights) * max(n, 1)) for weight, n in zip(weights, counts, strict=True)]
    return pack((factors[0], *itertools.chain(*zip(sizes, factors[1:], strict=True)))), backend


def _pooled(s: torch.Tensor, t: torch.Tensor, levels: Sequence[int], backend: str) -> torch.Tensor:
    """The same of hints and poolings."""
    s, t = as_wide(s, t)
    loss, weight, weights = hint_loss(s, t, backend=backend), 1.0, 1.0
    x, y = s, t
    for level in levels:
        if level >= s.shape[2]:
            continue
        weight /= 2.0
        nested = all(size % level == 0 for size in x.shape[2:]) and all(
            size % now == 0 for size, now in zip(s.shape[2:], x.shape[2:], strict=True)
        )
        if not nested:
            x, y = s, t
        x, y = F.adaptive_avg_pool2d(x, level), F.adaptive_avg_pool2d(y, level)
        loss = loss + weight * hint_loss(x, y, backend=backend)
        weights += weight
    return loss / weights


class VariationalInformationLoss(LossModule):
    """`variational_information_loss` with its raw variances as a parameter.

    Args:
        channels: of the teacher.
        initial_variance: where every channel's begins.
        options: the function's keyword arguments.
    """

    function = staticmethod(variational_information_loss)

    @typed
    def __init__(self, channels: int, *, initial_variance: float = 5.0, **options: Any):
        super().__init__(**options)
        checks.integer("channels", channels, low=1)
        eps = options.get("eps", 1e-5)
        checks.plain_number("initial_variance", initial_variance, low=eps, open_low=True)
        above = initial_variance - eps
        raw = above + math.log(-math.expm1(-above))
        self.raw_variance = nn.Parameter(torch.full((channels,), raw))

    def forward(self, *tensors: torch.Tensor | None, **options: Any) -> torch.Tensor:
        """The loss of student and teacher features."""
        return super().forward(*tensors, self.raw_variance, **options)


class PearsonFeatureLoss(LossModule):
    """`pearson_feature_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(pearson_feature_loss)


class HierarchicalContextLoss(LossModule):
    """`hierarchical_context_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(hierarchical_context_loss)
