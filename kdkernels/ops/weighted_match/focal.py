"""FGD's focal loss and the distance of its attentions, and the masks of boxes: operators and autograd. Tensors as in op.py."""

from __future__ import annotations

import torch

from kdkernels import backends
from kdkernels.ops.library import define, first_order, learns, save
from kdkernels.ops.scalars import Number, pack
from kdkernels.ops.scale.op import with_gradients
from kdkernels.ops.weighted_match.maps import as_dense, as_map, like, plan
from kdkernels.ops.weighted_match.op import HALF, one_float
from kdkernels.ops.weighted_match.reference import box_masks as drawn
from kdkernels.ops.weighted_match.sums import kernels

# ---- masks of boxes ----


def _masks(
    boxes: torch.Tensor, scale: torch.Tensor | None, weights: torch.Tensor, height: int, width: int, backend: str
) -> torch.Tensor:
    if backend != "cpu":
        front, back = drawn(boxes, (height, width), scale)
        weights = weights.unbind()  # type: ignore[assignment]
        return weights[0] * front + weights[1] * back
    mask = _masks_fake(boxes, scale, weights, height, width, backend)
    scale = None if scale is None else scale.to(torch.float32).contiguous()
    backends.library(backend).call("box_masks", boxes.contiguous(), scale, weights, mask)
    return mask


def _masks_fake(boxes, scale, weights, height, width, backend):
    return torch.empty(boxes.shape[0], height, width, dtype=torch.float32, device=boxes.device)


masks_op = define(
    "box_masks(Tensor boxes, Tensor? scale, Tensor weights, SymInt height, SymInt width, str backend) -> Tensor",
    _masks,
    _masks_fake,
)


def box_masks(
    boxes: torch.Tensor, scale: torch.Tensor | None, size: tuple[int, int], front: Number, back: Number, backend: str
) -> torch.Tensor:
    """`front` times the foreground's mask and `back` times the background's (reference.box_masks), (N, H, W), without gradient.

    Args:
        boxes: float32 (N, M, 4), x1, y1, x2, y2; one with a side below 0, or NaN, is none.
        scale: what corners are multiplied by, (N or 1, 1, 4), or None.
        size: (H, W) of the map.
        backend: a resolved one, not "reference".
    """
    return masks_op(boxes, scale, pack((front, back)), *size, backend)


# ---- the loss ----


def _focal(
    s: torch.Tensor,
    t: torch.Tensor,
    mask: torch.Tensor,
    scalars: torch.Tensor,
    apart_weight: torch.Tensor,
    upstream: torch.Tensor | None,
    want_student: bool,
    backend: str,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    by_s = plan(s, 1)
    by_t = plan(t, 1, by_s.channels_last)
    total, grads = _focal_fake(s, t, mask, scalars, apart_weight, upstream, want_student, backend)
    if s.numel() == 0:
        return total.zero_(), grads
    kernels(backend)(
        backend, "feature_focal", as_map(s, by_s), as_map(t, by_t), mask, scalars, apart_weight, upstream, total,
        as_dense(grads[0], by_s) if want_student else None, by_s.channels_last,
    )  # fmt: skip
    return total, grads


def _focal_fake(s, t, mask, scalars, apart_weight, upstream, want_student, backend):
    total = torch.empty((), dtype=torch.float32, device=s.device)
    return total, [like(s, plan(s, 1))] if want_student else []


focal_op = define(
    "feature_focal(Tensor s, Tensor t, Tensor mask, Tensor scalars, Tensor apart_weight, Tensor? upstream, "
    "bool want_student, str backend) -> (Tensor, Tensor[])",
    _focal,
    _focal_fake,
)


class LateFocal(torch.autograd.Function):
    """The gradient in the backward, when its upstream scale is known, as float16 needs."""

    @staticmethod
    def forward(ctx, s, t, mask, scalars, apart_weight, backend):
        total, _ = focal_op(s, t, mask, scalars, apart_weight, None, False, backend)
        save(ctx, total, s, t, mask, scalars, apart_weight)
        ctx.backend = backend
        return total

    @staticmethod
    def backward(ctx, upstream):
        total, s, *others = ctx.saved_tensors
        with torch.no_grad():
            _, (ds,) = focal_op(s, *others, one_float(upstream), True, ctx.backend)
        return (*first_order("fgd_loss", total, (ds,)), None, None, None, None, None)


def focal(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor,
    *,
    temperature: float,
    attention_weight: Number,
    factor: float,
    backend: str,
) -> torch.Tensor:
    """factor (sum (s - t)^2 S_t C_t mask + attention_weight (|S_s - S_t|_1 + |C_s - C_t|_1)), the gradient to s in one pass.

    Args:
        student, teacher: (N, C, H, W); the teacher gets no gradient.
        mask: float32, N x H x W elements.
        temperature: of the attentions S over pixels and C over channels, which are softmaxes times their lengths.
        factor: what the loss is multiplied by before its gradient is rounded to the student's dtype.
        backend: a resolved one, not "reference".
    """
    arguments = teacher, mask, pack((temperature, factor)), pack((attention_weight,))
    wanted = learns(student)
    if wanted and student.dtype == HALF:
        return LateFocal.apply(student, *arguments, backend)
    total, grads = focal_op(student, *arguments, None, wanted, backend)
    return with_gradients("fgd_loss", backend, total, grads, (student,)) if wanted else total
