"""Losses between graphs of samples and nodes: against their published forms, on hard inputs, and by their properties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from published import agrees, close, embeddings, gradients, runs_here
from targets import Target

import kdkernels
from kdkernels import (
    global_structure_loss,
    graph_structure_loss,
    instance_relation_graph_loss,
    local_structure_loss,
)
from kdkernels.losses import graphs
from kdkernels.ops.edge_relation.op import ordered

# ------------------------------------------------------------------------------------------ instance relationship graph


def zoo_irg(*tensors: torch.Tensor, detach: bool = False) -> torch.Tensor:
    """Two maps, an embedding and logits, as Knowledge-Distillation-Zoo weighs them."""

    def over(d: torch.Tensor) -> torch.Tensor:
        return d / (d.max().detach() if detach else d.max())

    def edges(x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        norms = (x * x).sum(1)
        d = (norms[None] + norms[:, None] - 2 * x @ x.T).clamp(min=1e-12)
        return over(d * (1 - torch.eye(len(x), dtype=x.dtype)))

    def moved(f: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        f = F.adaptive_avg_pool2d(f, g.shape[2:])
        return over((f - (g[:, 0::2] + g[:, 1::2]) / 2).pow(2).sum((1, 2, 3)))

    s, t = tensors[:4], tensors[4:]
    edge = sum(F.mse_loss(edges(a), edges(b)) for a, b in zip(s[:3], t[:3])) / 3
    return 0.1 * F.mse_loss(s[3], t[3]) + 5 * edge + 5 * F.mse_loss(moved(*s[:2]), moved(*t[:2]))


def ours_irg(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    s, t = tensors[:4], tensors[4:]
    return instance_relation_graph_loss(s[:3], t[:3], s[3], t[3], **options)


@pytest.mark.parametrize("detach", [False, True])
def test_irg(target: Target, detach: bool, generator: torch.Generator) -> None:
    shapes = ((6, 2, 6, 6), (6, 4, 3, 3), (6, 5), (6, 7), (6, 3, 6, 6), (6, 6, 3, 3), (6, 8), (6, 7))
    inputs = tuple(torch.randn(s, generator=generator) for s in shapes)
    agrees(ours_irg, lambda *x: zoo_irg(*x, detach=detach), inputs, target, detach_maximum=detach)


def test_irg_of_samples_that_coincide(target: Target) -> None:
    x = torch.ones(4, 3)
    value, *grads = gradients(instance_relation_graph_loss, x, x.clone(), backend=target.backend)
    assert value == 0
    assert not any(g.any() for g in grads)


# --------------------------------------------------------------------------------------------------- structure of nodes


def nodes_kernel(name: str, x: torch.Tensor) -> torch.Tensor:
    """efficient-gnns' four, as they are written."""
    if name in ("cosine", "poly"):
        x = F.normalize(x, dim=-1)
        return (x @ x.T) ** (1 if name == "cosine" else 2)
    difference = x[None] - x[:, None]
    if name == "l2":  # norm's gradient at 0 is 0
        return difference.norm(dim=-1)
    return torch.exp(-0.5 * difference.pow(2).sum(-1))


KERNELS = {
    "cosine": {"kernel": "linear"},
    "poly": {"kernel": "polynomial"},
    "l2": {"kernel": "euclidean", "normalize": False},
    "rbf": {"kernel": "rbf", "normalize": False},
}


