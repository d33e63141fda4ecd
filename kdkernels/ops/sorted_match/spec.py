"""Cases of universal logit distillation for tests, bench and check."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from kdkernels.losses import uld
from kdkernels.ops.registry import Case, Inputs, Shape, Spec

SHAPES: tuple[Shape, ...] = ((1, 1), (3, 2), (5, 7), (2, 3, 130), (33, 100), (3, 1025))
BENCH = {"llm-1k": (256, 1000), "llm-32k": (64, 32000)}
BENCH_GPU = {"llm-32k": (2048, 32000)}


def make_two_vocabularies(shape: Shape, generator: torch.Generator) -> Inputs:
    """A teacher with an eighth more classes, and at least two."""
    *rows, classes = shape
    return {
        "student_logits": 2 * torch.randn(shape, generator=generator),
        "teacher_logits": 3 * torch.randn(*rows, classes + max(classes // 8, 2), generator=generator),
    }


def eager_uld(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, **_: Any
) -> torch.Tensor:
    p, q = (
        F.softmax(x.flatten(0, -2) / temperature, dim=-1).sort(dim=-1, descending=True).values
        for x in (student_logits, teacher_logits)
    )
    return (F.pad(p, (0, q.shape[-1] - p.shape[-1])) - q).abs().sum(-1).mean()


def floor_bytes(shape: Shape, itemsize: int, backward: bool) -> int:
    """Both models read once, the gradient written; the sort itself is not counted."""
    return (3 if backward else 2) * torch.Size(shape).numel() * itemsize


def _case(name: str, bench: bool = False, **options: Any) -> Case:
    return Case(
        name, uld.uld_loss, make_two_vocabularies, options, eager=eager_uld, shapes=SHAPES, bench=BENCH if bench else {},
        bench_gpu=BENCH_GPU if bench else {}, floor_bytes=floor_bytes, headline=bench,
    )  # fmt: skip


# "cuda" and "triton" are the same torch operations, no kernel of our own.
SPEC = Spec(
    "sorted_match", ("reference", "cpu"), (_case("uld_loss", bench=True), _case("uld_loss-T2", temperature=2.0))
)
