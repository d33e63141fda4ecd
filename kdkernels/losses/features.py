"""Losses between feature maps: hints and attention."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from kdkernels import backends, checks
from kdkernels.losses.module import LossModule
from kdkernels.ops.plans import remembered
from kdkernels.ops.weighted_match import op, sums
from kdkernels.ops.weighted_match.maps import of_channels
from kdkernels.ops.weighted_match.reference import MEASURES, power
from kdkernels.typed import typed

SUPPORTED = ("triton", "cpu", "reference")
REDUCTIONS = ("mean", "batchmean", "sum")
EPS = 1e-12


class Adapter(nn.Module):
    """Brings a student's features to the teacher's width: a 1x1 convolution, or a linear layer for (..., D).

    FitNets' regressor (Romero et al. 2015, arXiv:1412.6550); RepDistiller and mdistiller follow it by batch
    normalisation and ReLU. It is trained with the student, and thrown away afterwards.

    Args:
        student_channels, teacher_channels: the widths.
        linear: for features whose channels come last, (..., D), instead of (N, C, H, W).
        batch_norm: normalise the result over the batch.
        relu: apply ReLU at the end.
    """

    @typed
    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        linear: bool = False,
        batch_norm: bool = False,
        relu: bool = False,
    ):
        super().__init__()
        checks.integer("student_channels", student_channels, low=1)
        checks.integer("teacher_channels", teacher_channels, low=1)
        self.project = (
            nn.Linear(student_channels, teacher_channels, bias=not batch_norm)
            if linear
            else nn.Conv2d(student_channels, teacher_channels, 1, bias=not batch_norm)
        )
        norm = nn.BatchNorm1d if linear else nn.BatchNorm2d
        self.norm = norm(teacher_channels) if batch_norm else None
        self.relu = relu

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features of the teacher's width.

        Raises:
            ValueError: features of another width, or in another order than `linear` says.
        """
        linear, width = isinstance(self.project, nn.Linear), self.project.weight.shape[1]
        if features.dim() < 2 if linear else features.dim() != 4:
            order = "(..., D), as linear=True says" if linear else "(N, C, H, W), or linear=True for (..., D)"
            raise ValueError(f"features of an Adapter must be {order}; got shape {tuple(features.shape)}")
        if features.shape[-1 if linear else 1] != width:
            raise ValueError(f"features of this Adapter must have {width} channels; got shape {tuple(features.shape)}")
        x = self.project(features)
        if self.norm is not None:
            # BatchNorm1d wants (rows, channels).
            x = self.norm(x) if x.dim() != 3 else self.norm(x.flatten(0, 1)).view_as(x)
        return x.relu() if self.relu else x


def checked(
    student: torch.Tensor, teacher: torch.Tensor, dim: int, *, same: str = "shape", suffix: str = "_features"
) -> int:
    """The channels' axis of both features, not negative.

    Args:
        same: what they must share: "shape", "pixels" or "channels".
        suffix: of their names, for messages.
    """
    checks.float_tensor(f"student{suffix}", student)
    checks.float_tensor(f"teacher{suffix}", teacher)
    if student.device != teacher.device:
        raise ValueError(
            f"student and teacher must be on one device: student{suffix} is on {student.device}, "
            f"teacher{suffix} on {teacher.device}"
        )
    checks.integer("dim", dim)
    check = _shapes if torch.compiler.is_compiling() else _known_shapes  # sizes may be symbols
    return check(student.shape, teacher.shape, dim, same, suffix)


def _shapes(s: torch.Size, t: torch.Size, dim: int, same: str, suffix: str) -> int:
    what = f"student{suffix} has shape {tuple(s)} and teacher{suffix} {tuple(t)}"
    for name, shape in ((f"student{suffix}", s), (f"teacher{suffix}", t)):
        if len(shape) < 2:
            raise ValueError(f"{name} must be (N, C, ...), with a sample and a channel axis; got shape {tuple(shape)}")
    if len(s) != len(t):
        raise ValueError(f"both must have as many axes: {what}")
    if not -len(s) < dim < len(s) or dim % len(s) == 0:
        raise ValueError(f"dim must be an axis of {tuple(s)} other than the first, got {dim}")
    dim %= len(s)
    if s[0] != t[0]:
        raise ValueError(f"student and teacher must hold the same samples: {what}")
    if s[1:].numel() == 0 or t[1:].numel() == 0:
        raise ValueError(f"there must be at least one channel and one pixel: {what}")
    if same != "pixels" and s[dim] != t[dim]:
        raise ValueError(
            f"channels differ, {s[dim]} against {t[dim]}: {what}; add an adapter, "
            f"e.g. adapter=kdkernels.Adapter({s[dim]}, {t[dim]})"
        )
    if same != "channels" and s[1:dim] + s[dim + 1 :] != t[1:dim] + t[dim + 1 :]:
        raise ValueError(f"sizes differ: {what}; pool or interpolate one of them")
    return dim


_known_shapes = functools.lru_cache(maxsize=4096)(_shapes)


def adapted(adapter: nn.Module | None, student: torch.Tensor, name: str = "adapter") -> torch.Tensor:
    """What an adapter makes of the student's features; any callable will do."""
    if adapter is None:
        return student
    if not callable(adapter) or isinstance(adapter, type):
        what = f"the class {adapter.__name__}" if isinstance(adapter, type) else type(adapter).__name__
        raise TypeError(f"{name} must be a module, got {what}")
    features = adapter(student)
    if not isinstance(features, torch.Tensor):
        raise TypeError(f"{name} must make a tensor of the student's features, got {type(features).__name__}")
    return features