@pytest.mark.parametrize("name", KERNELS)
def test_global_structure(target: Target, name: str, generator: torch.Generator) -> None:
    def published(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(nodes_kernel(name, s), nodes_kernel(name, t))

    s, t = embeddings(11, 5, 7, generator)
    agrees(global_structure_loss, published, (s / 2, t / 2), target, **KERNELS[name])


def test_a_zero_node_has_cosine_0(target: Target, generator: torch.Generator) -> None:
    s, t = embeddings(5, 4, 4, generator)
    s[2] = 0
    value, grad, _ = gradients(global_structure_loss, s, t, backend=target.backend)
    expected = F.mse_loss(nodes_kernel("cosine", s.double()), nodes_kernel("cosine", t.double()))
    assert abs(float(value) - float(expected)) < 1e-6
    assert not grad[2].any()
    assert grad.isfinite().all()


def random_graph(nodes: int, edges: int, generator: torch.Generator) -> torch.Tensor:
    """Several edges between some nodes, one from a node to itself, and none to the last node."""
    found = torch.randint(0, nodes - 1, (2, edges), generator=generator)
    found[:, 0] = 1
    return found


def gnn_local(name: str, criterion: str) -> Any:
    """efficient-gnns' loss with PyG's softmax."""

    def probabilities(x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        a, b = x[edge_index[0]], x[edge_index[1]]
        if name in ("cosine", "poly"):
            value = F.cosine_similarity(a, b) ** (1 if name == "cosine" else 2)
        else:
            value = (a - b).norm(dim=-1) if name == "l2" else torch.exp(-0.5 * (a - b).pow(2).sum(-1))
        adjacent = edge_index[1][None] == torch.arange(len(x))[:, None]
        return value.exp() / (adjacent * value.exp()).sum(1)[edge_index[1]]

    def loss(s: torch.Tensor, t: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        p_s, p_t = probabilities(s, edge_index), probabilities(t, edge_index)
        return F.mse_loss(p_s, p_t) if criterion == "mse" else F.kl_div(p_s.log(), p_t)

    return loss


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("criterion", ["kl", "mse"])
@pytest.mark.parametrize("name", KERNELS)
def test_local_structure(target: Target, name: str, criterion: str, generator: torch.Generator) -> None:
    edges = random_graph(9, 40, generator)
    published = gnn_local(name, criterion)
    options = {**KERNELS[name], "divergence": criterion, "reduction": "edges"}
    if name == "l2":
        options["squared"] = False
    if name == "rbf":
        options["gamma"] = 0.5
    if name in ("cosine", "poly"):
        options["normalize"] = True
    agrees(
        lambda s, t, **rest: local_structure_loss(s, t, edges, **options, **rest),
        lambda s, t: published(s, t, edges),
        tuple(x / 2 for x in embeddings(9, 5, 7, generator)), Target(runs_here(target), target.device), near_zero=True,
    )  # fmt: skip


def test_the_papers_local_structure(target: Target, generator: torch.Generator) -> None:
    s, t = (5 * x for x in embeddings(9, 5, 5, generator))
    edges = random_graph(9, 30, generator)
    expected = 0.0
    for i in range(9):
        near = edges[0, edges[1] == i]
        if len(near):
            own, other = (
                torch.log_softmax(torch.exp(-0.005 * (x[near] - x[i]).pow(2).sum(1)), 0)
                for x in (s.double(), t.double())
            )
            expected = expected + (other.exp() * (other - own)).sum() / 9
    got = local_structure_loss(s, t, edges, backend=runs_here(target))
    assert abs(float(got) - float(expected)) < 1e-6 + 1e-5 * float(expected)


def test_order_of_edges(target: Target, generator: torch.Generator) -> None:
    s, t = embeddings(9, 5, 7, generator)
    edges = random_graph(9, 40, generator)
    options = {"backend": runs_here(target), "gamma": 0.5}
    if options["backend"] == "reference":  # whose float32 has few digits of a loss near 0
        s, t = s.double(), t.double()
    expected = gradients(lambda a, b: local_structure_loss(a, b, edges, **options), s, t)
    shuffled = edges[:, torch.randperm(40, generator=generator)].int()
    close(gradients(lambda a, b: local_structure_loss(a, b, shuffled, **options), s, t), expected, 5e-6)


def test_edges_are_remembered_until_they_change(generator: torch.Generator) -> None:
    s, t = embeddings(9, 5, 7, generator)
    edges = random_graph(9, 40, generator)
    before = local_structure_loss(s, t, edges)
    assert edges in graphs._known_edges
    assert torch.equal(local_structure_loss(s, t, edges), before)
    edges[0, :20] = 3
    assert torch.equal(local_structure_loss(s, t, edges), local_structure_loss(s, t, edges.clone()))
    assert not torch.equal(local_structure_loss(s, t, edges), before)
    assert local_structure_loss(s[:8], t[:8], edges).isfinite()  # as many nodes as there are now
    count = len(graphs._known_edges)
    del edges
    assert len(graphs._known_edges) == count - 1


def test_few_edges(target: Target, generator: torch.Generator) -> None:
    s, t = embeddings(4, 3, 3, generator)
    options = {"backend": runs_here(target)}
    for edges in (torch.zeros(2, 0, dtype=torch.long), torch.tensor([[0], [3]]), torch.tensor([[2, 2], [2, 2]])):
        value, *grads = gradients(lambda a, b, e=edges: local_structure_loss(a, b, e, **options), s, t)
        assert abs(float(value)) < 1e-7
        assert all(g.abs().max() < 1e-7 for g in grads)
    for kernel in ("euclidean", "linear", "polynomial"):
        value, *grads = gradients(
            lambda a, b, k=kernel: local_structure_loss(a, b, torch.tensor([[0, 1, 1], [1, 1, 1]]), kernel=k,
                                                        squared=False, **options), s, t,
        )  # fmt: skip
        assert value.isfinite()
        assert all(g.isfinite().all() for g in grads)


def test_edges_to_nowhere(target: Target, generator: torch.Generator) -> None:
    s, t = embeddings(4, 3, 3, generator)
    for bad in (-1, 4):
        edges = torch.tensor([[0, bad], [1, 2]])
        with pytest.raises(IndexError, match=f"edge_index must be from 0 to 3; got {bad}"):
            local_structure_loss(s, t, edges)
        x = torch.ones(4, 3)
        if target.backend == "triton":  # as on a GPU, where nobody looks
            value = torch.ops.kdkernels.edge_values(x, *edges, False, "triton")
            assert value.isnan().tolist() == [False, True]
        if target.backend == "cpu":
            with pytest.raises(IndexError, match=f"edge_index holds {bad}"):
                torch.ops.kdkernels.edge_values(x, *edges, False, "cpu")
    for bad, error, words in (
        (torch.zeros(3, 2, dtype=torch.long), ValueError, r"shape \(2, E\)"),
        (torch.zeros(2, 3), TypeError, "must hold nodes"),
        ([[0], [1]], TypeError, "must be a tensor, got list"),
    ):
        with pytest.raises(error, match=words):
            local_structure_loss(s, t, bad)
    with pytest.raises(ValueError, match="unknown reduction 'mean': choose one of 'nodes', 'edges', 'sum'"):
        local_structure_loss(s, t, torch.zeros(2, 1, dtype=torch.long), reduction="mean")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_edge_operators(generator: torch.Generator) -> None:
    ops = torch.ops.kdkernels
    x = torch.randn(6, 5, generator=generator)
    edges = ordered(random_graph(6, 15, generator), 6)
    w, v = torch.randn(15, generator=generator), torch.randn(15, generator=generator)
    torch.library.opcheck(ops.edge_values.default, (x, edges.source, edges.target, True, "cpu"))
    torch.library.opcheck(ops.edge_gradient.default, (x, w, *edges, False, "cpu"))
    torch.library.opcheck(ops.edge_divergence.default, (v, w, edges.target, edges.arriving, False, True, True))
    leaf = x.clone().requires_grad_()
    loss = local_structure_loss(leaf, x.flip(0), random_graph(6, 15, generator))
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="edge_relation have no second derivative"):
        grad.sum().backward()


def test_edges_are_deterministic(generator: torch.Generator) -> None:
    s, t = embeddings(200, 40, 30, generator)
    edges = random_graph(200, 3000, generator)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gradients(lambda a, b: local_structure_loss(a, b, edges, backend="cpu"), s, t))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


# ------------------------------------------------------------------------------------------------------- all of them

LOSSES = {"irg": instance_relation_graph_loss, "global": global_structure_loss, "graph": graph_structure_loss}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_samples(target: Target, loss: str, n: int, generator: torch.Generator) -> None:
    s, t = embeddings(n, 4, 6, generator)
    backend = runs_here(target) if loss == "graph" else target.backend
    value, *grads = gradients(LOSSES[loss], s, t, backend=backend)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in grads)


