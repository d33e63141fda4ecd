"""Cases of DIST for tests, bench and check."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from kdkernels.losses import dist
from kdkernels.ops.registry import Case, Inputs, Shape, Spec

# No two classes or two rows with a weight: every correlation is 1 or -1 then, and its gradient rounding noise.
SHAPES: tuple[Shape, ...] = ((1, 1), (5, 7), (64, 100), (300, 19), (7, 1000), (3, 1025), (2, 3, 130), (3, 4099))
BENCH = {"cifar": (64, 100), "imagenet": (256, 1000), "llm-32k": (64, 32000)}
BENCH_GPU = {"cifar": (64, 100), "imagenet": (256, 1000), "llm-32k": (4096, 32000)}


def make_related(shape: Shape, generator: torch.Generator) -> Inputs:
    """A teacher, and a student that has learnt some of it: correlations of unrelated models are all noise."""
    teacher = 3 * torch.randn(shape, generator=generator)
    return {"student_logits": teacher + 2 * torch.randn(shape, generator=generator), "teacher_logits": teacher}


def make_labelled(shape: Shape, generator: torch.Generator) -> Inputs:
    """The same with labels, about a quarter of them ignored (never all)."""
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    ignored = torch.rand(shape[:-1], generator=generator) < 0.25
    ignored.view(-1)[-1] = False
    return {**make_related(shape, generator), "labels": labels.masked_fill(ignored, -100)}


def make_weighted(shape: Shape, generator: torch.Generator) -> Inputs:
    return {**make_related(shape, generator), "weight": torch.rand(shape[:-1], generator=generator)}


def _relation(a: torch.Tensor, b: torch.Tensor, eps: float) -> torch.Tensor:
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + eps)).mean()


def eager_dist(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, eps: float = 1e-8, **_: Any
) -> torch.Tensor:
    p = F.softmax(student_logits.flatten(0, -2) / temperature, dim=1)
    q = F.softmax(teacher_logits.flatten(0, -2) / temperature, dim=1)
    return _relation(p, q, eps) + _relation(p.t(), q.t(), eps)


def floor_bytes(shape: Shape, itemsize: int, backward: bool) -> int:
    """Rows, columns and the gradient each read both models: a column is known when the last row is."""
    return (7 if backward else 4) * torch.Size(shape).numel() * itemsize


def _case(name: str, make: Any = make_related, bench: bool = False, **options: Any) -> Case:
    return Case(
        name, dist.dist_loss, make, options, eager=eager_dist if bench else None, shapes=SHAPES,
        bench=BENCH if bench else {}, bench_gpu=BENCH_GPU if bench else {},
        floor_bytes=floor_bytes, bench_dtypes=(torch.float32, torch.bfloat16), headline=bench,
    )  # fmt: skip


SPEC = Spec(
    family="dist",
    backends=("reference", "cpu", "triton", "cuda"),
    cases=(
        _case("dist_loss", bench=True),
        _case("dist_loss-T4-scaled", temperature=4.0, beta=2.0, gamma=2.0, scale_by_t2=True),
        _case("dist_loss-clamp", temperature=4.0, clamp_norms=True),
        _case("dist_loss-rows-only", gamma=0.0),
        _case("dist_loss-columns-only", beta=0.0, temperature=2.0),
        _case("dist_loss-labels", make_labelled, temperature=2.0),
        _case("dist_loss-weight", make_weighted, temperature=2.0),
    ),
)
