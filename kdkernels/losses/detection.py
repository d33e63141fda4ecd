"""Losses for detectors: focal and global features, class scores, boxes, and the rank of candidates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from kdkernels import backends, checks
from kdkernels.features.capture import unwrapped
from kdkernels.losses.boxes import Boxes, giou, map_scale, padded_boxes
from kdkernels.losses.features import SUPPORTED, adapted, as_wide, checked, hint_loss
from kdkernels.losses.module import LossModule
from kdkernels.ops.library import learns
from kdkernels.ops.row_divergence.kinds import Kind
from kdkernels.ops.row_divergence.op import row_divergence
from kdkernels.ops.scalars import Number, factor
from kdkernels.ops.weighted_match import focal, op, reference, sums
from kdkernels.typed import typed


class GlobalContext(nn.Module):
    """FGD's GcBlock for both models: what a global context adds to each channel of either map.

    A softmax over the pixels of a 1x1 convolution to one channel pools the map; two 1x1 convolutions with layer
    normalisation and ReLU between them turn it into the addition. Learned with the student.

    Args:
        channels: of the teacher, and of the student after its adapter.
    """

    @typed
    def __init__(self, channels: int):
        super().__init__()
        checks.integer("channels", channels, low=1)
        middle = max(channels // 2, 1)
        for side in ("student", "teacher"):
            # Its bias would drop out of the softmax.
            mask, last = nn.Conv2d(channels, 1, 1, bias=False), nn.Conv2d(middle, channels, 1)
            nn.init.kaiming_normal_(mask.weight, mode="fan_in")
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
            add = nn.Sequential(nn.Conv2d(channels, middle, 1), nn.LayerNorm([middle, 1, 1]), nn.ReLU(), last)
            setattr(self, f"{side}_mask", mask)
            setattr(self, f"{side}_add", add)

    def forward(self, side: str, features: torch.Tensor, backend: str = "reference") -> torch.Tensor:
        """The additions (N, C) to a map (N, C, H, W) of the "student" or the "teacher", in float32."""
        mask, add = getattr(self, f"{side}_mask"), getattr(self, f"{side}_add")
        if features.shape[1] != mask.weight.shape[1]:
            raise ValueError(
                f"global_context is for {mask.weight.shape[1]} channels; got shape {tuple(features.shape)}"
            )
        weight = mask.weight.reshape(1, -1).expand(features.shape[0], -1)
        _, scores = sums.power_sums(features, 1.0, signed=True, pixels=True, channel_weight=weight, backend=backend)
        assert scores is not None
        context, _ = sums.power_sums(
            features, 1.0, signed=True, channels=True, pixel_weight=scores.softmax(1), backend=backend
        )
        assert context is not None
        return add(context[:, :, None, None].to(weight.dtype)).flatten(1)


def _attention(x: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """FGD's attention over pixels, (N, P), and over channels, (N, C): softmaxes times their lengths. In plain torch."""
    of_channels, of_pixels = sums.power_sums(x, 1.0, channels=True, pixels=True, backend="reference")
    assert of_channels is not None
    assert of_pixels is not None
    channels, pixels = of_channels.shape[1], of_pixels.shape[1]
    return (
        pixels * (of_pixels / (channels * temperature)).softmax(1),
        channels * (of_channels / (pixels * temperature)).softmax(1),
    )


