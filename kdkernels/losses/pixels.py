"""Losses between the relations of pixels in a student's feature maps and those in a teacher's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from kdkernels import backends, checks, groups
from kdkernels.losses.module import LossModule
from kdkernels.losses.samples import EPS
from kdkernels.ops.pixel_relation import op
from kdkernels.ops.scalars import Number

AUTHORS_EPS = 1e-8


def _maps(student: torch.Tensor, teacher: torch.Tensor) -> None:
    for name, x in (("student_features", student), ("teacher_features", teacher)):
        checks.float_tensor(name, x)
        if x.dim() != 4 or 0 in x.shape[1:]:
            raise ValueError(f"{name} must be maps (N, C, H, W) with channels and pixels, got shape {tuple(x.shape)}")
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            "student_features and teacher_features must have the same N, H and W (interpolate one of them): "
            f"they are {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"student_features and teacher_features must be on one device: they are on {student.device} and {teacher.device}"
        )


def _pixels(x: torch.Tensor, detach_norm: bool) -> torch.Tensor:
    """Maps as unit vectors, at least in float32: (N, H W, C). A zero pixel stays zero and gets no gradient."""
    x = (x if x.dtype == torch.float64 else x.float()).flatten(2)
    length = torch.linalg.vector_norm(x.detach() if detach_norm else x, dim=1, keepdim=True)
    alive = length > 0
    length = length + AUTHORS_EPS if detach_norm else length.clamp_min(EPS)
    return (x / length.where(alive, torch.inf)).transpose(1, 2)  # channel by channel, as maps lie


def _patch(pool: float | int | None, height: int, width: int) -> tuple[int, int]:
    """The sides of what is pooled into one."""
    if pool is None:
        return 1, 1
    if not checks.real(pool):
        raise TypeError(f"pool must be a fraction of the map, a patch's side or None, got {type(pool).__name__}")
    if checks.whole(pool) and pool >= 1:
        side = checks.integer("pool", pool)
        return side, side
    if checks.whole(pool) or not 0 < pool <= 1:
        raise ValueError(f"pool must be a fraction of the map in (0, 1], or a positive integer, got {pool!r}")
    return max(math.floor(height * pool), 1), max(math.floor(width * pool), 1)


def pairwise_structure_loss(
    student_features: torch.Tensor,
    teacher_features: torch.Tensor,
    *,
    pool: float | int | None = 0.5,
    detach_norm: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> torch.Tensor:
    """Structured distillation's pair-wise term: cosines between the pixels of a map, after max pooling.

    sum over images and pairs of pixels of (cos^s_ij - cos^t_ij)^2, over N P^2 for P pixels after pooling. Liu et al.
    (2019, arXiv:1903.04197).

    Args:
        student_features: maps, float16, bfloat16, float32 or float64, (N, C, H, W).
        teacher_features: the same N, H and W on the same device; dtype and channels may differ.
        pool: the patch that max pooling makes a pixel of: a fraction of the map's sides (0.5 leaves 2 x 2 pixels), or
            the side of a patch in pixels (an int), or None for no pooling. A last patch may be smaller.
        detach_norm: a pixel's norm is a constant, 1e-8 added to it; otherwise it is in the graph, and at least 1e-12.
        reduction: "mean" divides by N P^2, "sum" by nothing.
        backend: "auto", "cuda", "triton", "cpu" or "reference". But for the reference all are torch's matrix products, a
            chunk of rows at a time, in full float32.

    Returns:
        A float32 scalar (float64 for float64 inputs); 0 for N = 0. No matrix over all pixels is kept.

    Raises:
        ValueError: features that are not maps of one N, H, W and device, a `pool` that is neither a fraction nor a
            positive integer, an unknown reduction.
        TypeError: features that are not floating point, a `pool` that is not a number.
        BackendError: the backend asked for cannot run here.

    Against others: these are the authors' defaults (whose gradient to a pixel of zeros is divided by 1e-8; here there is
    none); CIRKD has pool=2, detach_norm=False.
    """
    checks.choice("reduction", reduction, ("mean", "sum"))
    checks.flag("detach_norm", detach_norm)
    _maps(student_features, teacher_features)
    backend = backends.resolve("pairwise_structure_loss", (student_features, teacher_features), backend)
    patch = _patch(pool, *student_features.shape[2:])
    s, t = (
        _pixels(F.max_pool2d(x, patch, ceil_mode=True) if patch != (1, 1) else x, detach_norm)
        for x in (student_features, teacher_features)
    )
    total = op.pixel_similarity(s, t, backend=backend)
    return total if reduction == "sum" else total / max(s.shape[0] * s.shape[1] ** 2, 1)


def cross_image_relation_loss(
    student_features: torch.Tensor,
    teacher_features: torch.Tensor,
    *,
    temperature: Number = 0.1,
    pool: int | None = None,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Cross-image relational distillation (CIRKD) in a mini-batch: each pixel's similarities to the pixels of each image.

    mean over ordered pairs of images (i, j), i = j included, and pixels a of i, of
    KL(softmax_b(cos^t(a, b) / T), softmax_b(cos^s(a, b) / T)), b running over the pixels of j. Yang et al. (CVPR 2022,
    arXiv:2204.06986).

    Args:
        student_features: maps, float16, bfloat16, float32 or float64, (N, C, H, W).
        teacher_features: the same N, H and W on the same device; dtype and channels may differ.
        temperature: T > 0, a number or a tensor with one element. It gets no gradient.
        pool: average pooling over patches of this side first, a last one may be smaller.
        reduction: "mean" divides by N^2 H W, "sum" by nothing.
        group: the ranks whose images are one batch, of which the maps are this rank's, as many as it has; default: this
            process's alone. Values and gradients: kdkernels/distributed/README.md.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs); 0 for N = 0. The similarities exist a chunk of rows at a time.

    Raises:
        ValueError: features that are not maps of one N, H, W and device, a temperature that is not positive or requires
            grad, a `pool` that is not positive, an unknown reduction.
        TypeError: features that are not floating point.
        BackendError: the backend asked for cannot run here.

    Against others: CIRKD's CriterionMiniBatchCrossImagePair has these defaults, pool=2 with its pooling=True.
    """
    checks.number("temperature", temperature, low=0, open_low=True, like=student_features)
    checks.choice("reduction", reduction, ("mean", "sum"))
    if pool is not None:
        checks.integer("pool", pool, low=1)
    with groups.refusing(group):
        _maps(student_features, teacher_features)
    backend = backends.resolve("cross_image_relation_loss", (student_features, teacher_features), backend)
    if pool is not None:
        student_features, teacher_features = (
            F.avg_pool2d(x if x.dtype == torch.float64 else x.float(), pool, ceil_mode=True)
            for x in (student_features, teacher_features)
        )
    s, t = (_pixels(x, False) for x in (student_features, teacher_features))
    if group is not None:
        from kdkernels.distributed.batch import meet

        samples = meet("cross_image_relation_loss", group, student_features=s, teacher_features=t)
        s, t = samples.gather(s), samples.gather(t)
    total = op.cross_image_relation(s, t, temperature=temperature, backend=backend)
    return total if reduction == "sum" else total / max(s.shape[0] ** 2 * s.shape[1], 1)


class PairwiseStructureLoss(LossModule):
    """`pairwise_structure_loss` as a module: PairwiseStructureLoss(pool=2)(student_features, teacher_features)."""

    function = staticmethod(pairwise_structure_loss)


class CrossImageRelationLoss(LossModule):
    """`cross_image_relation_loss` as a module: CrossImageRelationLoss(pool=2)(student_features, teacher_features)."""

    function = staticmethod(cross_image_relation_loss)
