"""Cases of the row-divergence losses for tests, bench and check."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from kdkernels.losses import logits
from kdkernels.ops.registry import Case, Shape, Spec

SHAPES: tuple[Shape, ...] = ((1, 1), (3, 2), (5, 7), (4, 100), (7, 1000), (3, 1025), (2, 3, 130), (2, 4099))
BENCH = {"cifar": (64, 100), "imagenet": (256, 1000), "llm-32k": (256, 32000), "llm-128k": (64, 128256)}
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


def eager_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, **_: Any) -> torch.Tensor:
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


def _case(name: str, function: Any, make: Any = make_scores, eager: Any = None, bench: bool = False, **options: Any) -> Case:
    return Case(
        name, function, make, options, eager, shapes=SHAPES,
        bench=BENCH if bench else {}, bench_gpu=BENCH_GPU if bench else {},
        floor_bytes=floor_bytes, bench_dtypes=(torch.float32, torch.bfloat16), headline=bench,
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
    ),
)  # fmt: skip
