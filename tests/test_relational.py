"""The relational losses against their published forms, on hard inputs, and the promises of their kernels."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bad_samples import refuses_bad_samples
from published import close, embeddings
from targets import TARGETS, Target

import kdkernels
from kdkernels import hard_dark_rank_loss, rkd_angle_loss, rkd_distance_loss, rkd_loss
from kdkernels.ops.triplet_angle.spec import make_clusters

FUSED = [t for t in TARGETS if t.fused]
fused_here = pytest.mark.parametrize("fused", FUSED, ids=str)
F64 = torch.float64
LOSSES = {
    "distance": rkd_distance_loss,
    "angle": rkd_angle_loss,
    "both": rkd_loss,
    "rank": hard_dark_rank_loss,
}


def gradients(
    function: Any, student: torch.Tensor, teacher: torch.Tensor, both: bool = False, **options: Any
) -> list[torch.Tensor]:
    student = student.detach().clone().requires_grad_()
    teacher = teacher.detach().clone().requires_grad_(both)
    loss = function(student, teacher, **options)
    return [loss.detach(), *torch.autograd.grad(loss, [student, teacher] if both else [student])]


# ----------------------------------------------------------------------------------------- published forms, in float64


def gram_distances(x: torch.Tensor, squared: bool = False) -> torch.Tensor:
    norms = (x * x).sum(1)
    d = (norms[:, None] + norms[None] - 2 * x @ x.T).clamp(min=1e-12)
    d = d if squared else d.sqrt()
    return d * (1 - torch.eye(len(x), dtype=x.dtype))


def published_distance(student: torch.Tensor, teacher: torch.Tensor, squared: bool = False) -> torch.Tensor:
    s, t = gram_distances(student, squared), gram_distances(teacher, squared)
    return F.smooth_l1_loss(s / s[s > 0].mean(), t / t[t > 0].mean(), reduction="mean")


def published_angle(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    def cosines(x: torch.Tensor) -> torch.Tensor:
        edges = F.normalize(x[None] - x[:, None], dim=2)
        return torch.einsum("ijd,ikd->ijk", edges, edges).flatten()

    return F.smooth_l1_loss(cosines(student), cosines(teacher))


def published_rank(
    student: torch.Tensor, teacher: torch.Tensor, alpha: float = 3.0, beta: float = 3.0, k: int = 4
) -> torch.Tensor:
    s, t = (-alpha * gram_distances(x) ** beta for x in (student, teacher))
    chosen = s.gather(1, t.argsort(1, descending=True)[:, 1 : k + 1])
    total = 0.0
    for m in range(chosen.shape[1]):
        total = total + chosen[:, m].exp().log() - chosen[:, m:].exp().sum(1).log()
    return -total.mean()


def on_sphere(function: Any) -> Any:
    return lambda s, t: function(F.normalize(s), F.normalize(t))


PUBLISHED = {
    "distance": (rkd_distance_loss, {}, published_distance),
    "distance-squared": (rkd_distance_loss, {"squared": True}, lambda s, t: published_distance(s, t, True)),
    "distance-mmrazor": (rkd_distance_loss, {"normalize": True}, on_sphere(published_distance)),
    "angle": (rkd_angle_loss, {}, published_angle),
    "angle-mmrazor": (rkd_angle_loss, {"normalize": True}, on_sphere(published_angle)),
    "rkd": (rkd_loss, {}, lambda s, t: published_distance(s, t) + 2 * published_angle(s, t)),
    "rkd-repdistiller": (
        rkd_loss,
        {"distance_weight": 25, "angle_weight": 50},
        lambda s, t: 25 * published_distance(s, t) + 50 * published_angle(s, t),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(target: Target, name: str, generator: torch.Generator) -> None:
    function, options, published = PUBLISHED[name]
    s, t = embeddings(13, 6, 9, generator)
    expected = gradients(published, s.to(F64), t.to(F64), both=True)
    close(gradients(function, s, t, both=True, **options, backend=target.backend), expected, 2e-6)
    if target.backend == "reference":
        close(gradients(function, s.to(F64), t.to(F64), both=True, **options), expected, 1e-9)


@pytest.mark.parametrize("options", [{}, {"alpha": 2.0}, {"alpha": 1.0, "beta": 2.0, "k": 3}], ids=str)
def test_published_rank(target: Target, options: dict[str, float], generator: torch.Generator) -> None:
    s, t = (x / 4 for x in embeddings(13, 6, 9, generator))
    expected = gradients(lambda s, t: published_rank(s, t, **options), s.to(F64), t.to(F64))
    close(gradients(hard_dark_rank_loss, s, t, **options, backend=target.backend), expected, 3e-6)


# ------------------------------------------------------------------------------------------------------- variants


def test_pairs_of_one_class_are_a_mask(generator: torch.Generator) -> None:
    s, t = embeddings(11, 4, 5, generator)
    labels = torch.randint(0, 3, (11,), generator=generator)
    mask = labels[:, None] == labels[None]
    by_labels = rkd_distance_loss(s, t, labels=labels, reduction="pairs")
    assert torch.equal(by_labels, rkd_distance_loss(s, t, mask=mask, reduction="pairs"))
    ds, dt = torch.cdist(s.double(), s.double()), torch.cdist(t.double(), t.double())
    kept = mask & ~torch.eye(11, dtype=torch.bool)
    expected = F.smooth_l1_loss(ds[kept] / ds[kept].mean(), dt[kept] / dt[kept].mean())
    assert abs(float(by_labels) - float(expected)) < 1e-6
    assert rkd_distance_loss(s, t, mask=torch.zeros(11, 11), reduction="pairs") == 0


def test_reductions(generator: torch.Generator) -> None:
    s, t = embeddings(9, 4, 5, generator)
    total = rkd_distance_loss(s, t, reduction="sum")
    torch.testing.assert_close(rkd_distance_loss(s, t), total / 81)
    torch.testing.assert_close(rkd_distance_loss(s, t, reduction="pairs"), total / 72)
    torch.testing.assert_close(rkd_angle_loss(s, t), rkd_angle_loss(s, t, reduction="sum") / 729)
    rows = hard_dark_rank_loss(s, t, reduction="none")
    assert rows.shape == (9,)
    torch.testing.assert_close(hard_dark_rank_loss(s, t), rows.mean())


def test_modules(generator: torch.Generator) -> None:
    s, t = embeddings(6, 3, 3, generator)
    assert torch.equal(kdkernels.RKDDistanceLoss(squared=True)(s, t), rkd_distance_loss(s, t, squared=True))
    assert torch.equal(kdkernels.RKDAngleLoss()(s, t), rkd_angle_loss(s, t))
    assert torch.equal(kdkernels.RKDLoss(angle_weight=50)(s, t), rkd_loss(s, t, angle_weight=50))
    assert torch.equal(kdkernels.HardDarkRankLoss(alpha=2.0)(s, t), hard_dark_rank_loss(s, t, alpha=2.0))


def test_maps_are_flattened(generator: torch.Generator) -> None:
    s, t = torch.randn(5, 2, 3, 3, generator=generator), torch.randn(5, 4, 2, 2, generator=generator)
    assert torch.equal(rkd_loss(s, t), rkd_loss(s.flatten(1), t.flatten(1)))


# ------------------------------------------------------------------------------------------------------- hard inputs


@pytest.mark.parametrize("spread", [0.1, 0.01, 0.001])
@fused_here
def test_angle_gradient_on_clusters(fused: Target, spread: float, generator: torch.Generator) -> None:
    """Plain float32 distances would be off by 5e-7 to 5e-5 here."""
    inputs = make_clusters(spread)((24, 32), generator)
    s, t = inputs["student"], inputs["teacher"]
    exact = gradients(rkd_angle_loss, s.to(F64), t.to(F64), backend="reference")[1]
    got = gradients(rkd_angle_loss, s, t, backend=fused.backend)[1]
    assert float((got - exact).norm() / exact.norm()) < 3e-7


@fused_here
def test_far_from_the_origin(fused: Target, generator: torch.Generator) -> None:
    s, t = (x + 1e4 / x.shape[1] ** 0.5 for x in embeddings(20, 16, 16, generator))
    for function in (rkd_angle_loss, rkd_distance_loss):
        exact = gradients(function, s.to(F64), t.to(F64), backend="reference")[1]
        got = gradients(function, s, t, backend=fused.backend)[1]
        assert float((got - exact).norm() / exact.norm()) < 4e-7


@pytest.mark.parametrize("who", ["student", "teacher", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@fused_here
def test_duplicates(fused: Target, who: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Samples that coincide in one model only: cosine 0, counted, and no gradient through it."""
    s, t = (x.to(dtype) for x in embeddings(9, 5, 5, generator))
    for name, x in (("student", s), ("teacher", t)):
        if who in (name, "both"):
            x[4], x[7] = x[1], x[1]
    exact = gradients(rkd_angle_loss, s.to(F64), t.to(F64), both=True, backend="reference")
    assert abs(float(exact[0]) - float(published_angle(s.to(F64), t.to(F64)))) < 1e-12
    tolerance = 2e-6 if dtype == torch.float32 else 0.01
    close(gradients(rkd_angle_loss, s, t, both=True, backend=fused.backend), exact, tolerance)


