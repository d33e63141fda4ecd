"""Losses between the products of a student's channels with each other and those of a teacher's."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from kdkernels import backends, checks
from kdkernels.losses.module import LossModule
from kdkernels.ops.gram_match import reference
from kdkernels.ops.gram_match.kinds import Kind, Normalize
from kdkernels.ops.gram_match.op import gram_match
from kdkernels.ops.plans import remembered


def _pair(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as (N, C, L) with one N; C and L their own."""
    s, t = checks.maps("student", student), checks.maps("teacher", teacher)
    if s.shape[0] != t.shape[0]:
        raise ValueError(
            f"student and teacher must hold the same samples: student has {s.shape[0]} and teacher {t.shape[0]}"
        )
    checks.same_device(student=student, teacher=teacher)
    return s, t


def _same_channels(student: torch.Tensor, teacher: torch.Tensor) -> None:
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student and teacher must have the same number of channels: student has {student.shape[1]} and teacher {teacher.shape[1]}"
        )


def _common_size(**maps: torch.Tensor) -> tuple[int, ...]:
    """The least height and width among maps, or their positions where all have the same."""
    if len({x.shape[2:] for x in maps.values()}) == 1:
        return tuple(next(iter(maps.values())).shape[2:])
    for name, x in maps.items():
        if x.dim() != 4:
            sizes = ", ".join(str(tuple(m.shape)) for m in maps.values())
            raise ValueError(f"{name} must be (N, C, H, W) where maps differ in size; got shapes {sizes}")
    height, width = (min(x.shape[d] for x in maps.values()) for d in (2, 3))
    return height, width


def _pooled(x: torch.Tensor, size: tuple[int, ...], pool: str = "avg") -> torch.Tensor:
    """A map of that size, (N, C, positions)."""
    if x.shape[2:] != size:
        pooled = F.adaptive_avg_pool2d if pool == "avg" else F.adaptive_max_pool2d
        x = pooled(x, (size[0], size[1]))
    return x.flatten(2)


def gram_loss(
    student: torch.Tensor, teacher: torch.Tensor, *, reduction: str = "mean", backend: str = "auto"
) -> torch.Tensor:
    """Mean squared difference of the models' channel Gram matrices, as in style transfer.

    G = F F^T / (C H W) with F (C, HW) a sample's map, and the mean of (G^s - G^t)^2 over N C^2: Gatys, Ecker and Bethge
    (2016), as distillation codes use it.

    Args:
        student: feature maps, float16, bfloat16, float32 or float64, (N, C, H, W) or (N, C, ...).
        teacher: the same N and C on the same device; dtype and size may differ. Gets a gradient if it requires one.
        reduction: "mean" divides by N C^2, "batchmean" by N, "sum" by nothing.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs); 0 for N = 0.

    Raises:
        ValueError: a different number of samples or channels, differing devices, no channels or positions, an unknown
            reduction.
        TypeError: maps that are not floating point.
        BackendError: the backend asked for cannot run here.
    """
    checks.choice("reduction", reduction, ("mean", "batchmean", "sum"))
    s, t = _pair(student, teacher)
    _same_channels(s, t)
    n, channels = s.shape[0], s.shape[1]
    divisor = {"mean": n * channels * channels, "batchmean": n, "sum": 1}[reduction]
    return gram_match(
        s, t, kind=Kind.LINEAR, scale=1.0 / max(divisor, 1),
        factors=(1.0 / (channels * s.shape[2]), 1.0 / (channels * t.shape[2])),
        backend=backends.resolve("gram_loss", (s, t), backend),
    )  # fmt: skip


