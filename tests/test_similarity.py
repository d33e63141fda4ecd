"""The losses between Gram matrices against their published forms, on hard inputs, and the promises of their kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import Level, assert_accurate
from bad_samples import refuses_bad_samples
from published import close, embeddings
from standins import correlation
from targets import TARGETS, Target

import kdkernels
from kdkernels import (
    correlation_congruence_loss,
    cosine_similarity_matrix_loss,
    fsp_loss,
    gram_loss,
    ickd_loss,
    nst_loss,
    pkt_loss,
    similarity_preserving_loss,
)

F64 = torch.float64
FUSED = [t for t in TARGETS if t.fused]
fused_here = pytest.mark.parametrize("fused", FUSED, ids=str)
Tensors = tuple[torch.Tensor, ...]

SAMPLES = {
    "sp": similarity_preserving_loss,
    "cosine": cosine_similarity_matrix_loss,
    "cc": correlation_congruence_loss,
    "pkt": pkt_loss,
}
MAPS = {"gram": gram_loss, "nst": nst_loss, "ickd": ickd_loss}


def maps(n: int, channels: int, height: int, width: int, generator: torch.Generator) -> Tensors:
    return tuple(torch.randn(n, channels, height, width, generator=generator) for _ in range(2))


def layers(generator: torch.Generator) -> Tensors:
    """Two layers of each model: the first larger in the student, the second in the teacher."""
    shapes = ((3, 5, 6, 4), (3, 7, 3, 2), (3, 5, 3, 3), (3, 7, 6, 3))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def gradients(function: Callable[..., Any], *tensors: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """The loss and the gradient of every tensor that requires one, or of all."""
    some = any(x.requires_grad for x in tensors)
    leaves = [x.detach().clone().requires_grad_(x.requires_grad or not some) for x in tensors]
    loss = function(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])]


# ------------------------------------------------------------------------- published forms, in words of torch, in float64


def similarity_matrix(x: torch.Tensor, p: int) -> torch.Tensor:
    q = x.flatten(1)
    g = q @ q.T
    return g / (g.abs() ** p).sum(1, keepdim=True) ** (1 / p)


def similarity_preserving(p: int, divided: bool) -> Callable[..., torch.Tensor]:
    def loss(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        apart = torch.linalg.matrix_norm(similarity_matrix(s, p) - similarity_matrix(t, p)) ** 2
        return apart / len(s) ** 2 if divided else apart

    return loss


def cosine_matrix(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    a, b = (F.cosine_similarity(x[:, None], x[None], dim=2) for x in (s, t))
    return ((a - b) ** 2).mean()


def taylor(x: torch.Tensor, gamma: float, order: int) -> torch.Tensor:
    rows = []
    for own in x:  # sample by sample
        inner = x @ own
        rows.append(
            math.exp(-2 * gamma) * sum((2 * gamma) ** p / math.factorial(p) * inner**p for p in range(order + 1))
        )
    return torch.stack(rows)


def congruence(gamma: float = 0.4, order: int = 2) -> Callable[..., torch.Tensor]:
    def loss(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(taylor(F.normalize(s), gamma, order), taylor(F.normalize(t), gamma, order))

    return loss


def congruence_distance(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.dist(taylor(s, 0.4, 2), taylor(t, 0.4, 2)) / len(s) ** 2


def bilinear_distance(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.dist(s @ s.T, t @ t.T)


def correlations(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(torch.corrcoef(s), torch.corrcoef(t))


def probabilistic(eps: float) -> Callable[..., torch.Tensor]:
    def neighbourhood(x: torch.Tensor) -> torch.Tensor:
        x = x / (x.norm(dim=1, keepdim=True) + eps)
        p = (x @ x.T + 1) / 2
        return p / p.sum(1, keepdim=True)

    def loss(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        p, q = neighbourhood(s), neighbourhood(t)
        return (q * ((q + eps) / (p + eps)).log()).mean()

    return loss


def channel_gram(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    a, b = (torch.einsum("nchw,ndhw->ncd", x, x) / x[0].numel() for x in (s, t))
    return F.mse_loss(a, b)


def selectivity(detached: bool) -> Callable[..., torch.Tensor]:
    def patterns(x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x.flatten(2), dim=2)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a[:, :, None] * b[:, None]).sum(-1).square().mean()

    def loss(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a, b = patterns(s), patterns(t)
        among = kernel(b, b)
        return (among.detach() if detached else among) + kernel(a, a) - 2 * kernel(a, b)

    return loss


def flow(a: torch.Tensor, b: torch.Tensor, pool: Callable[..., torch.Tensor]) -> torch.Tensor:
    size = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    a, b = (pool(x, size) for x in (a, b))
    return torch.einsum("nchw,ndhw->ncd", a, b) / (size[0] * size[1])


def flow_squared(s1: torch.Tensor, s2: torch.Tensor, t1: torch.Tensor, t2: torch.Tensor) -> torch.Tensor:
    pool = F.adaptive_avg_pool2d
    return F.mse_loss(flow(s1, s2, pool), flow(t1, t2, pool))


def flow_norm(s1: torch.Tensor, s2: torch.Tensor, t1: torch.Tensor, t2: torch.Tensor) -> torch.Tensor:
    pool = F.adaptive_max_pool2d
    return (flow(s1, s2, pool) - flow(t1, t2, pool)).norm(dim=1).sum() / len(s1)


def inter_channel(divisor: Callable[[int, int], int]) -> Callable[..., torch.Tensor]:
    def loss(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a, b = (F.normalize(torch.einsum("nchw,ndhw->ncd", x, x), dim=2) for x in (s, t))
        return (a - b).square().sum() / divisor(*s.shape[:2])

    return loss


PUBLISHED_SAMPLES = {
    "sp": (similarity_preserving_loss, {}, similarity_preserving(2, True)),
    "sp-torchdistill": (
        similarity_preserving_loss,
        {"norm": "l1", "reduction": "sum"},
        similarity_preserving(1, False),
    ),
    "sp-torchdistill-mean": (similarity_preserving_loss, {"norm": "l1"}, similarity_preserving(1, True)),
    "cosine": (cosine_similarity_matrix_loss, {}, cosine_matrix),
    "cc": (correlation_congruence_loss, {}, congruence()),
    "cc-0": (correlation_congruence_loss, {"order": 1, "gamma": 1.5}, congruence(1.5, 1)),
    "cc-4": (correlation_congruence_loss, {"order": 4}, congruence(order=4)),
    "cc-torchdistill": (
        correlation_congruence_loss,
        {"normalize": False, "distance": "frobenius"},
        congruence_distance,
    ),
    "cc-torchdistill-bilinear": (
        correlation_congruence_loss,
        {"kernel": "bilinear", "normalize": False, "distance": "frobenius", "reduction": "sum"},
        bilinear_distance,
    ),
    "cc-correlation": (correlation_congruence_loss, {"kernel": "correlation"}, correlations),
    "cc-repdistiller": (correlation_congruence_loss, {"kernel": "neighbours"}, correlation),
    "pkt": (pkt_loss, {}, probabilistic(1e-7)),
    "pkt-zoo": (pkt_loss, {"eps": 1e-6}, probabilistic(1e-6)),
}
PUBLISHED_MAPS = {
    "gram": (gram_loss, {}, channel_gram),
    "nst": (nst_loss, {}, selectivity(True)),
    "nst-zoo": (nst_loss, {"detach_teacher_term": False}, selectivity(False)),
    "ickd": (ickd_loss, {}, inter_channel(lambda n, c: c * n * n)),
    "ickd-authors": (ickd_loss, {"reduction": "batchmean"}, inter_channel(lambda n, c: c * n)),
}


def against(published: Any, function: Any, options: dict[str, Any], tensors: Tensors, target: Target) -> None:
    expected = gradients(published, *(x.to(F64) for x in tensors))
    close(gradients(function, *tensors, **options, backend=target.backend), expected, 4e-6)
    if target.backend == "reference":
        close(gradients(function, *(x.to(F64) for x in tensors), **options), expected, 1e-9)


@pytest.mark.parametrize("name", PUBLISHED_SAMPLES)
def test_published_of_samples(target: Target, name: str, generator: torch.Generator) -> None:
    function, options, published = PUBLISHED_SAMPLES[name]
    tensors = embeddings(13, 6, 6 if "repdistiller" in name else 9, generator)
    against(published, function, options, tuple(x / 2 for x in tensors), target)


@pytest.mark.parametrize("size", [(2, 6, 2, 3), (2, 2, 5, 3)], ids=["channels", "positions"])
@pytest.mark.parametrize("name", PUBLISHED_MAPS)
def test_published_of_maps(target: Target, name: str, size: tuple[int, ...], generator: torch.Generator) -> None:
    function, options, published = PUBLISHED_MAPS[name]
    against(published, function, options, maps(*size, generator), target)


@pytest.mark.parametrize("name", ["squared", "norm"])
def test_published_flow(target: Target, name: str, generator: torch.Generator) -> None:
    options = {} if name == "squared" else {"pool": "max", "distance": "norm"}
    against(flow_squared if name == "squared" else flow_norm, fsp_loss, options, layers(generator), target)


# ------------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("size", [(2, 3, 4, 5), (2, 7, 3, 3)], ids=str)
def test_flows_that_agree_have_no_length_and_no_gradient(
    target: Target, size: tuple[int, ...], generator: torch.Generator
) -> None:
    """Exactly: a length of rounding errors would have a gradient as large as any."""
    first, second = torch.randn(size, generator=generator), torch.randn(size, generator=generator)
    first, second = first.to(target.device), second.to(target.device)
    found = gradients(fsp_loss, first, second, first, second, distance="norm", backend=target.backend)
    assert [float(x.abs().max()) for x in found] == [0.0] * 5


@fused_here
def test_both_sides_of_nst_agree(fused: Target, generator: torch.Generator) -> None:
    """Over positions or over channels, by which are fewer: padding positions with zeros moves it from one to the other."""
    s, t = maps(2, 4, 2, 3, generator)
    over_positions = gradients(nst_loss, s, t, backend=fused.backend)
    padded = gradients(nst_loss, *(F.pad(x, (0, 3)) for x in (s, t)), backend=fused.backend)
    close([padded[0], *(g[..., :3] for g in padded[1:])], over_positions, 3e-6)


def test_invariances(generator: torch.Generator) -> None:
    s, t = embeddings(9, 6, 8, generator)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    for function in SAMPLES.values():
        value = function(s, t)
        torch.testing.assert_close(function(s @ turn, t), value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(function(3 * s, t), value, rtol=1e-4, atol=1e-6)
        assert float(function(s, 2 * s)) < 1e-6


def test_reductions(generator: torch.Generator) -> None:
    s, t = embeddings(7, 4, 5, generator)
    for function in SAMPLES.values():
        torch.testing.assert_close(function(s, t), function(s, t, reduction="sum") / 49)
    s, t = maps(3, 5, 2, 2, generator)
    torch.testing.assert_close(gram_loss(s, t), gram_loss(s, t, reduction="batchmean") / 25)
    torch.testing.assert_close(nst_loss(s, t), nst_loss(s, t, reduction="sum") / 3)
    torch.testing.assert_close(ickd_loss(s, t), ickd_loss(s, t, reduction="sum") / 45)
    first = fsp_loss(s, t, t, s, reduction="sum")
    torch.testing.assert_close(fsp_loss(s, t, t, s), first / 75)


def test_modules(generator: torch.Generator) -> None:
    s, t = embeddings(6, 3, 3, generator)
    for module, function in (
        (kdkernels.SimilarityPreservingLoss(norm="l1"), lambda s, t: similarity_preserving_loss(s, t, norm="l1")),
        (kdkernels.CosineSimilarityMatrixLoss(), cosine_similarity_matrix_loss),
        (kdkernels.CorrelationCongruenceLoss(order=3), lambda s, t: correlation_congruence_loss(s, t, order=3)),
        (kdkernels.PKTLoss(), pkt_loss),
    ):
        assert torch.equal(module(s, t), function(s, t))
    s, t = maps(2, 3, 2, 2, generator)
    assert torch.equal(kdkernels.GramLoss()(s, t), gram_loss(s, t))
    assert torch.equal(kdkernels.NSTLoss()(s, t), nst_loss(s, t))
    assert torch.equal(kdkernels.ICKDLoss()(s, t), ickd_loss(s, t))
    assert torch.equal(kdkernels.FSPLoss(distance="norm")(s, t, t, s), fsp_loss(s, t, t, s, distance="norm"))


@fused_here
def test_matrices_of_many_tiles(fused: Target, generator: torch.Generator) -> None:
    """Several panels and chunks of everything, and a remainder of each."""
    n = 70 if fused.slow else 300
    s, t = embeddings(n, 300, 41, generator)
    for function in (similarity_preserving_loss, pkt_loss):
        exact = gradients(function, s.to(F64), t.to(F64))
        got = gradients(function, s, t, backend=fused.backend)
        for g, e in zip(got, exact, strict=True):
            assert float((g - e).norm() / e.norm()) < 2e-6


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("width", [32, 31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_go_past_the_caches(
    fused: Target, dtype: torch.dtype, width: int, generator: torch.Generator
) -> None:
    """6 MiB or more: stored in whole lines where rows begin at one, and not all of the last panel's are."""
    n = 13 if dtype == torch.float32 else 26
    s1, s2, t1, t2 = (x.to(dtype) for _ in range(2) for x in maps(n, 130, 31, width, generator))
    for function, inputs in ((gram_loss, (s1, t1)), (fsp_loss, (s1, s2, t1, t2))):
        assert s1.numel() * s1.element_size() >= 6 << 20
        got = gradients(function, *(x.requires_grad_(x is s1 or x is s2) for x in inputs), backend="cpu")
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
        expected = gradients(function, *wide, backend="reference")
        for a, b in zip(got, expected, strict=True):
            rounding = torch.finfo(a.dtype).eps
            torch.testing.assert_close(a.double(), b, rtol=rounding, atol=2e-5 * float(b.abs().max()))