@fused_here
def test_duplicates_without_a_least_distance(fused: Target, generator: torch.Generator) -> None:
    """They are no part of the mean of positive distances, and have no slope."""

    def published(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        a, b = (torch.cdist(x, x) for x in (student, teacher))
        return F.smooth_l1_loss(a / a[a > 0].mean(), b / b[b > 0].mean())

    s, t = embeddings(9, 5, 5, generator)
    s[4], t[7] = s[1], t[2]
    exact = gradients(published, s.to(F64), t.to(F64), both=True)
    close(gradients(rkd_distance_loss, s, t, both=True, eps=0.0, backend=fused.backend), exact, 2e-6)


@fused_here
@pytest.mark.parametrize("options", [{}, {"beta": 0.25, "reduction": "sum"}], ids=["mean", "sum"])
@pytest.mark.parametrize("loss", ["distance", "angle", "both"])
def test_models_that_agree_have_no_gradient(
    fused: Target, loss: str, options: dict[str, Any], generator: torch.Generator
) -> None:
    """Exactly: the rounding of one model's product, less the other's, would be a slope that every triplet shares."""
    near = make_clusters(0.001)((7, 6), generator)["student"]  # in two floats, not in integers
    for x in (near, *(embeddings(n, 6, 6, generator)[0] for n in ((6,) if fused.slow else (19, 200)))):
        for value in gradients(LOSSES[loss], x, x, both=True, backend=fused.backend, **options):
            assert not value.any()


@pytest.mark.parametrize("copies, spread", [(1, 1.0), (4, 1.0), (4, 0.001), (19, 1.0)])
def test_many_samples(copies: int, spread: float, generator: torch.Generator) -> None:
    """More than 192, and than 1024, go other ways on a CPU, distances of two scales too. Copies change no mean of angles."""
    centres = (torch.arange(56) % 2)[:, None] * (spread < 1)
    s, t = (centres + spread * x for x in embeddings(56, 40, 1030, generator))
    order = torch.arange(56).repeat(copies)[torch.randperm(56 * copies, generator=generator)]
    angle, *by_angle = gradients(published_angle, s.to(F64), t.to(F64), both=True)
    distance, *by_distance = gradients(published_distance, s[order].to(F64), t[order].to(F64), both=True)
    expected = [distance + 2 * angle, *(d + 2 * a[order] / copies for d, a in zip(by_distance, by_angle))]
    close(gradients(rkd_loss, s[order], t[order], both=True, backend="cpu"), expected, 2e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_few_samples(target: Target, loss: str, n: int, generator: torch.Generator) -> None:
    s, t = embeddings(n, 4, 6, generator)
    value, grad = gradients(LOSSES[loss], s, t, backend=target.backend)
    assert value.isfinite()
    assert grad.isfinite().all()
    if n < 2:
        assert value == 0
        assert not grad.any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("content", [0.0, 1.0, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_identical_samples(target: Target, loss: str, content: float, dtype: torch.dtype, normalize: bool) -> None:
    x = torch.full((6, 8), content, dtype=dtype)
    value, grad = gradients(LOSSES[loss], x, x + 0, normalize=normalize, backend=target.backend)
    assert value.isfinite()
    assert not grad.any()


@pytest.mark.parametrize("normalize", [True, False])
def test_nan_in_distances(target: Target, normalize: bool, generator: torch.Generator) -> None:
    """A sample that is NaN is one in the loss, and in the gradient that a GradScaler looks at."""
    s, t = embeddings(5, 4, 4, generator)
    s[2, 1] = torch.nan
    for student, teacher in ((s, t), (t, s)):
        found = gradients(rkd_distance_loss, student, teacher, normalize=normalize, backend=target.backend)
        assert all(x.isnan().any() for x in found)
    assert all(x.isnan().any() for x in gradients(hard_dark_rank_loss, s, t, k=4, backend=target.backend))
    # In the teacher it has no order of its own, and is nobody's neighbour while there are others.
    x, y = t.to(target.device), s.to(target.device)
    rows = hard_dark_rank_loss(x, y, k=3, normalize=normalize, reduction="none", backend=target.backend)
    assert rows.isnan().tolist() == [False, False, True, False, False]
    assert hard_dark_rank_loss(x, y, k=4, normalize=normalize, reduction="none", backend=target.backend).isnan().all()


def test_nan_in_angles(generator: torch.Generator) -> None:
    """Where distances could be integers but for it."""
    s, t = embeddings(8, 4, 4, generator)
    s[2, 1] = torch.nan
    for student, teacher in ((s, t), (t, s)):
        assert all(LOSSES[name](student, teacher, backend="cpu").isnan() for name in ("angle", "both"))


@fused_here
def test_zero_vectors_under_normalisation(fused: Target, generator: torch.Generator) -> None:
    s, t = embeddings(8, 4, 4, generator)
    s[2] = 0
    for function in LOSSES.values():
        _, grad = gradients(function, s, t, normalize=True, backend=fused.backend)
        assert grad.isfinite().all()
        assert not grad[2].any()


@fused_here
def test_large_norms_in_float16(fused: Target, generator: torch.Generator) -> None:
    s, t = (8000 * x for x in embeddings(12, 64, 32, generator))
    got = gradients(rkd_loss, s.half(), t.half(), backend=fused.backend)
    exact = gradients(rkd_loss, s.half().to(F64), t.half().to(F64), backend="reference")
    assert got[0].isfinite()
    assert abs(float(got[0] - exact[0])) < 1e-6 * float(exact[0])


@fused_here
def test_float16_with_a_grad_scaler(fused: Target, generator: torch.Generator) -> None:
    """The gradient is scaled before it is rounded."""
    s, t = embeddings(40, 8, 8, generator)
    s = (500 * s).half().requires_grad_()
    (rkd_angle_loss(s, t, backend=fused.backend) * 2.0**16).backward()
    exact = gradients(lambda a, b: rkd_angle_loss(a, b) * 2.0**16, s.detach().to(F64), t.to(F64))[1]
    assert float((s.grad - exact).norm() / exact.norm()) < 1e-3


# ------------------------------------------------------------------------------------------------------- promises


@pytest.mark.parametrize("n", [5, 64, 131, 300])
@pytest.mark.parametrize("loss", LOSSES)
def test_threads_change_no_bit(loss: str, n: int, generator: torch.Generator) -> None:
    s, t = embeddings(n, 40, 24, generator)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gradients(LOSSES[loss], s, t, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("loss", LOSSES)
@fused_here
def test_order_of_samples(fused: Target, loss: str, generator: torch.Generator) -> None:
    s, t = (x / 3 for x in embeddings(21, 6, 7, generator))
    order = torch.randperm(21, generator=generator)
    value, grad = gradients(LOSSES[loss], s, t, backend=fused.backend)
    shuffled, moved = gradients(LOSSES[loss], s[order], t[order], backend=fused.backend)
    close([shuffled, moved], [value, grad[order]], 5e-6)


def test_retained_graph_and_any_upstream(generator: torch.Generator) -> None:
    s, t = embeddings(10, 6, 6, generator)
    s.requires_grad_()
    loss = rkd_loss(s, t)
    (once,) = torch.autograd.grad(loss, s, retain_graph=True)
    (again,) = torch.autograd.grad(loss, s, torch.tensor(2.0), retain_graph=True)
    (thrice,) = torch.autograd.grad(loss, s)
    assert torch.equal(once, thrice)
    torch.testing.assert_close(again, 2 * once)


def test_second_derivative_is_refused(generator: torch.Generator) -> None:
    s, t = embeddings(6, 3, 3, generator)
    s.requires_grad_()
    for function in (rkd_distance_loss, rkd_angle_loss):
        (grad,) = torch.autograd.grad(function(s, t), s, create_graph=True)
        with pytest.raises(RuntimeError, match="backend='reference'"):
            grad.sum().backward()
        x = s.detach().double().requires_grad_()
        (grad,) = torch.autograd.grad(function(x, t.double(), backend="reference"), x, create_graph=True)
        grad.pow(2).sum().backward()
        assert x.grad.isfinite().all()


def test_strided_embeddings(generator: torch.Generator) -> None:
    s, t = embeddings(9, 16, 12, generator)
    expected = gradients(rkd_loss, s, t)
    for view in (s.t().contiguous().t(), torch.cat([s, s], 1)[:, :16], torch.stack([s, s], 2)[..., 0]):
        close(gradients(rkd_loss, view, t), expected, 1e-6)
    assert rkd_loss(s[:1].expand(4, 16), t[:4]).isfinite()


PEAK = """
import resource, torch
from kdkernels import rkd_angle_loss
torch.set_num_threads(2)
n = {n}
s, t = torch.randn(n, 8, requires_grad=True), torch.randn(n, 8)
rkd_angle_loss(s[:8], t[:8]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rkd_angle_loss(s, t, backend="cpu").backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_is_quadratic() -> None:
    """N x N matrices and packed rows, not N^3: 4 bytes each would be 1.7 GB here."""
    n = 768
    done = subprocess.run([sys.executable, "-c", PEAK.format(n=n)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20 * 4 * n * n


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_operators(generator: torch.Generator) -> None:
    ops = torch.ops.kdkernels
    x, y = (torch.randn(7, 5, generator=generator) for _ in range(2))
    hi, _ = ops.pairwise_distance_forward(x, True, "cpu")
    mask = torch.rand(7, 7, generator=generator)
    torch.library.opcheck(ops.pairwise_distance_forward.default, (x, True, "cpu"))
    torch.library.opcheck(ops.pairwise_distance_forward.default, (x.half(), False, "cpu"))
    torch.library.opcheck(ops.pairwise_distance_backward.default, (x, hi, "cpu"))
    scalars = torch.tensor([1.0, 1.0, 1e-12, 7.0**-3, 1.0])
    for options in ((True, False, True, 1, False, True, False), (True, True, False, 0, True, True, True)):
        torch.library.opcheck(ops.sample_relations.default, (x, y, mask, scalars, *options, "cpu"))


@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_in_one_graph(loss: str, generator: torch.Generator) -> None:
    s, t = embeddings(9, 6, 7, generator)
    compiled = torch.compile(LOSSES[loss], backend="aot_eager", fullgraph=True)
    expected, got = (gradients(f, s, t) for f in (LOSSES[loss], compiled))
    close(got, expected, 1e-6)


# ------------------------------------------------------------------------------------------------------- bad arguments


def test_errors(generator: torch.Generator) -> None:
    s, t = embeddings(5, 3, 4, generator)
    for function in LOSSES.values():
        refuses_bad_samples(function, s, t, positive="beta")
    with pytest.raises(ValueError, match=r"shape \(5, 5\)"):
        rkd_distance_loss(s, t, mask=torch.ones(4, 5))
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        rkd_loss(s, t, labels=torch.zeros(4))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        hard_dark_rank_loss(s, t, k=0)
    with pytest.raises(kdkernels.BackendError, match="cpu"):
        rkd_loss(s.double(), t, backend="cpu")
