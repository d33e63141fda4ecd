"""Cases of the losses between feature maps for tests, bench and check."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from kdkernels.losses import attention, detection, feature_statistics, features, retrieval
from kdkernels.ops.registry import Case, Shape, Spec

F32, BF16 = torch.float32, torch.bfloat16
SHAPES: tuple[Shape, ...] = ((2, 3, 5, 7), (1, 1, 1, 1), (3, 9, 2, 2), (2, 130, 3, 11), (1, 5, 33, 40))
TOKENS: tuple[Shape, ...] = ((2, 5, 7), (1, 1, 1), (3, 4, 129), (2, 131, 6))
BENCH = {"cifar": (64, 64, 32, 32), "cifar, 256 channels": (64, 256, 8, 8), "imagenet": (64, 256, 14, 14),
         "imagenet, 512 channels": (256, 512, 7, 7), "detection": (2, 256, 100, 168)}  # fmt: skip
BENCH_GPU = {"imagenet, 64 channels": (256, 64, 56, 56), "imagenet": (256, 256, 14, 14),
             "imagenet, 512 channels": (256, 512, 7, 7), "detection": (2, 256, 100, 168)}  # fmt: skip
FPN = {"detection": (2, 256, 100, 168), "detection, third level": (2, 256, 25, 42)}
MAPS: tuple[Shape, ...] = ((2, 3, 5, 7), (3, 9, 2, 2), (1, 130, 3, 11), (2, 5, 33, 40))
VECTORS: tuple[Shape, ...] = ((5, 7), (3, 2), (2, 5, 130), (33, 1030))
BENCH_MAPS = {k: BENCH[k] for k in ("cifar", "detection")}
BENCH_VECTORS = {"embeddings": (8192, 1024), "hidden states": (2, 2048, 4096)}
BENCH_PYRAMID = {k: BENCH[k] for k in ("cifar", "cifar, 256 channels")}
SCORES: tuple[Shape, ...] = ((5, 7), (1, 2), (9, 130), (3, 1030))
BENCH_SCORES = {"imagenet": (256, 1000), "llm-32k": (256, 32000)}
BENCH_PASSAGES = {"64 passages": (512, 64)}
BENCH_CANDIDATES = {"objects": (512, 64)}
BENCH_DETECTIONS = {"detection": (2, 1000, 80)}
PAIR = ("student_features", "teacher_features")
STUDENT = PAIR[:1]
VECTOR_PAIR = ("student", "teacher")


def make_features(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape, generator=generator) for name in PAIR}


def make_channels_last(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        name: x.contiguous(memory_format=torch.channels_last) for name, x in make_features(shape, generator).items()
    }


def make_wider_teacher(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A teacher with more channels."""
    n, channels, *rest = shape
    wide = (n, channels * 3 // 2 + 1, *rest)
    return {"student_features": torch.randn(shape, generator=generator),
            "teacher_features": torch.randn(wide, generator=generator)}  # fmt: skip


def eager_hint(student_features: torch.Tensor, teacher_features: torch.Tensor, **_: Any) -> torch.Tensor:
    return F.mse_loss(student_features, teacher_features)


def eager_attention(student_features: torch.Tensor, teacher_features: torch.Tensor, **_: Any) -> torch.Tensor:
    """The authors' lines."""

    def at(x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))

    return (at(student_features) - at(teacher_features)).pow(2).mean()


def eager_channel_attention(student_features: torch.Tensor, teacher_features: torch.Tensor, **_: Any) -> torch.Tensor:
    def at(x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x.pow(2).mean((2, 3)))

    return (at(student_features) - at(teacher_features)).pow(2).mean()


def make_vectors(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape, generator=generator) for name in ("student", "teacher")}


