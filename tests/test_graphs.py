"""Losses between graphs of samples and nodes: against their published forms, on hard inputs, and by their properties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from targets import Target

import kdkernels
from kdkernels import global_structure_loss, instance_relation_graph_loss

F64 = torch.float64


def embeddings(n: int, ds: int, dt: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, ds, generator=generator), torch.randn(n, dt, generator=generator)


def gradients(function: Any, *inputs: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """The loss and the gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = function(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def close(got: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for g, e in zip(got, expected, strict=True):
        scale = e.abs().max().clamp_min(1e-30)
        assert float((g.to(e) - e).abs().max() / scale) <= tolerance


def agrees(function: Any, published: Any, inputs: tuple[torch.Tensor, ...], target: Target, **options: Any) -> None:
    """Value and gradients of the published form in float64, to what float32 allows; on the reference to float64's."""
    exact = gradients(published, *(x.to(F64) for x in inputs))
    close(gradients(function, *inputs, **options, backend=target.backend), exact, 5e-6)
    if target.backend == "reference":
        close(gradients(function, *(x.to(F64) for x in inputs), **options), exact, 1e-10)


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


# ------------------------------------------------------------------------------------------------------- all of them

LOSSES = {"irg": instance_relation_graph_loss, "global": global_structure_loss}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_samples(target: Target, loss: str, n: int, generator: torch.Generator) -> None:
    s, t = embeddings(n, 4, 6, generator)
    value, *grads = gradients(LOSSES[loss], s, t, backend=target.backend)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_in_one_graph(loss: str, generator: torch.Generator) -> None:
    s, t = embeddings(9, 6, 7, generator)
    compiled = torch.compile(LOSSES[loss], backend="aot_eager", fullgraph=True)
    close(gradients(compiled, s, t), gradients(LOSSES[loss], s, t), 1e-6)


def test_modules(generator: torch.Generator) -> None:
    s, t = embeddings(6, 3, 3, generator)
    assert torch.equal(
        kdkernels.InstanceRelationGraphLoss(squared=False)(s, t), instance_relation_graph_loss(s, t, squared=False)
    )
    assert torch.equal(kdkernels.GlobalStructureLoss(kernel="rbf")(s, t), global_structure_loss(s, t, kernel="rbf"))


def test_errors(generator: torch.Generator) -> None:
    s, t = embeddings(5, 3, 4, generator)
    for function in LOSSES.values():
        with pytest.raises(ValueError, match="student has 5 and teacher 4"):
            function(s, t[:4])
        with pytest.raises(TypeError, match="teacher must be float16"):
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
    with pytest.raises(ValueError, match="degree must be a positive integer, got 0"):
        global_structure_loss(s, t, degree=0)
