"""Losses between relations of pixels: against their published forms, in chunks, and on hard inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from published import agrees, close, gradients
from targets import Target
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels
from kdkernels import cross_image_relation_loss, pairwise_structure_loss
from kdkernels.ops.pixel_relation import op

LOSSES = {"pairwise": pairwise_structure_loss, "cross": cross_image_relation_loss}


def maps(shape: tuple[int, ...], channels: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    n, _, *size = shape
    return torch.randn(shape, generator=generator), torch.randn(n, channels, *size, generator=generator)


def authors_pairwise(s: torch.Tensor, t: torch.Tensor, scale: float) -> torch.Tensor:
    """As the authors of structured distillation write it."""
    patch = int(t.shape[2] * scale), int(t.shape[3] * scale)

    def similarity(x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(x, patch, patch, ceil_mode=True)
        x = x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-8).detach()
        return torch.einsum("icm,icn->imn", x.flatten(2), x.flatten(2))

    pooled = similarity(s)
    return ((similarity(t) - pooled) ** 2 / pooled.shape[1] ** 2 / len(t)).sum()


def cirkd_pairwise(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    def similarity(x: torch.Tensor) -> torch.Tensor:
        x = F.normalize(F.max_pool2d(x, 2, ceil_mode=True), dim=1).flatten(2)
        return torch.bmm(x.transpose(1, 2), x)

    return (similarity(s) - similarity(t)).pow(2).mean()


def cirkd_cross(s: torch.Tensor, t: torch.Tensor, temperature: float = 0.1, pooling: bool = False) -> torch.Tensor:
    s, t = (F.avg_pool2d(x, 2, ceil_mode=True) if pooling else x for x in (s, t))
    s, t = F.normalize(s, dim=1).flatten(2), F.normalize(t, dim=1).flatten(2)
    total = 0.0
    for i in range(len(s)):
        for j in range(len(s)):
            own = F.log_softmax(s[i].T @ s[j] / temperature, 1)
            total = total + F.kl_div(own, F.softmax(t[i].T @ t[j] / temperature, 1), reduction="batchmean")
    return total / len(s) ** 2


PUBLISHED = {
    "authors": (pairwise_structure_loss, {}, lambda s, t: authors_pairwise(s, t, 0.5)),
    "authors-fine": (pairwise_structure_loss, {"pool": 0.2}, lambda s, t: authors_pairwise(s, t, 0.2)),
    "cirkd-pairwise": (pairwise_structure_loss, {"pool": 2, "detach_norm": False}, cirkd_pairwise),
    "cirkd": (cross_image_relation_loss, {}, cirkd_cross),
    "cirkd-pooled": (cross_image_relation_loss, {"pool": 2}, lambda s, t: cirkd_cross(s, t, pooling=True)),
    "cirkd-warm": (cross_image_relation_loss, {"temperature": 2.0}, lambda s, t: cirkd_cross(s, t, 2.0)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(target: Target, name: str, generator: torch.Generator) -> None:
    function, options, published = PUBLISHED[name]
    agrees(function, published, maps((2, 4, 5, 5), 6, generator), target, **options)


@pytest.mark.parametrize("loss", LOSSES)
def test_chunks(loss: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several images, one, and parts of one at a time: the same."""
    s, t = maps((3, 5, 6, 7), 4, generator)
    whole = gradients(LOSSES[loss], s, t, pool=None) if loss == "pairwise" else gradients(LOSSES[loss], s, t)
    for rows in (100, 42, 11, 1):
        monkeypatch.setattr(op, "CHUNK_BYTES", 4 * 42 * rows)
        options = {"pool": None} if loss == "pairwise" else {}
        close(gradients(LOSSES[loss], s, t, **options), whole, 2e-6)