def nst_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    detach_teacher_term: bool = True,
    eps: float = 1e-12,
    reduction: str = "mean",
    backend: str = "auto",
) -> torch.Tensor:
    """Neuron selectivity transfer: the maximum mean discrepancy of the channels' patterns, by a squared inner product.

    With f the channels of a sample over their lengths, mean K_tt + mean K_ss - 2 mean K_st over pairs of channels,
    K = (f_i . f_j)^2, and the mean over samples: Huang and Wang (2017, arXiv:1707.01219). It is computed as
    |F_s^T F_s / C_s - F_t^T F_t / C_t|^2 over positions, or over channels where C_s + C_t is less: never over
    C x C x HW.

    Args:
        student: feature maps, float16, bfloat16, float32 or float64, (N, C, H, W) or (N, C, ...).
        teacher: the same N on the same device; dtype and channels may differ. Larger maps of (N, C, H, W) are averaged
            down to the other model's size. Gets a gradient if it requires one.
        detach_teacher_term: leave mean K_tt out of the teacher's gradient.
        eps: the least length of a channel. One of zeros counts as 0 and gets no gradient.
        reduction: "mean" over samples, or "sum".
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs); 0 for N = 0.

    Raises:
        ValueError: a different number of samples, differing devices, no channels or positions, eps not positive, an
            unknown reduction, maps of differing sizes that are not (N, C, H, W).
        TypeError: maps that are not floating point.
        BackendError: the backend asked for cannot run here.

    Against others: RepDistiller and mdistiller have these defaults; Knowledge-Distillation-Zoo passes
    detach_teacher_term=False.
    """
    checks.choice("reduction", reduction, ("mean", "sum"))
    checks.plain_number("eps", eps, low=0, open_low=True)
    checks.flag("detach_teacher_term", detach_teacher_term)
    _pair(student, teacher)
    size = _common_size(student=student, teacher=teacher)
    s, t = _pooled(student, size), _pooled(teacher, size)
    n, channels, others, positions = s.shape[0], s.shape[1], t.shape[1], s.shape[2]
    scale = 1.0 / max(n, 1) if reduction == "mean" else 1.0
    backend = backends.resolve("nst_loss", (s, t), backend)
    if positions <= channels + others:
        loss = gram_match(
            s.mT, t.mT, kind=Kind.LINEAR, normalize=Normalize.COLUMNS, scale=scale,
            factors=(1.0 / channels, 1.0 / others), eps=eps, backend=backend,
        )  # fmt: skip
    else:
        loss = gram_match(s, t, kind=Kind.SIGNED, normalize=Normalize.CLAMPED, scale=scale, eps=eps, backend=backend)
    if detach_teacher_term and teacher.requires_grad:
        alone = scale * _mean_squares(t, eps)
        loss = loss - (alone - alone.detach())
    return loss


def _mean_squares(x: torch.Tensor, eps: float) -> torch.Tensor:
    """mean K_xx of every sample, summed: for its gradient."""
    f = reference.unit(x if x.dtype == torch.float64 else x.float(), 2, eps)
    f = f if f.shape[1] <= f.shape[2] else f.mT
    return (f @ f.mT).square().sum() / x.shape[1] ** 2


def fsp_loss(
    student_first: torch.Tensor,
    student_second: torch.Tensor,
    teacher_first: torch.Tensor,
    teacher_second: torch.Tensor,
    *,
    pool: str = "avg",
    distance: str = "squared",
    reduction: str = "mean",
    backend: str = "auto",
) -> torch.Tensor:
    """Flow of solution procedure: how the channels of one layer go with those of a later one, the same in both models.

    G = F_1 F_2^T / HW of a sample's maps F_1 (C_1, HW) and F_2 (C_2, HW), and the mean of (G^s - G^t)^2 over N C_1 C_2:
    Yim, Joo, Bae and Kim (2017, "A gift from knowledge distillation").

    Args:
        student_first, student_second: feature maps of two layers, float16, bfloat16, float32 or float64,
            (N, C, H, W) or (N, C, ...).
        teacher_first, teacher_second: the same N, C_1 and C_2 on the same device; dtype and size may differ. Get gradients
            if they require them.
        pool: how the larger of a model's two maps is brought to the other's size, "avg" or "max".
        distance: "squared", or "norm" for the unsquared length of the difference along the first map's channels.
        reduction: "mean" divides by N C_1 C_2 (distance "norm": by N), "sum" by nothing.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs); 0 for N = 0.

    Raises:
        ValueError: a different number of samples or channels, differing devices, no channels or positions, an unknown
            pool, distance or reduction, maps of differing sizes that are not (N, C, H, W).
        TypeError: maps that are not floating point.
        BackendError: the backend asked for cannot run here.

    Against others: RepDistiller has these defaults; torchdistill passes pool="max", distance="norm".
    """
    maps = student_first, student_second, teacher_first, teacher_second
    sizes, options = _fsp_plan(maps, pool, distance, reduction, backend)
    s1, s2, t1, t2 = (_pooled(x, size, pool) for x, size in zip(maps, sizes, strict=True))
    if distance == "squared":
        return gram_match(s1, t1, s2, t2, kind=Kind.LINEAR, **options)
    return gram_match(s2, t2, s1, t1, kind=Kind.LENGTHS, **options)