def make_variances(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {**make_features(shape, generator), "raw_variance": torch.randn(shape[1], generator=generator)}


def make_boxes(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Maps, and up to 100 boxes an image: some padding, some beyond the edges."""
    n, _, height, width = shape
    count = 100 if height * width > 4000 else 3
    corners = torch.rand(n, count, 2, 2, generator=generator) * 1.2 - 0.1
    if count > 3:  # as large as objects are
        corners[:, :, 1] = corners[:, :, 0] + 0.15 * corners[:, :, 1].abs()
    low, high = corners.amin(2), corners.amax(2)
    boxes = torch.cat([low, high], 2) * torch.tensor([width, height, width, height])
    boxes[:, ::5] = -1.0
    boxes[:, ::5, 2:] = -2.0
    return {**make_features(shape, generator), "boxes": boxes}


def eager_fgd(
    student_features: torch.Tensor, teacher_features: torch.Tensor, boxes: torch.Tensor, **_: Any
) -> torch.Tensor:
    """The authors' lines without the global context."""
    s, t = student_features, teacher_features
    n, channels, height, width = s.shape

    def attention(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value = x.abs()
        of_pixels = height * width * F.softmax((value.mean(1) / 0.5).view(n, -1), 1).view(n, height, width)
        return of_pixels, channels * F.softmax(value.mean(2).mean(2) / 0.5, 1)

    pixels_t, channels_t = attention(t)
    pixels_s, channels_s = attention(s)
    front, back = torch.zeros_like(pixels_t), torch.ones_like(pixels_t)
    for i in range(n):
        for x1, y1, x2, y2 in boxes[i].tolist():
            if x2 < x1 or y2 < y1:
                continue
            left, top, right, low = math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)
            area = 1.0 / (low + 1 - top) / (right + 1 - left)
            where = (slice(max(top, 0), max(low + 1, 0)), slice(max(left, 0), max(right + 1, 0)))
            front[i][where] = front[i][where].clamp_min(area)
        back[i] = torch.where(front[i] > 0, 0, 1)
        if torch.sum(back[i]):
            back[i] /= torch.sum(back[i])

    def seen(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = torch.mul(x, torch.sqrt(pixels_t.unsqueeze(1)))
        x = torch.mul(x, torch.sqrt(channels_t[:, :, None, None]))
        return torch.mul(x, torch.sqrt(mask.unsqueeze(1)))

    focal = 1e-3 * F.mse_loss(seen(s, front), seen(t, front), reduction="sum") / n
    focal = focal + 5e-4 * F.mse_loss(seen(s, back), seen(t, back), reduction="sum") / n
    mask = ((channels_s - channels_t).abs().sum() + (pixels_s - pixels_t).abs().sum()) / n
    return focal + 1e-3 * mask


def eager_pearson(student_features: torch.Tensor, teacher_features: torch.Tensor, **_: Any) -> torch.Tensor:
    def norm(x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        x = x.permute(1, 0, 2, 3).reshape(c, -1)
        x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
        return x.reshape(c, n, h, w).permute(1, 0, 2, 3)

    return F.mse_loss(norm(student_features), norm(teacher_features)) / 2


def eager_variational(
    student_features: torch.Tensor, teacher_features: torch.Tensor, raw_variance: torch.Tensor, **_: Any
) -> torch.Tensor:
    variance = (torch.log(1.0 + torch.exp(raw_variance)) + 1e-5).view(1, -1, 1, 1)
    return torch.mean(0.5 * ((student_features - teacher_features) ** 2 / variance + torch.log(variance)))


def eager_cosine(student: torch.Tensor, teacher: torch.Tensor, **_: Any) -> torch.Tensor:
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def make_scores(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Scores and right classes, every seventh row left out."""
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    labels.view(-1)[3::7] = -100
    return {"logits": torch.randn(shape, generator=generator), "labels": labels}


def eager_margin(logits: torch.Tensor, labels: torch.Tensor, wrong: str = "all", **_: Any) -> torch.Tensor:
    kept = labels != -100
    x, y = logits[kept], labels[kept].unsqueeze(1)
    over = (1 + x - x.gather(1, y)).scatter(1, y, -torch.inf)
    each = over.amax(1).clamp_min(0) if wrong == "hardest" else over.clamp_min(0).sum(1) / max(x.shape[1] - 1, 1)
    return each.sum() / max(len(x), 1)


def make_passages(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Scores of one relevant passage a query, and of others."""
    names = ("student_positive", "student_negative", "teacher_positive", "teacher_negative")
    return {
        name: torch.randn((shape[0], 1) if "positive" in name else shape, generator=generator) for name in names
    }  # fmt: skip


def eager_margin_mse(
    student_positive: torch.Tensor, student_negative: torch.Tensor, teacher_positive: torch.Tensor,
    teacher_negative: torch.Tensor, **_: Any,
) -> torch.Tensor:  # fmt: skip
    return F.mse_loss(student_positive - student_negative, teacher_positive - teacher_negative)


def make_candidates(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Scores of up to K candidates of each object."""
    valid = torch.rand(shape, generator=generator) < 0.7
    valid[:, 0] = True
    return {"student_scores": torch.randn(shape, generator=generator),
            "teacher_scores": torch.randn(shape, generator=generator), "valid": valid}  # fmt: skip


def eager_ranks(
    student_scores: torch.Tensor, teacher_scores: torch.Tensor, valid: torch.Tensor, **_: Any
) -> torch.Tensor:
    s, t = (x.masked_fill(~valid, -torch.inf).log_softmax(1) for x in (student_scores, teacher_scores))
    return (t.exp() * (t - s).masked_fill(~valid, 0.0)).sum() / len(s)


def make_detections(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Images with class scores, boxes, and one level of features three channels for each class."""
    n, count, classes = shape
    made = {f"{side}_scores": torch.randn(shape, generator=generator) for side in ("student", "teacher")}
    for side in ("student", "teacher"):
        corners = torch.rand(n, count, 2, 2, generator=generator)
        made[f"{side}_boxes"] = torch.cat([corners.amin(2), corners.amax(2)], 2)
    for side in ("student", "teacher"):
        made[f"{side}_features"] = torch.randn(n, 3 * classes, 25, 42, generator=generator)
    made["valid"] = torch.rand(n, count, generator=generator) < 0.6
    made["valid"][:, 0] = True
    return made


def eager_detections(
    student_scores: torch.Tensor, teacher_scores: torch.Tensor, student_boxes: torch.Tensor, teacher_boxes: torch.Tensor,
    student_features: torch.Tensor, teacher_features: torch.Tensor, valid: torch.Tensor, **_: Any,
) -> torch.Tensor:  # fmt: skip
    count = valid.sum()
    kl = F.kl_div(student_scores.log_softmax(-1), teacher_scores.softmax(-1), reduction="none").sum(-1)
    boxes = F.smooth_l1_loss(student_boxes, teacher_boxes, reduction="none").sum(-1)
    return (kl[valid].sum() + boxes[valid].sum()) / count + F.mse_loss(student_features, teacher_features)


def eager_context(student_features: torch.Tensor, teacher_features: torch.Tensor, **_: Any) -> torch.Tensor:
    """ReviewKD's lines."""
    s, t = student_features, teacher_features
    loss, weight, weights = F.mse_loss(s, t), 1.0, 1.0
    for size in (4, 2, 1):
        if size >= s.shape[2]:
            continue
        weight /= 2.0
        loss = loss + weight * F.mse_loss(F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size))
        weights += weight
    return loss / weights


def floor_of_detections(shape: Shape, itemsize: int, backward: bool) -> int:
    """Read both models' scores, boxes and maps, write the student's gradients."""
    n, count, classes = shape
    return n * (count * (classes + 4) + 3 * classes * 25 * 42) * itemsize * (3 if backward else 2)


def floor_of_scores(shape: Shape, itemsize: int, backward: bool) -> int:
    """Read the scores, write their gradient."""
    return math.prod(shape) * itemsize * (2 if backward else 1)


def floor_bytes(shape: Shape, itemsize: int, backward: bool) -> int:
    """Read both maps, write the student's gradient."""
    return math.prod(shape) * itemsize * (3 if backward else 2)


def _case(
    name: str, function: Callable[..., torch.Tensor], eager: Any = None, make: Any = make_features,
    shapes: tuple[Shape, ...] = SHAPES, bench: Any = None, bench_gpu: Any = None, grads: tuple[str, ...] = PAIR,
    floor: Any = None, **options: Any,
) -> Case:  # fmt: skip
    return Case(
        name, function, make, options, eager, grads=grads, shapes=shapes, bench=bench or {}, bench_gpu=bench_gpu or {},
        floor_bytes=floor or floor_bytes, bench_dtypes=(F32, BF16), headline=bench is BENCH or bench is FPN,
    )  # fmt: skip


SPEC = Spec(
    family="weighted_match",
    backends=("reference", "cpu", "triton"),
    cases=(
        _case("hint", features.hint_loss, eager_hint, bench=BENCH, bench_gpu=BENCH_GPU),
        _case("hint-channels-last", features.hint_loss, make=make_channels_last),
        _case("hint-absolute", features.hint_loss, measure="absolute", reduction="sum"),
        _case("hint-smooth-l1", features.hint_loss, shapes=TOKENS, measure="smooth_l1", beta=0.5, dim=-1),
        _case("hint-normalized", features.hint_loss, shapes=(SHAPES[0], *SHAPES[2:]), normalize=True, reduction="batchmean"),
        _case("attention_transfer", attention.attention_transfer_loss, eager_attention, bench=BENCH, bench_gpu=BENCH_GPU),
        _case("attention_transfer-channels-last", attention.attention_transfer_loss, make=make_channels_last),
        _case("attention_transfer-p1", attention.attention_transfer_loss, make=make_wider_teacher, p=1.0, distance="norm"),
        _case("attention_transfer-p3", attention.attention_transfer_loss, p=3.0, signed=True),
        _case("attention_transfer-p4", attention.attention_transfer_loss, shapes=TOKENS, p=4.0, dim=-1, channels="sum",
              eps=1e-6, add_eps=True),
        _case("attention_transfer-p1.5", attention.attention_transfer_loss, p=1.5),
        _case("channel_attention_transfer", attention.channel_attention_transfer_loss, eager_channel_attention,
              bench=BENCH_MAPS, bench_gpu=BENCH_MAPS),
        _case("fgd", detection.fgd_loss, eager_fgd, make_boxes, MAPS, FPN, FPN, STUDENT),
        _case("fgd-image-size", detection.fgd_loss, None, make_boxes, MAPS[:2], grads=STUDENT, image_size=(9, 11),
              temperature=1.0, foreground_weight=2e-3),
        _case("variational_information", feature_statistics.variational_information_loss, eager_variational,
              make_variances, MAPS, BENCH_MAPS, BENCH_GPU, (*PAIR, "raw_variance")),
        _case("pearson_feature", feature_statistics.pearson_feature_loss, eager_pearson, make_features, MAPS, BENCH_MAPS,
              BENCH_GPU),
        _case("pearson_feature-channels-last", feature_statistics.pearson_feature_loss, None, make_channels_last, MAPS),
        _case("hierarchical_context", feature_statistics.hierarchical_context_loss, eager_context, make_features,
              ((2, 3, 5, 7), (1, 4, 8, 8), (2, 3, 3, 3)), BENCH_PYRAMID, BENCH_PYRAMID),
        _case("cosine", retrieval.cosine_loss, eager_cosine, make_vectors, VECTORS, BENCH_VECTORS, BENCH_VECTORS,
              VECTOR_PAIR),
        _case("margin_ranking", retrieval.margin_ranking_loss, eager_margin, make_scores, SCORES, BENCH_SCORES, BENCH_SCORES,
              ("logits",), floor_of_scores),
        _case("margin_ranking-hardest", retrieval.margin_ranking_loss, eager_margin, make_scores, SCORES, BENCH_SCORES,
              BENCH_SCORES, ("logits",), floor_of_scores, wrong="hardest"),
        _case("margin_mse", retrieval.margin_mse_loss, eager_margin_mse, make_passages, ((5, 7), (3, 1), (33, 130)), BENCH_PASSAGES,
              BENCH_PASSAGES, ("student_positive", "student_negative", "teacher_positive", "teacher_negative")),
        _case("rank_mimicking", detection.rank_mimicking_loss, eager_ranks, make_candidates, SCORES, BENCH_CANDIDATES,
              BENCH_CANDIDATES, ("student_scores", "teacher_scores")),
        _case("detection_distillation", detection.detection_distillation_loss, eager_detections, make_detections, ((2, 3, 4), (1, 5, 1)),
              BENCH_DETECTIONS, BENCH_DETECTIONS, ("student_scores", "student_boxes", "student_features"), floor_of_detections),
        _case("cosine-maps", retrieval.cosine_loss, None, make_vectors, MAPS, grads=VECTOR_PAIR, dim=1,
              reduction="none"),
    ),
)  # fmt: skip
