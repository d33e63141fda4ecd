"""Cases of the losses between soft graphs for tests, bench and check."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from kdkernels.losses import graphs
from kdkernels.ops.pairwise_distance.spec import floor_bytes, make_embeddings
from kdkernels.ops.registry import Case, Shape, Spec

SHAPES: tuple[Shape, ...] = ((3, 3), (5, 7), (19, 16))
BENCH = {"cifar": (64, 128), "metric": (128, 512), "imagenet": (256, 512)}


def make_clusters(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Samples around three centres, which are similar among themselves."""
    made = make_embeddings(shape, generator)
    return {name: 0.6 * x + 2 * x[torch.arange(len(x)) % 3] for name, x in made.items()}


def eager_graph_structure(student: torch.Tensor, teacher: torch.Tensor, **_: Any) -> torch.Tensor:
    """The definition in a loop over vertices, all in logarithms, as somebody would write it."""

    def paths(lengths: torch.Tensor) -> torch.Tensor:
        n = len(lengths)
        itself = torch.eye(n, dtype=torch.bool, device=lengths.device)
        w = (-lengths / 0.1 - math.log(n)).masked_fill(itself, -1e30)
        for k in range(n):
            through = w[:, k, None] - torch.log1p(-w[k, k].exp()) + w[k]
            w = torch.logaddexp(w, through)
        return 0.1 * (F.softplus(w.diagonal()) - w).masked_fill(itself, 0.0)

    def graph(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.normalize(x, dim=1)
        lengths = F.softplus((0.5 - x @ x.t()) / 0.1)
        return torch.exp(-paths(lengths)), paths(lengths + 1)

    (r_s, p_s), (r_t, p_t) = graph(student), graph(teacher)
    n = len(student)
    return (F.mse_loss(r_s, r_t) + F.smooth_l1_loss(p_s, p_t)) * n / (n - 1)


def _case(name: str, make: Any = make_embeddings, eager: Any = None, **options: Any) -> Case:
    return Case(
        name, graphs.graph_structure_loss, make, options, eager, grads=("student", "teacher"), shapes=SHAPES,
        bench=BENCH if eager else {}, bench_gpu=BENCH if eager else {}, floor_bytes=floor_bytes, headline=bool(eager),
    )  # fmt: skip


SPEC = Spec(
    family="graph_closure",
    backends=("reference", "cpu", "triton"),
    cases=(
        _case("graph_structure", make_clusters, eager_graph_structure),
        _case("graph_structure-warm", temperature=1.0, threshold=0.0, sharpness=0.3, beta=0.1, reduction="sum"),
        _case("graph_structure-cold", make_clusters, temperature=0.02, hop=0.5, connectivity_weight=3.0),
        _case("graph_structure-rbf", kernel="rbf", normalize=False, gamma=0.1, threshold=0.4),
    ),
)  # fmt: skip