@remembered
def _fsp_plan(
    maps: tuple[torch.Tensor, ...], pool: str, distance: str, reduction: str, backend: str
) -> tuple[tuple[tuple[int, ...], ...], dict[str, Any]]:
    """What each map is pooled to, and gram_match's options, once fsp_loss's arguments are found to be right."""
    checks.choice("pool", pool, ("avg", "max"))
    checks.choice("distance", distance, ("squared", "norm"))
    checks.choice("reduction", reduction, ("mean", "sum"))
    student_first, student_second, teacher_first, teacher_second = maps
    of_student = {"student_first": student_first, "student_second": student_second}
    of_teacher = {"teacher_first": teacher_first, "teacher_second": teacher_second}
    given = of_student | of_teacher
    for name, x in given.items():
        checks.maps(name, x)
        if x.shape[0] != student_first.shape[0]:
            raise ValueError(
                f"all maps must hold the same samples: student_first has {student_first.shape[0]} and {name} {x.shape[0]}"
            )
    checks.same_device(**given)
    for layer, s, t in (("first", student_first, teacher_first), ("second", student_second, teacher_second)):
        if s.shape[1] != t.shape[1]:
            raise ValueError(
                f"student_{layer} and teacher_{layer} must have the same number of channels, got {s.shape[1]} and {t.shape[1]}"
            )
    of_s, of_t = _common_size(**of_student), _common_size(**of_teacher)
    n, rows, columns = student_first.shape[0], student_first.shape[1], student_second.shape[1]
    divisor = 1 if reduction == "sum" else n if distance == "norm" else n * rows * columns
    options = {
        "scale": 1.0 / max(divisor, 1),
        "factors": (1.0 / math.prod(of_s), 1.0 / math.prod(of_t)),
        "backend": backends.resolve("fsp_loss", maps, backend),
    }
    return (of_s, of_s, of_t, of_t), options


def ickd_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    eps: float = 1e-12,
    reduction: str = "mean",
    backend: str = "auto",
) -> torch.Tensor:
    """Inter-channel correlation: squared differences of the models' row-normalised channel Gram matrices.

    G = F F^T with F (C, HW) a sample's map, each of its rows over its length, and sum (G^s - G^t)^2 / (C N^2): Liu, Huang,
    Lin, Xia, Lei, Ma, Li and Yang (2021, "Exploring inter-channel correlation for diversity-preserved knowledge
    distillation").

    Args:
        student: feature maps, float16, bfloat16, float32 or float64, (N, C, H, W) or (N, C, ...).
        teacher: the same N and C on the same device; dtype and size may differ. Gets a gradient if it requires one.
        eps: the least length of a row.
        reduction: "mean" divides by C N^2, "batchmean" by C N, "sum" by nothing.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs); 0 for N = 0.

    Raises:
        ValueError: a different number of samples or channels, differing devices, no channels or positions, eps not
            positive, an unknown reduction.
        TypeError: maps that are not floating point.
        BackendError: the backend asked for cannot run here.

    Against others: code in circulation divides by C N^2 or by C N, reduction="batchmean".
    """
    checks.choice("reduction", reduction, ("mean", "batchmean", "sum"))
    checks.plain_number("eps", eps, low=0, open_low=True)
    s, t = _pair(student, teacher)
    _same_channels(s, t)
    n, channels = s.shape[0], s.shape[1]
    divisor = {"mean": channels * n * n, "batchmean": channels * n, "sum": 1}[reduction]
    return gram_match(
        s, t, kind=Kind.ROWS, scale=1.0 / max(divisor, 1), eps=eps,
        backend=backends.resolve("ickd_loss", (s, t), backend),
    )  # fmt: skip


class GramLoss(LossModule):
    """`gram_loss` as a module: GramLoss()(student, teacher)."""

    function = staticmethod(gram_loss)


class NSTLoss(LossModule):
    """`nst_loss` as a module: NSTLoss()(student, teacher)."""

    function = staticmethod(nst_loss)


class FSPLoss(LossModule):
    """`fsp_loss` as a module: FSPLoss()(student_first, student_second, teacher_first, teacher_second)."""

    function = staticmethod(fsp_loss)


class ICKDLoss(LossModule):
    """`ickd_loss` as a module: ICKDLoss()(student, teacher)."""

    function = staticmethod(ickd_loss)