def fgd_loss(
    student_features: torch.Tensor,
    teacher_features: torch.Tensor,
    boxes: Boxes,
    *,
    image_size: torch.Tensor | Sequence[int] | None = None,
    adapter: nn.Module | None = None,
    global_context: GlobalContext | None = None,
    temperature: float = 0.5,
    foreground_weight: Number = 1e-3,
    background_weight: Number = 5e-4,
    attention_weight: Number = 1e-3,
    global_weight: Number = 5e-6,
    backend: str = "auto",
) -> torch.Tensor:
    """Focal and global distillation (FGD) of one level of a detector's features.

    Yang et al. (2022, arXiv:2111.11837). With the attentions S = HW softmax(mean_C |x| / T) over pixels and
    C = C softmax(mean_HW |x| / T) over channels, masks M of the boxes' foreground (each box 1 over its area) and of the
    background (1 over its area), and the additions g of the global context:

        sum (s - t)^2 S_t C_t (w_f M_f + w_b M_b) / N  +  w_a (|S_s - S_t|_1 + |C_s - C_t|_1) / N
            + w_g sum (s + g_s - t - g_t)^2 / N

    Args:
        student_features: (N, C, H, W), float16, bfloat16, float32 or float64.
        teacher_features: the same shape (after the adapter) on the same device; the dtype may differ. It is taken as
            constant.
        boxes: each image's boxes x1, y1, x2, y2: a list of N tensors (m, 4), or one (N, M, 4) in which a row with
            x2 < x1 or y2 < y1 is padding. None at all is fine; what lies outside the image is clipped. On a GPU, where
            nobody can look without waiting, a row of a list with such sides, or NaN, is left out too.
        image_size: (height, width) of what the boxes' coordinates are in, or one for each image, (N, 2); by default
            they are in the map's.
        adapter: a module that the student's features go through first, for example Adapter(C_s, C_t).
        global_context: a GlobalContext(C); without it that term is left out.
        temperature: T, a positive number.
        foreground_weight, background_weight, attention_weight, global_weight: w_f, w_b, w_a and w_g.
        backend: "auto", "triton", "cpu" or "reference".

    The weights are constants. With a global_context a student's map in half precision is copied to float32 for its gradient,
    so that the terms' gradients add up before they are rounded.

    Returns:
        A float32 scalar (float64 for float64 inputs), 0 for an empty batch. Where boxes cover the whole map the
        background is 0.

    Raises:
        ValueError: shapes that differ (for channels the message names the adapter), differing devices, features that are
            not (N, C, H, W), boxes of another shape or number, temperature not positive; on a CPU also boxes of NaN, and
            in a list those with x2 < x1 or y2 < y1.
        TypeError: features that are not floating point, a temperature that is a tensor.
        BackendError: the backend asked for cannot run here.

    Against others: these are the authors' weights for one-stage detectors (twice or more for others). Their code loops
    over boxes on the host, and counts a negative corner from the map's other end.
    """
    for name, value in (
        ("foreground_weight", foreground_weight), ("background_weight", background_weight),
        ("attention_weight", attention_weight), ("global_weight", global_weight),
    ):  # fmt: skip
        checks.number(name, value, like=student_features)
    checks.plain_number("temperature", temperature, low=0, open_low=True)
    checks.float_tensor("teacher_features", teacher_features)
    if global_context is not None and not isinstance(unwrapped(global_context), GlobalContext):
        raise TypeError(f"global_context must be a GlobalContext, got {type(global_context).__name__}")
    s, t = adapted(adapter, student_features), teacher_features.detach()
    checked(s, t, 1)
    if s.dim() != 4:
        raise ValueError(f"student_features must be (N, C, H, W), got shape {tuple(s.shape)}")
    backend = backends.resolve("fgd_loss", (s, t), backend, SUPPORTED)
    if backend == "reference" or (global_context is not None and learns(s)):
        (s,) = as_wide(s)  # several terms' gradients meet in it, and are rounded once
    batch, size = s.shape[0], (s.shape[2], s.shape[3])
    drawn = padded_boxes(boxes, batch, s.device, torch.promote_types(s.dtype, torch.float32))
    scale = map_scale(image_size, size, batch, s.device)
    share = 1.0 / max(batch, 1)
    if backend != "reference":
        mask = focal.box_masks(drawn, scale, size, foreground_weight, background_weight, backend)
        loss = focal.focal(
            s, t, mask, temperature=temperature, attention_weight=attention_weight, factor=share, backend=backend
        )
    else:
        pixels_s, channels_s = _attention(s, temperature)
        pixels_t, channels_t = _attention(t, temperature)
        front, back = reference.box_masks(drawn, size, scale)
        pixels = pixels_t * (foreground_weight * front + background_weight * back).flatten(1)
        loss = op.match(s, t, channel_weight=channels_t, pixel_weight=pixels, factor=share, backend=backend)
        apart = (pixels_s - pixels_t).abs().sum(1) + (channels_s - channels_t).abs().sum(1)
        loss = loss + factor(attention_weight) * share * apart.sum()
    if global_context is not None:
        added = global_context("student", s, backend) - global_context("teacher", t, backend)
        weight, outer = (
            (global_weight, 1.0) if not isinstance(global_weight, torch.Tensor) else (1.0, factor(global_weight))
        )
        loss = loss + outer * op.match(s, t, channel_offset=added, factor=weight * share, backend=backend)
    return loss


