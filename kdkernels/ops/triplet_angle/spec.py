"""Cases of the losses between triplet angles for tests, bench and check."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from kdkernels.losses import relational
from kdkernels.ops.pairwise_distance.spec import eager_distance, floor_bytes, make_embeddings
from kdkernels.ops.registry import Case, Shape, Spec

# On a line (D = 1) every cosine is 1 or -1 and the gradient 0, which a law of cosines only knows to rounding.
SHAPES: tuple[Shape, ...] = ((3, 3), (5, 7), (9, 2), (17, 64), (33, 20), (67, 130))
# Beyond these `kdkernels bench --scaling` goes: at 1024 samples plain PyTorch takes minutes and tens of GiB.
BENCH = {"cifar": (64, 128), "metric": (128, 512), "imagenet": (256, 512)}
BENCH_GPU = {"metric": (128, 512), "imagenet": (256, 512), "1k": (1024, 512), "4k": (4096, 512)}


def make_duplicates(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Samples that coincide in one model only."""
    made = make_embeddings(shape, generator)
    made["student"][-1] = made["student"][0]
    made["teacher"][shape[0] // 2] = made["teacher"][0]
    return made


def make_clusters(spread: float) -> Any:
    """Two clusters, their centres 1 apart in every feature, of this spread."""

    def make(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
        centre = (torch.arange(shape[0]) % 2).float()[:, None]
        return {name: centre + spread * x for name, x in make_embeddings(shape, generator).items()}

    return make


def make_far(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Far from the origin, so that no Gram matrix in float32 knows the distances."""
    return {name: x + 1e4 / x.shape[1] ** 0.5 for name, x in make_embeddings(shape, generator).items()}


def eager_angle(student: torch.Tensor, teacher: torch.Tensor, **_: Any) -> torch.Tensor:
    """The published loss: unit vectors of all pairs, and all their products."""

    def cosines(x: torch.Tensor) -> torch.Tensor:
        e = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), p=2, dim=2)
        return torch.bmm(e, e.transpose(1, 2)).view(-1)

    with torch.no_grad():
        t = cosines(teacher)
    return F.smooth_l1_loss(cosines(student), t)


def eager_rkd(student: torch.Tensor, teacher: torch.Tensor, **_: Any) -> torch.Tensor:
    return eager_distance(student, teacher.detach()) + 2 * eager_angle(student, teacher)


def _case(
    name: str, function: Any = relational.rkd_angle_loss, make: Any = make_embeddings, eager: Any = None,
    bench: bool = False, shapes: tuple[Shape, ...] = SHAPES, **options: Any,
) -> Case:  # fmt: skip
    return Case(
        name, function, make, options, eager, grads=("student", "teacher"), shapes=shapes,
        bench=BENCH if bench else {}, bench_gpu=BENCH_GPU if bench else {},
        floor_bytes=floor_bytes, bench_dtypes=(torch.float32, torch.bfloat16), oracle_rows=64, headline=bench,
    )  # fmt: skip


SPEC = Spec(
    family="triplet_angle",
    backends=("reference", "cpu", "triton", "cuda"),
    cases=(
        _case("rkd_angle", eager=eager_angle, bench=True),
        _case("rkd_angle-sum", reduction="sum", beta=0.25),
        _case("rkd_angle-normalized", normalize=True, beta=2.0),
        _case("rkd_angle-duplicates", make=make_duplicates),
        _case("rkd_angle-clusters-0.1", make=make_clusters(0.1)),
        _case("rkd_angle-clusters-0.01", make=make_clusters(0.01)),
        _case("rkd_angle-clusters-0.001", make=make_clusters(0.001)),
        # Wide only: bfloat16 there is a coarse grid, on which few features leave the samples on lines.
        _case("rkd_angle-far", make=make_far, shapes=((19, 200), (67, 130))),
        _case("rkd", relational.rkd_loss, eager=eager_rkd, bench=True),
        _case("rkd-25-50", relational.rkd_loss, distance_weight=25.0, angle_weight=50.0, squared=True),
    ),
)  # fmt: skip
