"""Cases of the losses against a sparse teacher for tests, bench and check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from kdkernels.losses import sparse
from kdkernels.ops.registry import Case, Inputs, Shape, Spec

SHAPES: tuple[Shape, ...] = ((1, 1), (3, 2), (5, 7), (4, 100), (7, 1000), (3, 1025), (2, 3, 130), (2, 4099))
BENCH = {"llm-32k": (256, 32000), "llm-128k": (64, 128256)}
BENCH_GPU = {"llm-32k": (8192, 32000), "llm-128k": (8192, 128256), "llm-152k": (4096, 151936)}
TOP = 64


def _top(shape: Shape) -> int:
    return min(TOP, (shape[-1] + 1) // 2)


def make_logits(shape: Shape, generator: torch.Generator) -> Inputs:
    """A student, and the largest logits of a teacher that agrees with it in part."""
    student = 3 * torch.randn(shape, generator=generator)
    top = (student + 2 * torch.randn(shape, generator=generator)).topk(_top(shape), -1)
    return {"student_logits": student, "teacher_values": top.values, "teacher_indices": top.indices}


def make_log_probs(shape: Shape, generator: torch.Generator) -> Inputs:
    student = 3 * torch.randn(shape, generator=generator)
    # What is left out has a mass that float32 can tell from none.
    teacher = (student + 2 * torch.randn(shape, generator=generator)).clamp(-4, 4)
    top = teacher.log_softmax(-1).topk(_top(shape), -1)
    return {"student_logits": student, "teacher_values": top.values, "teacher_indices": top.indices}


def make_padded(shape: Shape, generator: torch.Generator) -> Inputs:
    """Supports of different lengths, in no order."""
    made = make_log_probs(shape, generator)
    order = torch.rand(made["teacher_indices"].shape, generator=generator).argsort(-1)
    left_out = torch.rand(order.shape, generator=generator) < 0.3
    left_out[..., 0] = False
    made["teacher_values"] = made["teacher_values"].gather(-1, order)
    made["teacher_indices"] = made["teacher_indices"].gather(-1, order).masked_fill(left_out, -1)
    return made


def make_labelled(shape: Shape, generator: torch.Generator) -> Inputs:
    """Labels, about a quarter of them ignored (never all), and row weights."""
    rows = shape[:-1]
    labels = torch.randint(0, shape[-1], rows, generator=generator)
    ignored = torch.rand(rows, generator=generator) < 0.25
    ignored.view(-1)[0] = False
    weight = 0.5 + torch.rand(rows, generator=generator)
    return {**make_log_probs(shape, generator), "labels": labels.masked_fill(ignored, -100), "weight": weight}


def eager_renormalize(
    student_logits: torch.Tensor, teacher_values: torch.Tensor, teacher_indices: torch.Tensor, temperature: float = 1.0,
    **_: Any,
) -> torch.Tensor:  # fmt: skip
    log_p = F.log_softmax(student_logits.flatten(0, -2) / temperature, dim=-1).gather(
        -1, teacher_indices.flatten(0, -2)
    )
    target = F.softmax(teacher_values.flatten(0, -2) / temperature, dim=-1)
    return F.kl_div(log_p, target, reduction="batchmean") * temperature**2


def eager_tail(
    student_logits: torch.Tensor, teacher_values: torch.Tensor, teacher_indices: torch.Tensor, **_: Any
) -> torch.Tensor:
    def with_tail(x: torch.Tensor) -> torch.Tensor:
        mass = torch.logsumexp(x, -1, keepdim=True).clamp(max=-1e-7)
        return torch.cat([x, torch.log(-torch.expm1(mass))], -1)

    log_p = F.log_softmax(student_logits.flatten(0, -2), dim=-1).gather(-1, teacher_indices.flatten(0, -2))
    return F.kl_div(with_tail(log_p), with_tail(teacher_values.flatten(0, -2)), reduction="batchmean", log_target=True)


def floor_bytes(shape: Shape, itemsize: int, backward: bool) -> int:
    """Read the student; write its gradient. The teacher is next to nothing."""
    return (2 if backward else 1) * torch.Size(shape).numel() * itemsize


def _case(
    name: str, make: Callable[..., Inputs] = make_log_probs, eager: Any = None, bench: bool = False, **options: Any
) -> Case:
    if make is not make_logits:
        options["teacher_values_are"] = "log_probs"
    return Case(
        f"topk_div-{name}" if name else "topk_div", sparse.topk_div, make, options, eager,
        grads=("student_logits", "teacher_values"), shapes=SHAPES, bench=BENCH if bench else {},
        bench_gpu=BENCH_GPU if bench else {}, floor_bytes=floor_bytes,
        bench_dtypes=(torch.float32, torch.bfloat16), headline=bench,
    )  # fmt: skip


SPEC = Spec(
    family="row_gather",
    backends=("reference", "cpu", "triton", "cuda"),
    cases=(
        _case("", make_logits, eager_renormalize, bench=True, temperature=2.0),
        _case("js", make_logits, divergence="js", temperature=2.0, teacher_temperature=3.0),
        _case("both", make_logits, missing="renormalize_both", temperature=2.0, reduction="sum"),
        _case("both-reverse", make_logits, missing="renormalize_both", divergence="reverse_kl", reduction="none"),
        _case("both-js", make_padded, missing="renormalize_both", divergence="js", scale_by_t2=False, temperature=1.5),
        _case("only", missing="none", reduction="batchmean"),
        _case("only-reverse-clamped", missing="none", divergence="reverse_kl", min_log_prob=-8.0),
        _case("tail", eager=eager_tail, bench=True, missing="tail"),
        _case("tail-reverse", make_padded, missing="tail", divergence="reverse_kl", reduction="none"),
        _case("tail-js", make_labelled, missing="tail", divergence="js", temperature=2.0),
        _case("uniform", missing="uniform", reduction="mean"),
        _case("uniform-labels", make_labelled, missing="uniform", num_items=37.0, temperature=2.0),
    ),
)