def detection_distillation_loss(
    student_scores: torch.Tensor | Sequence[torch.Tensor],
    teacher_scores: torch.Tensor | Sequence[torch.Tensor],
    student_boxes: Boxes | None = None,
    teacher_boxes: Boxes | None = None,
    student_features: torch.Tensor | Sequence[torch.Tensor] = (),
    teacher_features: torch.Tensor | Sequence[torch.Tensor] = (),
    *,
    valid: torch.Tensor | None = None,
    class_weight: Number = 1.0,
    box_weight: Number = 1.0,
    feature_weight: Number = 1.0,
    box_loss: str = "smooth_l1",
    beta: float = 1.0,
    temperature: Number = 1.0,
    adapters: Sequence[nn.Module | None] = (),
    backend: str = "auto",
) -> torch.Tensor:
    """Distillation of a detector's answers: class scores, boxes and features of matched detections.

    After Chen et al. (2017, NeurIPS), whose three parts it has:

    class_weight T^2 KL(teacher, student) over the detections + box_weight (smooth-L1 of the four coordinates, or
    1 - GIoU) over them + feature_weight times the mean squared difference of each pair of maps. Detections of both models
    are matched: the same anchor, query or proposal at the same place; any number of them an image.

    Args:
        student_scores: class logits, (N, M, V), or a list of N tensors (m, V) with their own m.
        teacher_scores: the same shapes.
        student_boxes, teacher_boxes: x1, y1, x2, y2 (or any four numbers with smooth-L1), (N, M, 4) or lists of (m, 4).
        student_features, teacher_features: a map, or maps of as many levels, pair by pair as hint_loss takes them.
        valid: which detections count, or a weight for each, (N, M); not with lists, whose detections all count.
        class_weight, box_weight, feature_weight: numbers or tensors with one element.
        box_loss: "smooth_l1", summed over the coordinates, or "giou".
        beta: where smooth-L1 turns linear, a positive number.
        temperature: of the class scores.
        adapters: one for each level's student features, or None.
        backend: "auto", "cuda", "triton", "cpu" or "reference". Boxes are four numbers each, and plain torch.

    Returns:
        A float32 scalar (float64 for float64 inputs). The class and box terms are means over the valid detections of the
        whole batch, 0 where there are none.

    Raises:
        ValueError: shapes or numbers of detections that differ, an unknown box_loss, a different number of levels.
        TypeError, BackendError: as kl_div and hint_loss.
    """
    checks.choice("box_loss", box_loss, ("smooth_l1", "giou"))
    checks.plain_number("beta", beta, low=0, open_low=True)
    scores_s, scores_t = _joined("scores", student_scores, teacher_scores)
    for name, value in (("class_weight", class_weight), ("box_weight", box_weight), ("feature_weight", feature_weight)):
        checks.number(name, value, like=scores_s)
    if valid is not None:
        if not isinstance(student_scores, torch.Tensor):
            raise ValueError("valid goes with scores (N, M, V); of lists every detection counts")
        valid = checks.per_row("valid", valid, tuple(student_scores.shape[:-1]), student_scores.device)
        assert valid is not None
    boxes = _matched_boxes(student_boxes, teacher_boxes, scores_s)
    levels = _levels(student_features, teacher_features, adapters)
    # Nothing was launched until here; what is left to check is kl_div's.
    if scores_s.shape[0]:
        loss = factor(class_weight) * row_divergence(
            "detection_distillation_loss", Kind.FORWARD_KL, scores_s, scores_t, temperature=temperature,
            weight=None if valid is None else valid.reshape(-1), backend=backend, what="scores",
        )  # fmt: skip
    else:
        checks.number("temperature", temperature, low=0, open_low=True, learnable=True, like=scores_s)
        loss = scores_s.sum() * 0.0
    if boxes is not None:
        each = (
            F.smooth_l1_loss(*boxes, beta=beta, reduction="none").sum(1)
            if box_loss == "smooth_l1"
            else 1 - giou(*boxes)
        )
        if valid is None:
            mean = sums.ordered_sum(each) / max(each.shape[0], 1)
        else:
            keep = valid.reshape(-1).to(each)
            count = sums.ordered_sum(keep)
            mean = sums.ordered_sum(each.where(keep != 0, 0.0) * keep) / count.where(count > 0, 1.0)
        loss = loss + factor(box_weight) * mean
    for s, t in levels:
        loss = loss + factor(feature_weight) * hint_loss(
            s, t, backend=backend if backend in ("auto", *SUPPORTED) else "auto"
        )
    return loss


