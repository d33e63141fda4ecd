"""Cases of the row-divergence losses for tests, bench and check."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from kdkernels.losses import divergences, logits, structured
from kdkernels.ops.registry import Case, Shape, Spec

SHAPES: tuple[Shape, ...] = ((1, 1), (3, 2), (5, 7), (4, 100), (7, 1000), (3, 1025), (2, 3, 130), (2, 4099))
# Up to 256 rows plain PyTorch's temporaries stay in memory that the allocator has at hand; a training step's 2048 do not.
BATCH = {"llm-32k, 2048 tokens": (2048, 32000)}
BENCH = {"cifar": (64, 100), "imagenet": (256, 1000), "llm-32k": (256, 32000), **BATCH, "llm-128k": (64, 128256)}
BENCH_GPU = {"llm-32k": (8192, 32000), "llm-128k": (8192, 128256), "llm-152k": (4096, 151936), "cifar": (64, 100)}


def make_scores(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Logits with the spread of trained models, class axis last."""
    return {
        "student_logits": 3 * torch.randn(shape, generator=generator),
        "teacher_logits": 3 * torch.randn(shape, generator=generator),
    }


def make_labelled(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The same with labels, about a quarter of them ignored (never all)."""
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    ignored = torch.rand(shape[:-1], generator=generator) < 0.25
    ignored.view(-1)[0] = False
    return {**make_scores(shape, generator), "labels": labels.masked_fill(ignored, -100)}


def make_weighted(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {**make_scores(shape, generator), "weight": torch.rand(shape[:-1], generator=generator)}


def make_class_weighted(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {**make_labelled(shape, generator), "class_weight": 0.5 + torch.rand(shape[-1], generator=generator)}


def eager_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, **_: Any
) -> torch.Tensor:
    log_p = F.log_softmax(student_logits.flatten(0, -2) / temperature, dim=-1)
    target = F.softmax(teacher_logits.flatten(0, -2) / temperature, dim=-1)
    return F.kl_div(log_p, target, reduction="batchmean") * temperature**2


def eager_distillation(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor, temperature: float = 4.0,
    alpha: float = 0.9, **_: Any,
) -> torch.Tensor:  # fmt: skip
    hard = F.cross_entropy(student_logits.flatten(0, -2), labels.flatten())
    kept = (labels != -100).flatten().to(student_logits.dtype)
    log_p = F.log_softmax(student_logits.flatten(0, -2) / temperature, dim=-1)
    target = F.softmax(teacher_logits.flatten(0, -2) / temperature, dim=-1)
    rows = F.kl_div(log_p, target, reduction="none").sum(-1)
    return (1 - alpha) * hard + alpha * temperature**2 * (rows * kept).sum() / kept.sum()


def floor_bytes(shape: Shape, itemsize: int, backward: bool) -> int:
    """Read student and teacher; write the student's gradient."""
    return (3 if backward else 2) * torch.Size(shape).numel() * itemsize


def eager_reverse_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, **_: Any
) -> torch.Tensor:
    return eager_kl(teacher_logits, student_logits, temperature)


def eager_js(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, beta: float = 0.5, **_: Any
) -> torch.Tensor:
    """As TRL and Liger's users write it."""
    log_s = F.log_softmax(student_logits.flatten(0, -2) / temperature, dim=-1)
    log_t = F.log_softmax(teacher_logits.flatten(0, -2) / temperature, dim=-1)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log(1 - beta))
    to_teacher = F.kl_div(log_m, log_t, reduction="batchmean", log_target=True)
    to_student = F.kl_div(log_m, log_s, reduction="batchmean", log_target=True)
    return (beta * to_teacher + (1 - beta) * to_student) * temperature**2


def eager_skew(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, skew: float = 0.1, **_: Any
) -> torch.Tensor:
    p, q = F.softmax(student_logits / temperature, dim=-1), F.softmax(teacher_logits / temperature, dim=-1)
    mixture = skew * q + (1 - skew) * p
    return F.kl_div(mixture.log(), q, reduction="batchmean") * temperature**2


