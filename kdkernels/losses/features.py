"""Losses between feature maps: hints, and what all such losses share."""

from __future__ import annotations

import functools

import torch
from torch import nn

from kdkernels import backends, checks
from kdkernels.losses.module import LossModule
from kdkernels.ops.plans import remembered
from kdkernels.ops.weighted_match import op, sums
from kdkernels.ops.weighted_match.reference import MEASURES
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


class HintLoss(LossModule):
    """`hint_loss` as a module: its keyword arguments are the options. An adapter given here is trained with it."""

    function = staticmethod(hint_loss)
