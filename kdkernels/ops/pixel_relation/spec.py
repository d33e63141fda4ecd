"""Cases of the losses between relations of pixels for tests, bench and check."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from kdkernels.losses import pixels
from kdkernels.ops.registry import Case, Shape, Spec

# (N, C of the student, H, W); the teacher has 1 channel more and half as many again.
SHAPES: tuple[Shape, ...] = ((1, 3, 2, 3), (2, 5, 3, 3), (3, 8, 5, 4))
BENCH = {"seg-small": (4, 128, 32, 32), "seg": (2, 256, 64, 64)}
BENCH_GPU = {"seg": (2, 256, 64, 64), "cityscapes": (8, 256, 64, 128)}


def make_maps(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    n, channels, *size = shape
    return {
        "student_features": torch.randn(shape, generator=generator),
        "teacher_features": torch.randn(n, channels * 3 // 2 + 1, *size, generator=generator),
    }


def _unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x, dim=1).flatten(2)


def eager_pairwise(student_features: torch.Tensor, teacher_features: torch.Tensor, pool: Any, **_: Any) -> torch.Tensor:
    def similarity(x: torch.Tensor) -> torch.Tensor:
        x = _unit(F.max_pool2d(x, pool, ceil_mode=True))
        return torch.bmm(x.transpose(1, 2), x)

    return (similarity(student_features) - similarity(teacher_features)).pow(2).mean()


def eager_cross_image(student_features: torch.Tensor, teacher_features: torch.Tensor, **_: Any) -> torch.Tensor:
    s, t = _unit(student_features), _unit(teacher_features)
    loss = s.new_zeros(())
    for i in range(len(s)):
        for j in range(len(s)):
            own = F.log_softmax(s[i].t() @ s[j] / 0.1, dim=1)
            target = F.softmax(t[i].t() @ t[j] / 0.1, dim=1)
            loss = loss + F.kl_div(own, target, reduction="batchmean")
    return loss / len(s) ** 2


def floor_bytes(shape: Shape, itemsize: int, backward: bool) -> int:
    """Read both maps, write the student's gradient. The arithmetic is N (H W)^2 C, or N^2 (H W)^2 C."""
    n, channels, height, width = shape
    return n * height * width * itemsize * (channels * (2 if backward else 1) + channels * 3 // 2 + 1)


def _case(name: str, function: Any, eager: Any = None, **options: Any) -> Case:
    return Case(
        name, function, make_maps, options, eager, grads=("student_features", "teacher_features"), shapes=SHAPES,
        bench=BENCH if eager else {}, bench_gpu=BENCH_GPU if eager else {}, floor_bytes=floor_bytes, headline=bool(eager),
    )  # fmt: skip


SPEC = Spec(
    family="pixel_relation",
    backends=("reference", "cpu", "triton", "cuda"),
    cases=(
        _case("pairwise_structure", pixels.pairwise_structure_loss),
        _case("pairwise_structure-cirkd", pixels.pairwise_structure_loss, eager_pairwise, pool=2, detach_norm=False),
        _case("cross_image", pixels.cross_image_relation_loss, eager_cross_image),
        _case("cross_image-pooled", pixels.cross_image_relation_loss, pool=2, temperature=1.0, reduction="sum"),
    ),
)  # fmt: skip