def eager_symmetric(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, ratio: float = 0.5, **_: Any
) -> torch.Tensor:
    forward = eager_kl(student_logits, teacher_logits, temperature)
    return ratio * forward + (1 - ratio) * eager_kl(teacher_logits, student_logits, temperature)


def eager_skew_reverse(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, skew: float = 0.1, **_: Any
) -> torch.Tensor:
    return eager_skew(teacher_logits, student_logits, temperature, skew)


def eager_alpha_beta(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, alpha: float = 0.5,
    beta: float = 0.5, **_: Any,
) -> torch.Tensor:  # fmt: skip
    """Powers of probabilities, as ABKD's formula reads; away from its limits."""
    p, q = F.softmax(student_logits / temperature, dim=-1), F.softmax(teacher_logits / temperature, dim=-1)
    both = alpha + beta
    ends = (alpha * q**both + beta * p**both) / both
    return ((ends - q**alpha * p**beta) / (alpha * beta)).sum(-1).mean() * temperature**2


def eager_soft_cross_entropy(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, **_: Any
) -> torch.Tensor:
    target = F.softmax(teacher_logits.flatten(0, -2) / temperature, dim=-1)
    return F.cross_entropy(student_logits.flatten(0, -2) / temperature, target) * temperature**2


def eager_lwf(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 2.0,
    uniform: float = 1e-5,
    **_: Any,
) -> torch.Tensor:
    """As continual-learning code has it: softmax, a little uniform mass, normalised anew."""
    p, q = F.softmax(student_logits / temperature, dim=-1), F.softmax(teacher_logits / temperature, dim=-1)
    p = p + uniform / p.shape[-1]
    p = p / p.sum(-1, keepdim=True)
    return -(q * p.log()).sum(-1).mean()


def eager_tv(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, **_: Any
) -> torch.Tensor:
    p, q = F.softmax(student_logits / temperature, dim=-1), F.softmax(teacher_logits / temperature, dim=-1)
    return 0.5 * (p - q).abs().sum(-1).mean() * temperature**2


def eager_decoupled(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor, temperature: float = 4.0,
    alpha: float = 1.0, beta: float = 8.0, **_: Any,
) -> torch.Tensor:  # fmt: skip
    """mdistiller's way: probabilities, masks and a logit of -1000 for the label."""
    s, t = student_logits / temperature, teacher_logits / temperature
    mask = F.one_hot(labels, s.shape[-1]).bool()
    p, q = F.softmax(s, dim=-1), F.softmax(t, dim=-1)
    p = torch.stack(((p * mask).sum(-1), (p * ~mask).sum(-1)), -1)
    q = torch.stack(((q * mask).sum(-1), (q * ~mask).sum(-1)), -1)
    target = F.kl_div(p.log(), q, reduction="batchmean")
    rest = F.kl_div(F.log_softmax(s - 1000.0 * mask, -1), F.softmax(t - 1000.0 * mask, -1), reduction="batchmean")
    return (alpha * target + beta * rest) * temperature**2


