"""Soft shortest paths, and the loss between soft graphs: their properties, limits and promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from published import close, embeddings, gradients, runs_here
from targets import Target

from kdkernels import graph_structure_loss
from kdkernels.ops.graph_closure.op import soft_shortest_paths


def floyd_warshall(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The shortest paths' lengths, and how many edges they have."""
    d, edges = lengths.clone(), torch.ones_like(lengths)
    d.fill_diagonal_(0)
    edges.fill_diagonal_(0)
    for k in range(len(d)):
        through, count = d[:, k, None] + d[k], edges[:, k, None] + edges[k]
        edges = torch.where(through < d, count, edges)
        d = torch.minimum(d, through)
    return d, edges


def free_energy(lengths: torch.Tensor, temperature: float) -> torch.Tensor:
    """Soft shortest paths by a matrix inverse, which underflows where float64 does."""
    n = lengths.shape[-1]
    w = torch.exp(-lengths / temperature) / n * (1 - torch.eye(n, dtype=lengths.dtype))
    z = torch.linalg.inv(torch.eye(n, dtype=lengths.dtype) - w)
    return -temperature * torch.log(z / z.diagonal(dim1=-2, dim2=-1)[..., None, :])


def random_lengths(graphs: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """Directed; many paths of several edges are shorter than the edge itself."""
    return 3 * torch.rand(graphs, n, n, generator=generator) ** 2


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("n", [1, 2, 7, 18, 150])
@pytest.mark.slow_takes(lambda n: n < 150)
def test_soft_shortest_paths(target: Target, n: int, temperature: float, generator: torch.Generator) -> None:
    lengths = random_lengths(2, n, generator)
    weights = torch.randn(2, n, n, generator=generator)

    def total(paths: Any) -> Any:
        return lambda x: (paths(x) * weights.to(x)).sum()

    backend = runs_here(target)
    expected = gradients(total(lambda x: free_energy(x, temperature)), lengths.double())
    got = gradients(total(lambda x: soft_shortest_paths(x, temperature, backend=backend)), lengths)
    close(got[1:], expected[1:], 5e-6)
    assert abs(float(got[0] - expected[0])) < 1e-5 * (1 + n)
    if backend == "reference":
        exact = gradients(total(lambda x: soft_shortest_paths(x, temperature, backend=backend)), lengths.double())
        close(exact[1:], expected[1:], 1e-9)


def test_vertices_far_from_all_others(generator: torch.Generator) -> None:
    """By more than float32's exponents: each pair needs its own shortest path, in a row's second tile of pairs too."""
    lengths = random_lengths(1, 150, generator)
    lengths[..., 128:] += 10
    paths = [soft_shortest_paths(x, 0.1, backend=b) for x, b in ((lengths, "cpu"), (lengths.double(), "reference"))]
    close(paths[:1], paths[1:], 5e-7)


def test_gradient_by_finite_differences(generator: torch.Generator) -> None:
    lengths = random_lengths(1, 5, generator).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_shortest_paths(x, 0.3, backend="reference"), lengths)
    s, t = (x.double().requires_grad_() for x in embeddings(5, 3, 4, generator))
    assert torch.autograd.gradcheck(lambda a, b: graph_structure_loss(a, b, temperature=0.5, sharpness=0.3), (s, t))


@pytest.mark.parametrize("temperature", [0.3, 0.03, 0.003, 3e-4])
def test_limit_to_the_shortest_paths(target: Target, temperature: float, generator: torch.Generator) -> None:
    """Never shorter, and longer by at most T log N an edge."""
    lengths = random_lengths(1, 18, generator)
    found = soft_shortest_paths(lengths, temperature, backend=runs_here(target))[0].double()
    exact, edges = floyd_warshall(lengths[0].double())
    assert edges.max() > 2
    assert (found >= exact - 1e-6).all()
    assert (found <= exact + temperature * math.log(18) * edges + 1e-6).all()


def test_longer_edges_never_shorten_a_path(target: Target, generator: torch.Generator) -> None:
    lengths = random_lengths(1, 9, generator).requires_grad_()
    paths = soft_shortest_paths(lengths, 0.2, backend=runs_here(target))
    (grad,) = torch.autograd.grad(paths[0, 2, 5], lengths)
    assert grad.min() > -1e-7
    # Walks to 5 are over there, none starts in it; and the last of their edges leads to it.
    assert grad[0, 5].abs().max() < 1e-6
    assert abs(float(grad[0, :, 5].sum()) - 1) < 1e-5
    triangle = paths[0][:, :, None] + paths[0][None] - paths[0][:, None]
    assert triangle.min() > -1e-5


