"""Attention transfer: where a model's activations are, over pixels or over channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kdkernels import backends, checks
from kdkernels.losses.features import EPS, SUPPORTED, checked, normalized
from kdkernels.losses.module import LossModule
from kdkernels.ops.plans import remembered
from kdkernels.ops.weighted_match import op, sums
from kdkernels.ops.weighted_match.maps import of_channels
from kdkernels.ops.weighted_match.reference import power


def _attention(
    operation: str, student: torch.Tensor, teacher: torch.Tensor, dim: int, *, over_channels: bool, p: float, signed: bool,
    mean: bool, distance: str, eps: float, add_eps: bool, backend: str,
) -> torch.Tensor:  # fmt: skip
    dim, backend = _attention_plan(
        (student, teacher), operation, dim, over_channels, p, signed, distance, eps, add_eps, backend
    )
    if backend != "reference":
        return op.attention(
            student, teacher, p, over_channels=over_channels, signed=signed, mean=mean, squared=distance == "squared",
            eps=eps, add_eps=add_eps, dim=dim, backend=backend,
        )  # fmt: skip
    a, b = (
        normalized(_sums(of_channels(x, dim), p, signed, over_channels, mean), eps, add_eps) for x in (student, teacher)
    )
    squares = (a - b).pow(2)
    if distance == "squared":
        return sums.ordered_sum(squares.sum(1)) / max(squares.numel(), 1)
    rows = squares.sum(1)
    apart = rows != 0  # the root has no derivative at 0; NaN stays NaN
    return sums.ordered_sum(rows.where(apart, 1.0).sqrt().where(apart, 0.0)) / max(rows.numel(), 1)


@remembered
def _attention_plan(
    tensors: tuple[torch.Tensor, torch.Tensor], operation: str, dim: int, over_channels: bool, p: float, signed: bool,
    distance: str, eps: float, add_eps: bool, backend: str,
) -> tuple[int, str]:  # fmt: skip
    """Their channel axis and backend, once all arguments are found to be right."""
    dim = checked(*tensors, dim, same="pixels" if over_channels else "channels")
    checks.choice("distance", distance, ("squared", "norm"))
    checks.plain_number("p", p, low=1)
    checks.plain_number("eps", eps, low=0)
    checks.flag("signed", signed)
    checks.flag("add_eps", add_eps)
    if signed and p != round(p):
        raise ValueError(f"signed takes an integer p, got {p:g}")
    if over_channels and tensors[0].dim() < 3:
        raise ValueError(
            f"student_features must have positions to attend to, (N, C, H, W) or (B, T, D); got shape {tuple(tensors[0].shape)}"
        )
    return dim, backends.resolve(operation, tensors, backend, SUPPORTED)


def _sums(x: torch.Tensor, p: float, signed: bool, over_channels: bool, mean: bool) -> torch.Tensor:
    """Sums or means of powers of (N, C, pixels) over the channels, (N, pixels), or over the pixels, (N, C)."""
    y = power(x, p, signed)
    axis = 1 if over_channels else 2
    return y.mean(axis) if mean else y.sum(axis)


def attention_transfer_loss(
    student_features: torch.Tensor,
    teacher_features: torch.Tensor,
    *,
    p: float = 2.0,
    signed: bool = False,
    channels: str = "mean",
    distance: str = "squared",
    eps: float = EPS,
    add_eps: bool = False,
    pool: bool = True,
    dim: int = 1,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention transfer: the distance between both models' normalised maps of activation.

    a = A / |A| with A the mean of |x|^p over the channels, flattened over the pixels; the mean over samples and pixels of
    (a_s - a_t)^2: Zagoruyko and Komodakis (2017, arXiv:1612.03928). Each map is read once, and once more for the
    gradient; the attention itself is as small as one channel.

    Args:
        student_features: float16, bfloat16, float32 or float64, (N, C, H, W), (N, C, ...) or, with dim=-1, (B, T, D).
        teacher_features: the same number of samples and pixels on the same device; dtype and channels may differ. Gets a
            gradient if it requires one.
        p: the power, at least 1.
        signed: x^p instead of |x|^p, for an integer p.
        channels: "mean" or "sum" of them. They differ by eps only.
        distance: "squared", or "norm": |a_s - a_t| of each sample, averaged over samples.
        eps: the least norm.
        add_eps: add eps to the norm instead.
        pool: average the larger of two maps (N, C, H, W) down to the smaller's size first.
        dim: the channel axis.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs). A map of zeros has attention 0 and gets no gradient.

    Raises:
        ValueError: a different number of samples or (without pool) pixels, features without pixels, differing devices, p
            below 1, a signed power that is no integer.
        TypeError: features that are not floating point.
        BackendError: the backend asked for cannot run here.

    Against others: the authors, torchdistill's default, RepDistiller and mdistiller are this; the last two have x.pow(p),
    signed=True, which matters where p is odd. torchdistill's mode "paper" is distance="norm"; the Zoo adds 1e-6 to
    the norm of the sum: channels="sum", eps=1e-6, add_eps=True.
    """
    checks.choice("channels", channels, ("mean", "sum"))
    checks.flag("pool", pool)
    checks.integer("dim", dim)
    student, teacher = student_features, teacher_features
    if pool and dim == 1 and _is_image(student) and _is_image(teacher) and student.shape[2:] != teacher.shape[2:]:
        size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
        student, teacher = (
            x if tuple(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size) for x in (student, teacher)
        )
    return _attention(
        "attention_transfer_loss", student, teacher, dim, over_channels=True, p=p, signed=signed, mean=channels == "mean",
        distance=distance, eps=eps, add_eps=add_eps, backend=backend,
    )  # fmt: skip


def _is_image(x: torch.Tensor) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() == 4 and x.is_floating_point() and x.shape[1:].numel() > 0


def channel_attention_transfer_loss(
    student_features: torch.Tensor,
    teacher_features: torch.Tensor,
    *,
    p: float = 2.0,
    signed: bool = False,
    distance: str = "squared",
    eps: float = EPS,
    add_eps: bool = False,
    dim: int = 1,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention transfer between channels: a = A / |A| over the channels, A the mean of |x|^p over the pixels.

    The mean over samples and channels of (a_s - a_t)^2: what Zagoruyko and Komodakis (2017, arXiv:1612.03928) do over the
    pixels, done over the channels.

    Args:
        student_features: as attention_transfer_loss.
        teacher_features: the same number of samples and channels on the same device; dtype and pixels may differ.
        p, signed, distance, eps, add_eps, dim, backend: as attention_transfer_loss.

    Returns:
        A float32 scalar (float64 for float64 inputs). A map of zeros has attention 0 and gets no gradient.

    Raises:
        ValueError, TypeError, BackendError: as attention_transfer_loss; ValueError also where channels differ.
    """
    return _attention(
        "channel_attention_transfer_loss", student_features, teacher_features, dim, over_channels=False, p=p,
        signed=signed, mean=True, distance=distance, eps=eps, add_eps=add_eps, backend=backend,
    )  # fmt: skip


class AttentionTransferLoss(LossModule):
    """`attention_transfer_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(attention_transfer_loss)


class ChannelAttentionTransferLoss(LossModule):
    """`channel_attention_transfer_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(channel_attention_transfer_loss)
