"""Cases of the losses between pairwise distances for tests, bench and check."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from kdkernels.losses import graphs, irg, relational
from kdkernels.ops.registry import Case, Shape, Spec

# (N, D of the student); the teacher's D is 1.5 times that and 1 more.
SHAPES: tuple[Shape, ...] = ((3, 3), (5, 7), (9, 1), (17, 64), (33, 20), (67, 130))
BENCH = {"cifar": (64, 128), "metric": (128, 512), "imagenet": (256, 512), "1k": (1024, 512)}
BENCH_GPU = {"imagenet": (256, 512), "1k": (1024, 512), "2k": (2048, 512), "4k": (4096, 512)}


def make_embeddings(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    n, features = shape
    return {
        "student": torch.randn(n, features, generator=generator),
        "teacher": torch.randn(n, features * 3 // 2 + 1, generator=generator),
    }


def make_masked(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The same with a weight for every ordered pair, about a third of them 0."""
    n = shape[0]
    weight = torch.rand(n, n, generator=generator)
    return {
        **make_embeddings(shape, generator),
        "mask": weight.where(torch.rand(n, n, generator=generator) < 0.67, 0.0),
    }


def make_labelled(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {**make_embeddings(shape, generator), "labels": torch.randint(0, 2, shape[:1], generator=generator)}


def make_small(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Distances near 1, as Hard Dark Rank's cubes want them."""
    return {name: x / (2 * x.shape[1]) ** 0.5 for name, x in make_embeddings(shape, generator).items()}


def eager_distances(x: torch.Tensor) -> torch.Tensor:
    """The published distance matrix: from the Gram matrix, clamped, with a zero diagonal."""
    square = x.pow(2).sum(1)
    d = (square.unsqueeze(1) + square.unsqueeze(0) - 2 * x @ x.t()).clamp(min=1e-12).sqrt()
    d = d.clone()
    d[range(len(x)), range(len(x))] = 0
    return d


def eager_distance(student: torch.Tensor, teacher: torch.Tensor, **_: Any) -> torch.Tensor:
    t = eager_distances(teacher)
    t = t / t[t > 0].mean()
    s = eager_distances(student)
    return F.smooth_l1_loss(s / s[s > 0].mean(), t)


def eager_hard_dark_rank(student: torch.Tensor, teacher: torch.Tensor, **_: Any) -> torch.Tensor:
    s, t = -3 * eager_distances(student).pow(3), -3 * eager_distances(teacher).pow(3)
    order = t.sort(dim=1, descending=True)[1][:, 1:5]
    s = s.gather(1, order)
    return -torch.stack([s[:, m] - s[:, m:].logsumexp(1) for m in range(s.shape[1])]).sum(0).mean()


def eager_irg(student_features: torch.Tensor, teacher_features: torch.Tensor, **_: Any) -> torch.Tensor:
    s, t = (eager_distances(x) ** 2 for x in (student_features, teacher_features))
    return 5 * F.mse_loss(s / s.max(), t / t.max())


def eager_global_structure(student: torch.Tensor, teacher: torch.Tensor, kernel: str, **_: Any) -> torch.Tensor:
    def similarity(x: torch.Tensor) -> torch.Tensor:
        if kernel == "rbf":
            return torch.exp(-0.5 * ((x.unsqueeze(0) - x.unsqueeze(1)) ** 2).sum(-1))
        x = F.normalize(x, dim=-1)
        return x @ x.t()

    return F.mse_loss(similarity(student), similarity(teacher))


def make_features(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {f"{name}_features": x for name, x in make_embeddings(shape, generator).items()}


def floor_bytes(shape: Shape, itemsize: int, backward: bool) -> int:
    """Read both models' samples, write the student's gradient: where D is small. The arithmetic is N^2 D."""
    n, features = shape
    teacher = features * 3 // 2 + 1
    return n * itemsize * (features * (2 if backward else 1) + teacher)


def _case(
    name: str, function: Any = relational.rkd_distance_loss, make: Any = make_embeddings, eager: Any = None,
    grads: tuple[str, ...] = ("student", "teacher"), bench: bool = False, **options: Any,
) -> Case:  # fmt: skip
    return Case(
        name, function, make, options, eager, grads=grads, shapes=SHAPES,
        bench=BENCH if bench else {}, bench_gpu=BENCH_GPU if bench else {},
        floor_bytes=floor_bytes, bench_dtypes=(torch.float32, torch.bfloat16), oracle_rows=128,
        headline=bench and eager is eager_distance,
    )  # fmt: skip


SPEC = Spec(
    family="pairwise_distance",
    backends=("reference", "cpu", "triton", "cuda"),
    cases=(
        _case("rkd_distance", eager=eager_distance, bench=True),
        _case("rkd_distance-squared", squared=True, beta=0.5),
        _case("rkd_distance-normalized", normalize=True, reduction="pairs"),
        _case("rkd_distance-raw", mean_normalize=False, reduction="sum", beta=2.0),
        _case("rkd_distance-masked", make=make_masked, reduction="pairs"),
        _case("rkd_distance-masked-squared", make=make_masked, squared=True),
        _case("rkd_distance-classes", make=make_labelled),
        _case("hard_dark_rank", relational.hard_dark_rank_loss, make_small, eager_hard_dark_rank, ("student",), True),
        _case("hard_dark_rank-sum", relational.hard_dark_rank_loss, make_small, None, ("student",), alpha=2.0, beta=2.0,
              k=3, reduction="sum"),
        _case("hard_dark_rank-none", relational.hard_dark_rank_loss, make_small, None, ("student",), reduction="none"),
        _case("irg", irg.instance_relation_graph_loss, make_features, eager_irg,
              ("student_features", "teacher_features"), True),
        _case("global_structure", graphs.global_structure_loss, make_embeddings, eager_global_structure, bench=True,
              kernel="linear"),
        _case("global_structure-rbf", graphs.global_structure_loss, make_small, eager_global_structure, bench=True,
              kernel="rbf", normalize=False),
    ),
)  # fmt: skip