def test_permutation(target: Target, generator: torch.Generator) -> None:
    s, t = embeddings(13, 5, 7, generator)
    order = torch.randperm(13, generator=generator)
    options = {"threshold": 0.1, "backend": runs_here(target)}
    value, ds, dt = gradients(graph_structure_loss, s, t, **options)
    moved = gradients(graph_structure_loss, s[order], t[order], **options)
    close(moved, [value, ds[order], dt[order]], 1e-5)


def test_zero_where_structures_agree_and_only_there(target: Target, generator: torch.Generator) -> None:
    s, _ = embeddings(11, 5, 5, generator)
    options = {"threshold": 0.1, "backend": runs_here(target)}
    turned = s @ torch.linalg.qr(torch.randn(5, 5, generator=generator))[0]
    for same in (s, 3 * s, turned):  # cosines are the same
        value, *grads = gradients(graph_structure_loss, s, same, **options)
        assert value < 1e-9
        assert all(g.abs().max() < 1e-4 for g in grads)
    assert graph_structure_loss(s, s, **options) == 0
    moved = s.clone()
    moved[4] = -moved[4]  # whoever was near is far, and the other way round
    assert graph_structure_loss(moved, s, **options) > 1e-4
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        terms = dict(zip(("connectivity_weight", "path_weight"), weights))
        assert graph_structure_loss(moved, s, **terms, **options) > 1e-5


def test_connectivity_and_hops_in_the_limit(target: Target) -> None:
    """A circle of 8 with only neighbours adjacent, and one apart: hops around it, and nobody reaches the one."""
    angle = torch.arange(8) * math.pi / 4
    circle = torch.stack([angle.cos(), angle.sin(), torch.zeros(8)], 1)
    x = torch.cat([circle, torch.tensor([[0.0, 0.0, 1.0]])])
    cosines = x @ x.T
    lengths = F.softplus((0.5 - cosines) / 0.01)
    backend = runs_here(target)
    reach, hops = soft_shortest_paths(torch.stack([lengths, lengths + 1]), 1e-3, backend=backend)
    i = torch.arange(8)
    around = (i[:, None] - i[None]).abs()
    torch.testing.assert_close(hops[:8, :8], torch.minimum(around, 8 - around).float(), atol=0.02, rtol=0)
    assert (torch.exp(-reach[:8, :8]) > 0.98).all()
    assert (torch.exp(-reach[8, :8]) < 1e-3).all()
    # The same through the loss: cutting the circle once turns a distance of 3 into 5.
    cut = x.clone()
    cut[0] = torch.tensor([0.0, 0.0, -1.0])
    options = {"sharpness": 0.01, "temperature": 1e-3, "backend": backend}
    only_paths = graph_structure_loss(x, cut, connectivity_weight=0.0, reduction="sum", **options)
    only_reach = graph_structure_loss(x, cut, path_weight=0.0, reduction="sum", **options)
    assert abs(float(only_reach) - 14) < 0.5  # the seven others, there and back
    assert only_paths > 14 * 40


def test_large_costs_keep_their_gradients(target: Target, generator: torch.Generator) -> None:
    """At low temperatures weights are e^-1000 and less, and their ratios are what counts."""
    lengths = random_lengths(1, 12, generator) + 1
    backend = runs_here(target)
    exact = gradients(lambda x: soft_shortest_paths(x, 0.002, backend="reference").sum(), lengths.double())
    got = gradients(lambda x: soft_shortest_paths(x, 0.002, backend=backend).sum(), lengths)
    close(got, exact, 1e-5)


def test_closure_is_deterministic(generator: torch.Generator) -> None:
    lengths = random_lengths(3, 40, generator)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):  # fewer and more than there are graphs
            torch.set_num_threads(threads)
            found.append(gradients(lambda x: soft_shortest_paths(x, 0.1, backend="cpu").pow(2).sum(), lengths))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_closure_operators(generator: torch.Generator) -> None:
    ops = torch.ops.kdkernels
    costs = random_lengths(2, 5, generator) + math.log(5)
    torch.library.opcheck(ops.graph_closure_forward.default, (costs, "cpu"))
    found = ops.graph_closure_forward(costs, "cpu")
    torch.library.opcheck(ops.graph_closure_backward.default, (costs, *found, torch.ones(2, 5, 5), "cpu"))
    leaf = costs.clone().requires_grad_()
    (grad,) = torch.autograd.grad(soft_shortest_paths(leaf, 1.0, backend="cpu").sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="graph_closure have no second derivative"):
        grad.sum().backward()