def test_no_matrix_over_all_pixels(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """linear_divergence's own tests say so of the cross-image relation."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel())
            return out

    monkeypatch.setattr(op, "CHUNK_BYTES", 1 << 16)
    s, t = (torch.randn(2, 1024, 3, generator=generator) for _ in range(2))
    with Watch():
        op._similarity(s, t, True, True)
    assert largest == (1 << 16) // 4


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_zero_pixels_and_large_ones(target: Target, loss: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    s, t = (x.to(dtype) for x in maps((2, 4, 3, 3), 4, generator))
    s[0, :, 0, 0] = 0
    t[1, :, 2, 2] = 0
    s[1] *= 8000
    value, *grads = gradients(LOSSES[loss], s, t, pool=None, backend=target.backend)
    exact = gradients(LOSSES[loss], s.double(), t.double(), pool=None, backend="reference")
    assert abs(float(value) - float(exact[0])) < 1e-5 * float(exact[0])
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][0, :, 0, 0].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_no_images(target: Target, loss: str) -> None:
    value, *grads = gradients(LOSSES[loss], torch.ones(0, 3, 4, 4), torch.ones(0, 5, 4, 4), backend=target.backend)
    assert value == 0
    assert [g.shape[1] for g in grads] == [3, 5]


def test_the_users_precision_changes_nothing(generator: torch.Generator) -> None:
    s, t = maps((2, 64, 8, 8), 64, generator)
    expected = [gradients(f, s, t, pool=None) for f in LOSSES.values()]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = [gradients(f, s, t, pool=None) for f in LOSSES.values()]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for one, other in zip(expected, found) for a, b in zip(one, other))


def test_retained_graph_and_second_derivative(generator: torch.Generator) -> None:
    s, t = maps((2, 4, 4, 4), 4, generator)
    s.requires_grad_()
    for function in LOSSES.values():
        loss = function(s, t)
        (once,) = torch.autograd.grad(loss, s, torch.tensor(2.0), retain_graph=True)
        (again,) = torch.autograd.grad(loss, s)
        torch.testing.assert_close(once, 2 * again)
        (grad,) = torch.autograd.grad(function(s, t), s, create_graph=True)
        with pytest.raises(RuntimeError, match="backend='reference'"):
            grad.sum().backward()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_operators(generator: torch.Generator) -> None:
    s, t = torch.randn(2, 5, 3, generator=generator), torch.randn(2, 5, 4, generator=generator)
    ops = torch.ops.kdkernels
    torch.library.opcheck(ops.pixel_similarity.default, (s, t, True, False))
    scalars = torch.tensor([0.5, 0.5, 1.0, 0, 0, 0, 0, 0])
    torch.library.opcheck(ops.cross_image_relation.default, (s, t, scalars, True, True, "cpu"))


@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_in_one_graph(loss: str, generator: torch.Generator) -> None:
    s, t = maps((2, 4, 4, 4), 5, generator)
    compiled = torch.compile(LOSSES[loss], backend="aot_eager", fullgraph=True)
    close(gradients(compiled, s, t), gradients(LOSSES[loss], s, t), 1e-6)


def test_modules(generator: torch.Generator) -> None:
    s, t = maps((2, 3, 4, 4), 3, generator)
    assert torch.equal(kdkernels.PairwiseStructureLoss(pool=2)(s, t), pairwise_structure_loss(s, t, pool=2))
    assert torch.equal(kdkernels.CrossImageRelationLoss(pool=2)(s, t), cross_image_relation_loss(s, t, pool=2))


def test_errors(generator: torch.Generator) -> None:
    s, t = maps((2, 3, 4, 4), 3, generator)
    for function in LOSSES.values():
        with pytest.raises(ValueError, match=r"must be maps \(N, C, H, W\)"):
            function(s[0], t)
        with pytest.raises(ValueError, match="same N, H and W"):
            function(s, t[:, :, :2])
        with pytest.raises(TypeError, match="teacher_features must be float16"):
            function(s, t.long())
        with pytest.raises(ValueError, match="pool must be"):
            function(s, t, pool=0)
        with pytest.raises(ValueError, match="unknown reduction"):
            function(s, t, reduction="batchmean")
    with pytest.raises(ValueError, match="pool must be a fraction of the map"):
        pairwise_structure_loss(s, t, pool=1.5)
    with pytest.raises(TypeError, match="got str"):
        pairwise_structure_loss(s, t, pool="half")
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        cross_image_relation_loss(s, t, temperature=0.0)


def test_gradients_lie_as_the_pixels_do(generator: torch.Generator) -> None:
    """Channel by channel, as maps do: otherwise every operation behind them copies one of the two."""
    s, t = (torch.randn(2, channels, 12, generator=generator).transpose(1, 2) for channels in (5, 7))
    (grad,) = torch.autograd.grad(op.pixel_similarity(s.requires_grad_(), t, backend="cpu"), s)
    assert grad.stride() == s.stride()
