"""Cases of the losses along the edges of a given graph for tests, bench and check."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from kdkernels.losses import graphs
from kdkernels.ops.pairwise_distance.spec import make_embeddings
from kdkernels.ops.registry import Case, Shape, Spec

DEGREE = 7  # edges for each node on the average, as in citation graphs
SHAPES: tuple[Shape, ...] = ((3, 3), (5, 7), (40, 33))
BENCH = {"cora": (2708, 64), "batch": (10000, 128)}
BENCH_GPU = {"cora": (2708, 64), "arxiv": (169343, 256)}


def make_graph(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Nodes with edges at random, several between some and none to others."""
    made = make_embeddings(shape, generator)
    edges = torch.randint(0, shape[0], (2, DEGREE * shape[0]), generator=generator)
    return {**{name: x / x.shape[1] ** 0.5 for name, x in made.items()}, "edge_index": edges}


def eager_local_structure(
    student: torch.Tensor, teacher: torch.Tensor, edge_index: torch.Tensor, kernel: str, gamma: float = 0.0, **_: Any
) -> torch.Tensor:
    """With a tensor of edges times features, and PyG's softmax over a node's edges."""
    source, target = edge_index
    nodes = len(student)

    def probabilities(x: torch.Tensor) -> torch.Tensor:
        if kernel == "linear":
            value = F.cosine_similarity(x[source], x[target])
        else:
            value = torch.exp(-gamma * (x[source] - x[target]).pow(2).sum(1))
        top = value.detach().new_full((nodes,), -torch.inf).scatter_reduce(0, target, value.detach(), "amax")
        value = (value - top[target]).exp()
        return value / value.new_zeros(nodes).scatter_add(0, target, value)[target]

    return F.kl_div(probabilities(student).log(), probabilities(teacher), reduction="sum") / nodes


def floor_bytes(shape: Shape, itemsize: int, backward: bool) -> int:
    """Read both models' nodes and the edges, write the student's gradient; neighbours' rows come from the cache at best."""
    nodes, features = shape
    return nodes * itemsize * (features * (2 if backward else 1) + features * 3 // 2 + 1) + 16 * DEGREE * nodes


def _case(name: str, eager: Any = None, **options: Any) -> Case:
    return Case(
        name, graphs.local_structure_loss, make_graph, options, eager, grads=("student", "teacher"), shapes=SHAPES,
        bench=BENCH if eager else {}, bench_gpu=BENCH_GPU if eager else {}, floor_bytes=floor_bytes, headline=bool(eager),
    )  # fmt: skip


SPEC = Spec(
    family="edge_relation",
    backends=("reference", "cpu", "triton"),
    cases=(
        _case("local_structure", eager_local_structure, kernel="rbf", gamma=0.5),
        _case("local_structure-cosine", eager_local_structure, kernel="linear", normalize=True),
        _case("local_structure-polynomial", kernel="polynomial", offset=0.5, degree=3, reduction="edges"),
        _case("local_structure-euclidean", kernel="euclidean", squared=False, divergence="mse", reduction="sum"),
    ),
)  # fmt: skip