def share(x: torch.Tensor, reduction: str) -> float:
    """What a sum over the elements of x is multiplied by."""
    return 1.0 if reduction == "sum" else 1.0 / max(x.numel() if reduction == "mean" else x.shape[0], 1)


def as_wide(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All in float64 if one is, else in float32: what the reference computes in."""
    dtypes = [x.dtype for x in tensors]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return tensors if dtypes.count(dtype) == len(dtypes) else tuple([x.to(dtype) for x in tensors])


def hint_loss(
    student_features: torch.Tensor,
    teacher_features: torch.Tensor,
    *,
    adapter: nn.Module | None = None,
    measure: str = "squared",
    beta: float = 1.0,
    normalize: bool = False,
    dim: int = 1,
    reduction: str = "mean",
    backend: str = "auto",
) -> torch.Tensor:
    """FitNets' hint: the mean squared difference between the (adapted) student's features and the teacher's.

    Romero et al. (2015, arXiv:1412.6550). One pass reads both maps and writes the gradient.

    Args:
        student_features: float16, bfloat16, float32 or float64, (N, C, H, W), (N, C, ...) or, with dim=-1, (B, T, D);
            NCHW and channels-last memory are both read as they lie.
        teacher_features: the same shape (after the adapter) on the same device; the dtype may differ. Gets a gradient
            if it requires one.
        adapter: a module that the student's features go through first, for example Adapter(C_s, C_t).
        measure: "squared" (d^2), "absolute" (|d|) or "smooth_l1".
        beta: where smooth-L1 turns linear, a positive number.
        normalize: divide each sample's features by their L2 norm (at least 1e-12) first; only with "squared".
        dim: the channel axis.
        reduction: "mean" over all elements, "batchmean" over samples, or "sum".
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs), 0 for an empty batch.

    Raises:
        ValueError: shapes that differ (for channels the message names the adapter), differing devices, an unknown
            measure or reduction, beta not positive.
        TypeError: features that are not floating point.
        BackendError: the backend asked for cannot run here.

    Against others: RepDistiller, mdistiller and torchdistill have these defaults, the first two with a convolution, batch
    normalisation and ReLU as the adapter; mmrazor's L2Loss is normalize=True, reduction="batchmean".
    """
    s, t = adapted(adapter, student_features), teacher_features
    dim, factor, backend = _hint_plan((s, t), measure, beta, normalize, dim, reduction, backend)
    if not normalize:
        return op.match(s, t, dim=dim, measure=measure, beta=beta, factor=factor, backend=backend)
    x, y = s.flatten(1), t.flatten(1)
    if backend == "reference":
        x, y = as_wide(x, y)
        return (normalized(x) - normalized(y)).pow(2).sum() * factor
    # |x/|x| - y/|y||^2 from the second moments of each sample, in float64.
    found = sums.moments(x.unsqueeze(1), y.unsqueeze(1), channels=True, backend=backend)
    squares, products, lengths = found[2:4], found[4], inverse_norms(found[2:4])
    apart = (squares * lengths.square()).sum(0) - 2 * products * lengths[0] * lengths[1]
    return (sums.ordered_sum(apart) * factor).float()


@remembered
def _hint_plan(
    tensors: tuple[torch.Tensor, torch.Tensor],
    measure: str,
    beta: float,
    normalize: bool,
    dim: int,
    reduction: str,
    backend: str,
) -> tuple[int, float, str]:
    """hint_loss's channel axis, factor and backend, once its arguments are found to be right."""
    checks.choice("measure", measure, MEASURES)
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.plain_number("beta", beta, low=0, open_low=True)
    checks.flag("normalize", normalize)
    if normalize and measure != "squared":
        raise ValueError(f"normalize goes with measure='squared' only, got {measure!r}")
    dim = checked(*tensors, dim)
    backend = backends.resolve("hint_loss", tensors, backend, SUPPORTED)
    return dim, share(tensors[0], reduction), backend


def inverse_norms(squares: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """One over lengths of at least eps, from squared lengths in float64; of zero vectors 0, so that they get no gradient."""
    return squares.clamp_min(max(eps**2, NOT_ZERO)).rsqrt().masked_fill(squares == 0, 0.0)


NOT_ZERO = 1e-200  # far below any square of float32 numbers; its root's derivative is finite


def normalized(x: torch.Tensor, eps: float = EPS, add_eps: bool = False) -> torch.Tensor:
    """Rows over their lengths; a zero row stays zero and gets no gradient."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)  # its own gradient at 0 is 0
    alive = length != 0
    length = length.where(alive, 1.0)
    return x * (1.0 / (length + eps if add_eps else length.clamp_min(eps))).where(alive, 0.0)


def _attention(
    operation: str, student: torch.Tensor, teacher: torch.Tensor, dim: int, *, over_channels: bool, p: float, signed: bool,
    mean: bool, distance: str, eps: float, add_eps: bool, backend: str,
) -> torch.Tensor:  # fmt: skip
    dim, backend = _attention_plan(
        (student, teacher), operation, dim, over_channels, p, signed, mean, distance, eps, add_eps, backend
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
    tensors: tuple[torch.Tensor, torch.Tensor], operation: str, dim: int, over_channels: bool, p: float, signed: bool, mean: bool,
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

    The mean over samples and channels of (a_s - a_t)^2.

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


class HintLoss(LossModule):
    """`hint_loss` as a module: its keyword arguments are the options. An adapter given here is trained with it."""

    function = staticmethod(hint_loss)


class AttentionTransferLoss(LossModule):
    """`attention_transfer_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(attention_transfer_loss)


class ChannelAttentionTransferLoss(LossModule):
    """`channel_attention_transfer_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(channel_attention_transfer_loss)