def _matched_boxes(
    student: Boxes | None, teacher: Boxes | None, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Boxes of all detections, (detections, 4), at least float32."""
    if (student is None) != (teacher is None):
        raise ValueError("student_boxes and teacher_boxes go together")
    if student is None or teacher is None:
        return None
    s, t = _joined("boxes", student, teacher)
    if s.device != scores.device:
        raise ValueError(f"student_boxes must be on {scores.device} with the scores, got {s.device}")
    if s.shape != (scores.shape[0], 4):
        raise ValueError(
            f"student_boxes must be four coordinates for each of {scores.shape[0]} detections, got {tuple(s.shape)}"
        )
    wide = torch.promote_types(torch.promote_types(s.dtype, t.dtype), torch.float32)
    return s.to(wide), t.to(wide)


def _levels(
    student: torch.Tensor | Sequence[torch.Tensor], teacher: torch.Tensor | Sequence[torch.Tensor],
    adapters: Sequence[nn.Module | None],
) -> list[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Pairs of maps, the student's adapted."""
    students, teachers = checks.tensors("student_features", student), checks.tensors("teacher_features", teacher)
    if len(students) != len(teachers):
        raise ValueError(
            f"there must be as many levels: student_features has {len(students)} and teacher_features {len(teachers)}"
        )
    if not isinstance(adapters, (list, tuple, nn.ModuleList)):
        raise TypeError(f"adapters must be a sequence of modules, got {type(adapters).__name__}")
    if len(adapters) not in (0, len(students)):
        raise ValueError(f"adapters must be one for each of {len(students)} levels, or none; got {len(adapters)}")
    pairs = []
    for i, (s, t) in enumerate(zip(students, teachers)):
        if len(adapters):
            s = adapted(adapters[i], s, f"adapters[{i}]")
        checked(s, t, 1)
        pairs.append((s, t))
    return pairs


def _joined(
    what: str, student: torch.Tensor | Sequence[torch.Tensor], teacher: torch.Tensor | Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """All images' detections below each other."""
    joined = []
    for name, x in ((f"student_{what}", student), (f"teacher_{what}", teacher)):
        for one in checks.tensors(name, x):
            checks.float_tensor(name, one)
        if isinstance(x, torch.Tensor):
            if x.dim() != 3:
                raise ValueError(f"{name} must be (N, M, ...) or a list of (m, ...), got shape {tuple(x.shape)}")
            joined.append(x.flatten(0, 1))
        else:
            for i, one in enumerate(x):
                if not isinstance(one, torch.Tensor) or one.dim() != 2:
                    raise ValueError(f"{name}[{i}] must be a tensor (m, ...)")
            joined.append(torch.cat(list(x)) if len(x) else torch.zeros(0, 1))
    s, t = joined
    if isinstance(student, torch.Tensor) != isinstance(teacher, torch.Tensor) or s.shape != t.shape:
        raise ValueError(
            f"detections must match: student_{what} has {tuple(s.shape)} in all and teacher_{what} {tuple(t.shape)}"
        )
    if s.device != t.device:
        raise ValueError(f"student_{what} and teacher_{what} must be on one device: {s.device} and {t.device}")
    if not isinstance(student, torch.Tensor) and [x.shape for x in student] != [x.shape for x in teacher]:
        raise ValueError(f"student_{what} and teacher_{what} must have as many detections in each image")
    return s, t


def rank_mimicking_loss(
    student_scores: torch.Tensor,
    teacher_scores: torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    temperature: Number = 1.0,
    scale_by_t2: bool = False,
    reduction: str = "rowmean",
    num_items: Number | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Rank mimicking: the KL between both models' softmaxes over the candidates of each object.

    Li et al. (2022, arXiv:2112.04840): which of an object's positive anchors scores how high beside the others, as
    a distribution over those anchors.

    Args:
        student_scores: scores of the candidates, (G, K) for G objects, float16, bfloat16, float32 or float64.
        teacher_scores: the same shape on the same device; the dtype may differ.
        valid: which candidates there are, boolean (G, K); objects with none are left out.
        temperature, scale_by_t2, reduction, num_items, backend: as kl_div; "rowmean" divides by the objects that have
            candidates.

    Returns:
        A float32 scalar (float64 for float64 inputs); 0 without any object.

    Raises:
        ValueError, TypeError, BackendError: as kl_div.
    """
    weight = None
    checks.scores("student_scores", student_scores, "teacher_scores", teacher_scores, -1)
    if valid is not None:
        if not isinstance(valid, torch.Tensor):
            raise TypeError(f"valid must be a tensor, got {type(valid).__name__}")
        checks.dense("valid", valid)
        checks.same_device(student_scores=student_scores, valid=valid)
        if valid.shape != student_scores.shape or valid.dtype != torch.bool:
            raise ValueError(
                f"valid must be boolean and have the scores' shape {tuple(student_scores.shape)}; got {valid.dtype} "
                f"{tuple(valid.shape)}"
            )
        weight = valid.any(1)
        absent = ~valid & weight.unsqueeze(1)  # an object without candidates is left out as a row, and stays finite
        student_scores = student_scores.masked_fill(absent, -torch.inf)
        teacher_scores = teacher_scores.masked_fill(absent, -torch.inf)
    return row_divergence(
        "rank_mimicking_loss", Kind.FORWARD_KL, student_scores, teacher_scores, temperature=temperature,
        scale_by_t2=scale_by_t2, reduction=reduction, weight=weight, num_items=num_items, backend=backend, what="scores",
    )  # fmt: skip


class FGDLoss(LossModule):
    """`fgd_loss` as a module: its keyword arguments are the options. Adapter and global context are trained with it."""

    function = staticmethod(fgd_loss)


class DetectionDistillationLoss(LossModule):
    """`detection_distillation_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(detection_distillation_loss)


class RankMimickingLoss(LossModule):
    """`rank_mimicking_loss` as a module: its keyword arguments are the options."""

    function = staticmethod(rank_mimicking_loss)