def local(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    edges = torch.arange(len(s), device=s.device)
    return local_structure_loss(s, t, torch.stack([edges, edges.roll(1)]).repeat(1, 2) // 2)


@pytest.mark.parametrize("loss", [*LOSSES, "local"])
def test_compiles_in_one_graph(loss: str, generator: torch.Generator) -> None:
    s, t = embeddings(9, 6, 7, generator)
    function = LOSSES.get(loss, local)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    close(gradients(compiled, s, t), gradients(function, s, t), 1e-6)


def test_modules(generator: torch.Generator) -> None:
    s, t = embeddings(6, 3, 3, generator)
    assert torch.equal(
        kdkernels.InstanceRelationGraphLoss(squared=False)(s, t), instance_relation_graph_loss(s, t, squared=False)
    )
    edges = torch.tensor([[0, 1, 2], [1, 1, 1]])
    assert torch.equal(
        kdkernels.LocalStructureLoss(gamma=0.5)(s, t, edges), local_structure_loss(s, t, edges, gamma=0.5)
    )
    assert torch.equal(kdkernels.GraphStructureLoss(hop=0.5)(s, t), graph_structure_loss(s, t, hop=0.5))
    assert torch.equal(kdkernels.GlobalStructureLoss(kernel="rbf")(s, t), global_structure_loss(s, t, kernel="rbf"))


def test_errors(generator: torch.Generator) -> None:
    s, t = embeddings(5, 3, 4, generator)
    for function in LOSSES.values():
        with pytest.raises(ValueError, match=r"student.* has 5 and teacher.* 4"):
            function(s, t[:4])
        with pytest.raises(TypeError, match="teacher.* must be float16"):
            function(s, t.long())
    with pytest.raises(ValueError, match="equally many layers"):
        instance_relation_graph_loss([s, s], [t])
    with pytest.raises(ValueError, match="one of them is missing"):
        instance_relation_graph_loss(s, t, s)
    with pytest.raises(ValueError, match=r"layers that are maps .*got \(0, 0\)"):
        instance_relation_graph_loss(s, t, transformations=[(0, 0)])
    maps = [torch.ones(4, 2, 2, 2), torch.ones(4, 3, 2, 2)]
    with pytest.raises(ValueError, match="multiple of the channels .*got 2 and 3"):
        instance_relation_graph_loss(maps, maps)
    with pytest.raises(ValueError, match="unknown kernel 'cosine'"):
        global_structure_loss(s, t, kernel="cosine")
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        graph_structure_loss(s, t, temperature=0.0)
    with pytest.raises(ValueError, match="hop must be at least 0, got -1"):
        graph_structure_loss(s, t, hop=-1.0)
    with pytest.raises(ValueError, match="unknown kernel 'euclidean': choose one of 'linear', 'rbf'"):
        graph_structure_loss(s, t, kernel="euclidean")
    with pytest.raises(ValueError, match="degree must be at least 1, got 0"):
        global_structure_loss(s, t, degree=0)