def make_all_labelled(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {**make_scores(shape, generator), "labels": torch.randint(0, shape[-1], shape[:-1], generator=generator)}


def make_maps(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    scores = make_scores(shape, generator)
    return {"student_features": scores["student_logits"], "teacher_features": scores["teacher_logits"]}


def make_heads(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """(M, N, V): M heads over one teacher."""
    return {
        "head_logits": 3 * torch.randn(shape, generator=generator),
        "teacher_logits": 3 * torch.randn(shape[1:], generator=generator),
        "labels": torch.randint(0, shape[-1], shape[1:-1], generator=generator),
    }


def eager_channel_wise(
    student_features: torch.Tensor, teacher_features: torch.Tensor, temperature: float = 4.0, **_: Any
) -> torch.Tensor:
    s, t = student_features.flatten(2).flatten(0, 1), teacher_features.flatten(2).flatten(0, 1)
    return eager_kl(s, t, temperature)


def eager_pixel_wise(student_logits: torch.Tensor, teacher_logits: torch.Tensor, **_: Any) -> torch.Tensor:
    rows = F.kl_div(F.log_softmax(student_logits, 1), F.softmax(teacher_logits, 1), reduction="none").sum(1)
    return rows.mean()


def eager_heads(
    head_logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor, temperature: float = 3.0,
    alpha: float = 0.1, **_: Any,
) -> torch.Tensor:  # fmt: skip
    target = F.softmax(teacher_logits.detach() / temperature, dim=-1)
    loss = torch.zeros((), device=head_logits.device)
    for head in head_logits:
        soft = -(target * F.log_softmax(head / temperature, dim=-1)).sum(-1).mean()
        loss = loss + (1 - alpha) * F.cross_entropy(head, labels) + alpha * temperature**2 * soft
    return loss


def _case(
    name: str, function: Any, make: Any = make_scores, eager: Any = None, bench: bool = False, **options: Any
) -> Case:
    return Case(
        name, function, make, options, eager, shapes=SHAPES,
        bench=BENCH if bench else {}, bench_gpu=BENCH_GPU if bench else {},
        floor_bytes=floor_bytes, bench_dtypes=(torch.float32, torch.bfloat16), headline=bench,
    )  # fmt: skip


IMAGENET = {"imagenet": (256, 1000)}
LLM = {"imagenet": (256, 1000), "llm-32k": (256, 32000)}


def _divergence(
    name: str, function: Any, eager: Any = None, make: Any = make_scores, bench: Mapping[str, Shape] | None = None,
    shapes: tuple[Shape, ...] = SHAPES, grads: tuple[str, ...] = ("student_logits", "teacher_logits"), **options: Any,
) -> Case:  # fmt: skip
    bench = bench or {}
    return Case(
        name, function, make, options, eager, grads=grads, shapes=shapes, bench=bench,
        bench_gpu=BENCH_GPU if "llm-32k" in bench else bench, floor_bytes=floor_bytes,
        bench_dtypes=(torch.float32, torch.bfloat16) if "llm-32k" in bench else (torch.float32,), headline=bool(bench),
    )  # fmt: skip


def floor_bytes_heads(shape: Shape, itemsize: int, backward: bool) -> int:
    """Read M heads and one teacher; write M gradients."""
    one = torch.Size(shape[1:]).numel()
    return ((2 if backward else 1) * shape[0] + 1) * one * itemsize


MAPS: tuple[Shape, ...] = ((1, 1, 1), (2, 3, 7), (2, 5, 4, 5), (1, 2, 33, 31))
PIXELS: tuple[Shape, ...] = ((1, 1, 1), (2, 3, 5), (2, 19, 7, 6), (1, 150, 3, 11))
HEADS: tuple[Shape, ...] = ((1, 2, 3), (3, 5, 7), (2, 3, 100))

DIVERGENCES = (
    _divergence("reverse_kl_div", divergences.reverse_kl_div, eager_reverse_kl, bench=IMAGENET, temperature=2.0),
    _divergence("symmetric_kl_div", divergences.symmetric_kl_div, eager_symmetric, bench=IMAGENET, temperature=2.0, ratio=0.3),
    _divergence("js_div", divergences.js_div, eager_js, bench={**LLM, **BATCH}, temperature=2.0),
    _divergence("generalized_js_div", divergences.generalized_js_div, eager_js, bench=LLM, temperature=1.0, beta=0.1),
    _divergence("generalized_js_div-labels", divergences.generalized_js_div, make=make_labelled, beta=0.9),
    _divergence("generalized_js_div-0", divergences.generalized_js_div, temperature=2.0, beta=0.0),
    _divergence("generalized_js_div-1", divergences.generalized_js_div, temperature=2.0, beta=1.0),
    _divergence("skew_kl_div", divergences.skew_kl_div, eager_skew, bench=IMAGENET, temperature=2.0),
    _divergence("skew_reverse_kl_div", divergences.skew_reverse_kl_div, eager_skew_reverse, bench=IMAGENET, temperature=2.0),
    _divergence("total_variation", divergences.total_variation, eager_tv, bench=IMAGENET, temperature=2.0),
    _divergence(
        "alpha_beta_div", divergences.alpha_beta_div, eager_alpha_beta, bench=IMAGENET, temperature=2.0, alpha=0.4, beta=0.7
    ),
    _divergence("alpha_beta_div-limit", divergences.alpha_beta_div, temperature=2.0, alpha=1.0, beta=-1.0),
    _divergence(
        "soft_cross_entropy", divergences.soft_cross_entropy, eager_soft_cross_entropy, bench=IMAGENET, temperature=2.0
    ),
    _divergence(
        "distillation_loss-js", logits.distillation_loss, make=make_labelled, divergence="js",
        divergence_options={"beta": 0.3}, temperature=2.0,
    ),
    _divergence("distillation_loss-decoupled", logits.distillation_loss, make=make_labelled, divergence="decoupled_kl"),
    _divergence("decoupled_kd_loss", structured.decoupled_kd_loss, eager_decoupled, make_all_labelled, IMAGENET),
    _divergence("decoupled_kd_loss-masked", structured.decoupled_kd_loss, make=make_labelled, reduction="none"),
    _divergence("lwf_loss", structured.lwf_loss, eager_lwf, bench=IMAGENET),
    _divergence(
        "channel_wise_div", structured.channel_wise_div, eager_channel_wise, make_maps, {"ade20k": (2, 150, 64, 128)},
        MAPS, ("student_features", "teacher_features"),
    ),
    _divergence(
        "pixel_wise_div", structured.pixel_wise_div, eager_pixel_wise, bench={"cityscapes": (2, 19, 64, 128)}, shapes=PIXELS
    ),
    Case(
        "auxiliary_heads_loss", structured.auxiliary_heads_loss, make_heads, {}, eager_heads, grads=("head_logits",),
        shapes=HEADS, bench={"cifar": (3, 64, 100)}, bench_gpu={"cifar": (3, 64, 100)}, floor_bytes=floor_bytes_heads,
        headline=True,
    ),
)  # fmt: skip

SPEC = Spec(
    family="row_divergence",
    backends=("reference", "cpu", "triton", "cuda"),
    cases=(
        _case("kl_div", logits.kl_div, eager=eager_kl, temperature=4.0, bench=True),
        _case("kl_div-T1", logits.kl_div),
        _case("kl_div-two-temperatures", logits.kl_div, temperature=2.0, teacher_temperature=3.0, reduction="sum"),
        _case("kl_div-batchmean-unscaled", logits.kl_div, temperature=2.5, scale_by_t2=False, reduction="batchmean"),
        _case("kl_div-mean", logits.kl_div, temperature=2.0, reduction="mean"),
        _case("kl_div-none", logits.kl_div, temperature=2.0, reduction="none"),
        _case("kl_div-labels", logits.kl_div, make_labelled, temperature=2.0),
        _case("kl_div-weight", logits.kl_div, make_weighted, temperature=2.0),
        _case("kl_div-num-items", logits.kl_div, make_labelled, temperature=2.0, num_items=37.0),
        _case("distillation_loss", logits.distillation_loss, make_labelled, eager_distillation, bench=True, temperature=4.0, alpha=0.9),
        _case("distillation_loss-T1", logits.distillation_loss, make_labelled, temperature=1.0, alpha=0.5),
        _case("distillation_loss-smooth", logits.distillation_loss, make_class_weighted, label_smoothing=0.1, alpha=0.3),
        _case("distillation_loss-none", logits.distillation_loss, make_class_weighted, reduction="none"),
        _case("distillation_loss-sum", logits.distillation_loss, make_labelled, reduction="sum", teacher_temperature=2.0),
        _case("distillation_loss-mean", logits.distillation_loss, make_class_weighted, reduction="mean"),
        _case("distillation_loss-ce-only", logits.distillation_loss, make_labelled, alpha=0.0, label_smoothing=0.2),
        *DIVERGENCES,
    ),
)  # fmt: skip