def test_a_long_reduction(generator: torch.Generator) -> None:
    s, t = embeddings(6, 40_001, 70_003, generator)
    exact = gradients(similarity_preserving_loss, s.to(F64), t.to(F64))
    close(gradients(similarity_preserving_loss, s, t, backend="cpu"), exact, 2e-6)


# ------------------------------------------------------------------------------------------------------- hard inputs


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("name", SAMPLES)
def test_few_samples(target: Target, name: str, n: int, generator: torch.Generator) -> None:
    loss, *grads = gradients(SAMPLES[name], *embeddings(n, 4, 6, generator), backend=target.backend)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in grads)
    if n < 2:
        assert abs(float(loss)) < 1e-12
        assert all(float(g.abs().sum()) < 1e-5 for g in grads)


@pytest.mark.parametrize("name", MAPS)
def test_no_maps_and_one_channel(target: Target, name: str, generator: torch.Generator) -> None:
    loss, *grads = gradients(MAPS[name], *maps(0, 3, 2, 2, generator), backend=target.backend)
    assert loss == 0
    assert [g.shape for g in grads] == [(0, 3, 2, 2)] * 2
    loss, *grads = gradients(MAPS[name], *maps(2, 1, 2, 2, generator), backend=target.backend)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_zero_vectors(target: Target, name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    s, t = (x.to(dtype) for x in embeddings(8, 5, 4, generator))
    s[2], t[3] = 0, 0
    s[5], t[5] = 0, 0
    loss, ds, dt = gradients(SAMPLES[name], s, t, backend=target.backend)
    exact = gradients(SAMPLES[name], s.to(F64), t.to(F64), backend="reference")
    assert abs(float(loss) - float(exact[0])) < 2e-6
    if name != "sp":  # there the other samples' rows know of it
        assert not ds[[2, 5]].any()
        assert not dt[[3, 5]].any()
    close([ds, dt], exact[1:], 1e-5 if dtype == torch.float32 else 2e-3)
    nothing = gradients(SAMPLES[name], s * 0, t * 0, backend=target.backend)
    assert nothing[0] == 0
    assert not any(g.any() for g in nothing[1:])


@pytest.mark.parametrize("shape", [(2, 4, 2, 2), (2, 2, 3, 3)], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_dead_channels(target: Target, name: str, shape: tuple[int, ...], generator: torch.Generator) -> None:
    s, t = maps(*shape, generator)
    s[:, 0], t[1] = 0, 0
    got, plain, exact = (
        gradients(MAPS[name], x, y, backend=backend)
        for x, y, backend in ((s, t, target.backend), (s, t, "reference"), (s.to(F64), t.to(F64), "reference"))
    )
    # Over channels NST is a small difference of large numbers, here of one channel's with itself. ICKD's row of a matrix
    # with one channel left is 1 whatever the features, and its gradient what roundings leave: no worse than plain torch's.
    for g, p, e in zip(got, plain, exact, strict=True):
        allowed = 4e-5 * e.abs().max() + 4 * (p - e).abs().max()
        assert float((g.to(e) - e).abs().max()) <= float(allowed)
    if name == "nst":
        assert not got[1][:, 0].any()
        assert not got[2][1].any()


@fused_here
def test_constant_samples_have_no_correlation(fused: Target, generator: torch.Generator) -> None:
    s, t = embeddings(6, 7, 5, generator)
    s[1], t[2] = 0.1, 1e4
    _, ds, dt = gradients(correlation_congruence_loss, s, t, kernel="correlation", backend=fused.backend)
    assert not ds[1].any()
    assert not dt[2].any()
    assert ds.isfinite().all()


@pytest.mark.parametrize("name", [*SAMPLES, *MAPS])
@fused_here
def test_large_norms_in_float16(fused: Target, name: str, generator: torch.Generator) -> None:
    """The products are far above 65504."""
    made = embeddings(8, 40, 30, generator) if name in SAMPLES else maps(2, 4, 5, 3, generator)
    s, t = ((3000 * x).half() for x in made)
    function = {**SAMPLES, **MAPS}[name]
    got = function(s, t, backend=fused.backend)
    exact = function(s.to(F64), t.to(F64), backend="reference")
    assert got.isfinite()
    assert abs(float(got - exact)) <= 2e-6 * float(exact)


@fused_here
def test_float16_with_a_grad_scaler(fused: Target, generator: torch.Generator) -> None:
    """Unscaled, nearly all of this gradient is below the least float16."""
    s, t = embeddings(24, 16, 16, generator)
    s = (100 * s).half().requires_grad_()
    (similarity_preserving_loss(s, t, backend=fused.backend) * 2.0**16).backward()
    exact = gradients(lambda a, b: similarity_preserving_loss(a, b) * 2.0**16, s.detach().to(F64), t.to(F64))[1]
    assert float((s.grad - exact).norm() / exact.norm()) < 2e-3


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_no_setting_of_torch_matters(precision: str, generator: torch.Generator) -> None:
    s, t = embeddings(40, 300, 200, generator)
    before = torch.get_float32_matmul_precision()
    expected = gradients(similarity_preserving_loss, s, t)
    try:
        torch.set_float32_matmul_precision(precision)
        got = gradients(similarity_preserving_loss, s, t)
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# ------------------------------------------------------------------------------------------------------- promises


@pytest.mark.parametrize("case", ["sp-70", "pkt-300", "sp-long", "gram", "nst", "fsp"])
def test_threads_change_no_bit(case: str, generator: torch.Generator) -> None:
    name, _, size = case.partition("-")
    if name in SAMPLES:
        tensors = embeddings(*((12, 70_000, 20_000) if size == "long" else (int(size), 100, 60)), generator)
        function = SAMPLES[name]
    else:
        function = fsp_loss if name == "fsp" else MAPS[name]
        tensors = maps(3, 40, 7, 9, generator) * (2 if name == "fsp" else 1)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gradients(function, *tensors, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_only_what_requires_a_gradient_gets_one(generator: torch.Generator) -> None:
    s, t = embeddings(6, 4, 5, generator)
    both = gradients(pkt_loss, s, t)
    assert torch.equal(gradients(pkt_loss, s.clone().requires_grad_(), t)[1], both[1])
    assert torch.equal(gradients(pkt_loss, s, t.clone().requires_grad_())[1], both[2])
    assert not pkt_loss(s, t).requires_grad
    tensors = layers(generator)
    every = gradients(fsp_loss, *tensors)
    for i in range(4):
        one = [x.clone().requires_grad_(j == i) for j, x in enumerate(tensors)]
        assert torch.equal(gradients(fsp_loss, *one)[1], every[1 + i])


def test_retained_graph_and_any_upstream(generator: torch.Generator) -> None:
    s, t = embeddings(7, 6, 6, generator)
    s.requires_grad_()
    loss = similarity_preserving_loss(s, t)
    (once,) = torch.autograd.grad(loss, s, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, s, torch.tensor(2.0), retain_graph=True)
    (again,) = torch.autograd.grad(loss, s)
    assert torch.equal(once, again)
    torch.testing.assert_close(twice, 2 * once)


def test_second_derivative_is_refused(generator: torch.Generator) -> None:
    s, t = embeddings(6, 3, 3, generator)
    s.requires_grad_()
    (grad,) = torch.autograd.grad(pkt_loss(s, t), s, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()
    x = s.detach().double().requires_grad_()
    (grad,) = torch.autograd.grad(pkt_loss(x, t.double(), backend="reference"), x, create_graph=True)
    grad.pow(2).sum().backward()
    assert x.grad.isfinite().all()


@fused_here
def test_any_strides(fused: Target, generator: torch.Generator) -> None:
    s, t = embeddings(9, 16, 12, generator)
    expected = gradients(similarity_preserving_loss, s, t, backend=fused.backend)
    for view in (s.t().contiguous().t(), torch.cat([s, s], 1)[:, :16], torch.stack([s, s], 2)[..., 0]):
        close(gradients(similarity_preserving_loss, view, t, backend=fused.backend), expected, 1e-6)
    assert pkt_loss(s[:1].expand(4, 16), t[:4], backend=fused.backend).isfinite()
    for shape in ((2, 5, 2, 3), (2, 2, 3, 4)):
        s, t = maps(*shape, generator)
        for function in MAPS.values():
            expected = gradients(function, s, t, backend=fused.backend)
            last = [x.contiguous(memory_format=torch.channels_last) for x in (s, t)]
            close(gradients(function, *last, backend=fused.backend), expected, 1e-5)
            cut = [torch.cat([x, x], 3)[..., : shape[3]] for x in (s, t)]
            close(gradients(function, *cut, backend=fused.backend), expected, 1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_operator(generator: torch.Generator) -> None:
    op = torch.ops.kdkernels.gram_match.default
    s, t = (torch.randn(2, 5, k, generator=generator) for k in (4, 6))
    scalars = torch.tensor([1.0, 1.0, 1.0, 1e-7, 0.4])
    torch.library.opcheck(op, (s, t, None, None, scalars, 4, 2, 0, 3, "cpu"))
    torch.library.opcheck(op, (s.half(), t, None, None, scalars, 1, 1, 2, 1, "cpu"))
    torch.library.opcheck(op, (s[0], t[1].half(), None, None, scalars, 2, 0, 0, 2, "cpu"))
    torch.library.opcheck(op, (s.mT, s.mT, None, None, scalars, 0, 3, 0, 3, "cpu"))
    torch.library.opcheck(op, (s, s[:, :2], None, None, scalars, 5, 1, 0, 3, "cpu"))
    torch.library.opcheck(op, (s, t, s[:, :3], t[:, :3], scalars, 0, 0, 0, 15, "cpu"))


@pytest.mark.parametrize("name", [*SAMPLES, *MAPS, "fsp"])
def test_compiles_in_one_graph(name: str, generator: torch.Generator) -> None:
    function = {**SAMPLES, **MAPS, "fsp": fsp_loss}[name]
    tensors = embeddings(7, 5, 6, generator) if name in SAMPLES else maps(2, 3, 2, 3, generator)
    tensors = layers(generator) if name == "fsp" else tensors
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    close(gradients(compiled, *tensors), gradients(function, *tensors), 1e-6)


def test_another_gamma_does_not_recompile(generator: torch.Generator) -> None:
    s, t = embeddings(7, 5, 6, generator)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(correlation_congruence_loss, backend=counter, fullgraph=True)
    for gamma in (0.3, 0.4, 0.5, 0.6):
        torch.testing.assert_close(compiled(s, t, gamma=gamma), correlation_congruence_loss(s, t, gamma=gamma))
    assert counter.frame_count <= 2  # a number is taken for a constant the first time


# ------------------------------------------------------------------------------------------------------- bad arguments


def test_errors(generator: torch.Generator) -> None:
    s, t = embeddings(5, 3, 4, generator)
    for function in SAMPLES.values():
        refuses_bad_samples(function, s, t, positive="eps")
        with pytest.raises(TypeError, match="eps must be a number"):
            function(s, t, eps=torch.tensor(1.0))
    with pytest.raises(ValueError, match="unknown norm 'max'"):
        similarity_preserving_loss(s, t, norm="max")
    with pytest.raises(ValueError, match="unknown kernel"):
        correlation_congruence_loss(s, t, kernel="rbf")
    with pytest.raises(ValueError, match="order must be at least 0, got -1"):
        correlation_congruence_loss(s, t, order=-1)
    with pytest.raises(ValueError, match="gamma must be positive"):
        correlation_congruence_loss(s, t, gamma=-0.4)
    with pytest.raises(ValueError, match="student has 3 and teacher 4"):
        correlation_congruence_loss(s, t, kernel="neighbours")
    with pytest.raises(kdkernels.BackendError, match="cpu"):
        pkt_loss(s.double(), t, backend="cpu")


def test_sums_over_many_features() -> None:
    """Sixteen thousand products a sum: each group of them is rounded before it meets a sum of all."""
    s, t = embeddings(24, 16384, 24577, torch.Generator().manual_seed(2))

    def eager(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(F.normalize(s @ s.t(), dim=1), F.normalize(t @ t.t(), dim=1))

    exact = gradients(similarity_preserving_loss, s.double(), t.double(), backend="reference")
    for got, plain, truth in zip(
        gradients(similarity_preserving_loss, s, t), gradients(eager, s, t), exact, strict=True
    ):
        assert_accurate(got, truth, Level().seen(plain, truth), "of 16384 features")


def test_errors_of_maps(generator: torch.Generator) -> None:
    s, t = maps(3, 4, 2, 2, generator)
    for function in MAPS.values():
        with pytest.raises(ValueError, match="student has 3 and teacher 2"):
            function(s, t[:2])
        with pytest.raises(ValueError, match=r"student must be feature maps, .* got shape \(4, 2\)"):
            function(s[0, :, 0], t)
        with pytest.raises(ValueError, match="at least one channel and one position"):
            function(s, t[:, :, :0])
        with pytest.raises(TypeError, match="student must be float16"):
            function(s.long(), t)
        with pytest.raises(ValueError, match="unknown reduction"):
            function(s, t, reduction="none")
    for function in (gram_loss, ickd_loss):
        with pytest.raises(ValueError, match="same number of channels: student has 4 and teacher 3"):
            function(s, t[:, :3])
    with pytest.raises(ValueError, match=r"\(N, C, H, W\) where maps differ in size"):
        nst_loss(s.flatten(2), t)
    with pytest.raises(ValueError, match="student_first has 3 and teacher_second 2"):
        fsp_loss(s, s, t, t[:2])
    with pytest.raises(
        ValueError, match="student_second and teacher_second must have the same number of channels, got 4 and 3"
    ):
        fsp_loss(s, s, t, t[:, :3])
    with pytest.raises(ValueError, match="unknown pool"):
        fsp_loss(s, s, t, t, pool="min")
