"""What the softmax divergences are as mathematics, and the published formulas they reproduce."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from targets import Target

import kdkernels as kd

BACKENDS = ("reference", "cpu")
settings = hypothesis.settings(max_examples=25, deadline=None)

DIVERGENCES = {
    "kl_div": kd.kl_div,
    "reverse_kl_div": kd.reverse_kl_div,
    "symmetric_kl_div": kd.symmetric_kl_div,
    "js_div": kd.js_div,
    "generalized_js_div": lambda *a, **k: kd.generalized_js_div(*a, beta=0.3, **k),
    "skew_kl_div": kd.skew_kl_div,
    "skew_reverse_kl_div": kd.skew_reverse_kl_div,
    "total_variation": kd.total_variation,
    "alpha_beta_div": kd.alpha_beta_div,
}


@st.composite
def logits(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    rows, classes = draw(st.integers(1, 5)), draw(st.integers(2, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.1, 1.0, 5.0]))
    return tuple(spread * torch.randn(rows, classes, generator=generator) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIVERGENCES)
@settings
@hypothesis.given(pair=logits(), shift=st.floats(-20, 20))
def test_is_a_divergence_of_distributions(name, backend, pair, shift):
    student, teacher = pair
    divergence = DIVERGENCES[name]
    student.requires_grad_()
    value = divergence(student, teacher, reduction="none", backend=backend)
    assert (value >= -1e-6).all()
    value.sum().backward()
    assert student.grad is not None
    # The softmax of a row does not see a constant, so neither does the gradient: what is left is rounding, of terms
    # as large as the log-ratio of the probabilities.
    ratio = (student.detach().log_softmax(-1) - teacher.log_softmax(-1)).abs().amax(-1)
    assert (student.grad.double().sum(-1).abs() <= 1e-6 * (1 + ratio)).all()
    shifted = divergence(student.detach() + shift, teacher, reduction="none", backend=backend)
    torch.testing.assert_close(shifted, value.detach(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIVERGENCES)
@settings
@hypothesis.given(pair=logits())
def test_is_zero_where_and_only_where_both_agree(name, backend, pair):
    student, teacher = pair
    same = teacher.clone().requires_grad_()
    value = DIVERGENCES[name](same, teacher, reduction="none", backend=backend)
    torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-6, rtol=0)
    value.sum().backward()
    torch.testing.assert_close(same.grad, torch.zeros_like(teacher), atol=1e-6, rtol=0)
    distance = (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)
    apart = distance > 0.05
    assert (DIVERGENCES[name](student, teacher, reduction="none", backend=backend)[apart] > 1e-5).all()


@pytest.mark.parametrize("backend", BACKENDS)
@settings
@hypothesis.given(pair=logits())
def test_inequalities_between_divergences(backend, pair):
    student, teacher = pair
    js = kd.js_div(student, teacher, reduction="none", backend=backend)
    tv = kd.total_variation(student, teacher, reduction="none", backend=backend)
    kl = kd.kl_div(student, teacher, reduction="none", backend=backend)
    assert (js <= math.log(2) + 1e-6).all()
    assert (tv <= 1 + 1e-6).all()
    assert (2 * tv**2 <= kl + 1e-6).all()  # Pinsker, as near to equality as two rounded values can tell
    assert (js <= tv * math.log(2) + 1e-5).all()  # Lin


@pytest.mark.parametrize("backend", BACKENDS)
@settings
@hypothesis.given(pair=logits())
def test_symmetries(backend, pair):
    def swapped(function, **options):
        a = function(*pair, reduction="none", backend=backend, **options)
        b = function(*reversed(pair), reduction="none", backend=backend, **options)
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)

    swapped(kd.js_div)
    swapped(kd.total_variation)
    swapped(kd.symmetric_kl_div, ratio=0.5)
    torch.testing.assert_close(
        kd.reverse_kl_div(*pair, backend=backend), kd.kl_div(*reversed(pair), backend=backend), atol=2e-6, rtol=1e-5
    )
    torch.testing.assert_close(
        kd.alpha_beta_div(*pair, alpha=0.3, beta=0.8, backend=backend),
        kd.alpha_beta_div(*reversed(pair), alpha=0.8, beta=0.3, backend=backend), atol=2e-6, rtol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "same"),
    [
        (lambda s, t, **k: kd.generalized_js_div(s, t, beta=0.0, **k), kd.kl_div),
        (lambda s, t, **k: kd.generalized_js_div(s, t, beta=1.0, **k), kd.reverse_kl_div),
        (lambda s, t, **k: kd.skew_kl_div(s, t, skew=0.0, **k), kd.kl_div),
        (lambda s, t, **k: kd.skew_reverse_kl_div(s, t, skew=0.0, **k), kd.reverse_kl_div),
        (lambda s, t, **k: kd.symmetric_kl_div(s, t, ratio=1.0, **k), kd.kl_div),
        (lambda s, t, **k: kd.symmetric_kl_div(s, t, ratio=0.0, **k), kd.reverse_kl_div),
        (lambda s, t, **k: kd.alpha_beta_div(s, t, alpha=1.0, beta=0.0, **k), kd.kl_div),
        (lambda s, t, **k: kd.alpha_beta_div(s, t, alpha=0.0, beta=1.0, **k), kd.reverse_kl_div),
        (lambda s, t, **k: kd.generalized_js_div(s, t, beta=0.5, **k), kd.js_div),
    ],
    ids=["jsd-0", "jsd-1", "skew-0", "skew-reverse-0", "symmetric-1", "symmetric-0", "ab-1-0", "ab-0-1", "jsd-half"],
)
def test_limits_are_exact(fused: Target, generator, limit, same):
    student, teacher = (3 * torch.randn(5, 37, generator=generator).to(fused.device) for _ in range(2))
    results = []
    for function in (limit, same):
        s = student.clone().requires_grad_()
        loss = function(s, teacher, temperature=2.0, reduction="sum", backend=fused.backend)
        loss.backward()
        results.append((loss.detach(), s.grad))
    torch.testing.assert_close(results[0], results[1], atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 1e-3, 0.5])
@pytest.mark.parametrize("beta", [0.0, 1e-6, -1e-3, 0.7])
def test_alpha_beta_loses_nothing_near_its_limits(fused, generator, alpha, beta):
    student, teacher = (torch.randn(4, 33, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = student.log_softmax(-1), teacher.log_softmax(-1)
    # The integral form has no division: f = (b - a)^2 times the integral of exp over a triangle of exponents.
    nodes = torch.stack([(alpha + beta) * a, alpha * b + beta * a, (alpha + beta) * b])
    points, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(24))
    u, w = torch.meshgrid((points + 1) / 2, (points + 1) / 2, indexing="ij")
    area = torch.outer(weights, weights) / 4 * u  # the square's point (u, w) is the triangle's (1 - u, u - u w, u w)
    triangle = torch.stack([1 - u, u - u * w, u * w])
    integral = torch.einsum("ij,nvij->nv", area, torch.einsum("kij,knv->nvij", triangle, nodes).exp())
    expected = ((b - a) ** 2 * integral).sum(-1).mean()
    student, teacher = student.float().to(fused.device), teacher.float().to(fused.device)
    got = kd.alpha_beta_div(student, teacher, alpha=alpha, beta=beta, backend=fused.backend)
    torch.testing.assert_close(got.double().cpu(), expected, rtol=3e-6, atol=1e-7)


def mdistiller_dkd(student, teacher, labels, temperature, alpha, beta):
    """The formula as the authors' code computes it: probabilities, masks, a large negative logit for the label."""
    own = F.one_hot(labels, student.shape[-1]).bool()
    p, q = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    p2 = torch.stack([p[own], p.masked_fill(own, 0).sum(-1)], -1)
    q2 = torch.stack([q[own], q.masked_fill(own, 0).sum(-1)], -1)
    target = F.kl_div(p2.log(), q2, reduction="sum")
    rest = F.kl_div(
        (student / temperature - 1000.0 * own).log_softmax(-1), (teacher / temperature - 1000.0 * own).softmax(-1),
        reduction="sum",
    )  # fmt: skip
    return (alpha * target + beta * rest) * temperature**2 / len(labels)


def test_decoupled_kd_is_the_authors(fused: Target, generator):
    student, teacher = (2 * torch.randn(6, 20, generator=generator).to(fused.device) for _ in range(2))
    labels = torch.randint(0, 20, (6,), generator=generator).to(fused.device)
    expected = mdistiller_dkd(student.double(), teacher.double(), labels, 4.0, 1.0, 8.0)
    got = kd.decoupled_kd_loss(student, teacher, labels, 4.0, 1.0, 8.0, backend=fused.backend)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    warm = kd.decoupled_kd_loss(student, teacher, labels, 4.0, 1.0, 8.0, epoch=5, backend=fused.backend)
    torch.testing.assert_close(warm, got / 4, rtol=1e-6, atol=0)


def test_decoupled_kd_is_finite_for_two_classes_and_for_a_certain_teacher(fused: Target, generator):
    student = torch.randn(5, 2, generator=generator).to(fused.device).requires_grad_()
    teacher = torch.tensor([[60.0, -60.0]] * 5, device=fused.device)
    labels = torch.tensor([0, 1, 0, 1, 0], device=fused.device)
    loss = kd.decoupled_kd_loss(student, teacher, labels, 1.0, backend=fused.backend)
    loss.backward()
    p = student.detach().double().softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    q = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], device=fused.device, dtype=torch.float64)
    expected = F.binary_cross_entropy(p, q)  # the only other class has no distribution of its own
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert student.grad is not None and student.grad.isfinite().all()


def test_channel_wise_survives_what_underflows_in_probabilities(fused: Target):
    student = torch.zeros(1, 2, 4, 4, device=fused.device)
    student[..., 0, 0] = 500.0
    student.requires_grad_()
    loss = kd.channel_wise_div(
        student, torch.zeros(1, 2, 4, 4, device=fused.device), temperature=1.0, backend=fused.backend
    )
    loss.backward()
    expected = 15 / 16 * 500 - math.log(16)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert student.grad is not None and student.grad.isfinite().all()


def test_pixel_wise_forms_differ_by_the_teachers_entropy(fused: Target, generator):
    student, teacher = (torch.randn(2, 5, 3, 4, generator=generator).to(fused.device) for _ in range(2))
    kl = kd.pixel_wise_div(student, teacher, reduction="map", backend=fused.backend)
    soft = kd.pixel_wise_div(student, teacher, form="soft_cross_entropy", reduction="map", backend=fused.backend)
    p = teacher.double().softmax(1)
    entropy = -(p * p.log()).sum() / 12
    torch.testing.assert_close((soft - kl).double(), entropy, rtol=1e-5, atol=1e-5)
    # structure_kd: -sum softmax(t) log_softmax(s) / (W H)
    torch.testing.assert_close(soft.double(), -(p * student.double().log_softmax(1)).sum() / 12, rtol=1e-5, atol=1e-5)


def test_lwf_mixes_uniform_mass_into_the_student(fused: Target, generator):
    student, teacher = (4 * torch.randn(6, 9, generator=generator).to(fused.device) for _ in range(2))
    p = student.double().softmax(-1).pow(1 / 2)
    q = teacher.double().softmax(-1).pow(1 / 2)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    p = p + 1e-2 / 9
    expected = -(q * (p / p.sum(-1, keepdim=True)).log()).sum(-1).mean()
    got = kd.lwf_loss(student, teacher, uniform=1e-2, backend=fused.backend)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_auxiliary_heads_sum_over_heads_and_leave_the_teacher_alone(fused: Target, generator):
    heads = torch.randn(3, 4, 7, generator=generator).to(fused.device).requires_grad_()
    teacher = torch.randn(4, 7, generator=generator).to(fused.device).requires_grad_()
    labels = torch.tensor([1, -100, 6, 0], device=fused.device)
    maps = [torch.randn(4, 2, 3, generator=generator).to(fused.device).requires_grad_() for _ in range(4)]
    loss = kd.auxiliary_heads_loss(
        heads, teacher, labels, head_features=maps[:3], teacher_feature=maps[3], beta=1e-2, backend=fused.backend
    )
    loss.backward()
    kept = labels != -100
    target = (teacher.double() / 3).softmax(-1)
    expected = torch.zeros((), dtype=torch.float64, device=fused.device)
    for head, feature in zip(heads.double(), maps[:3], strict=True):
        soft = -(target * (head / 3).log_softmax(-1)).sum(-1)[kept].mean()
        expected = expected + 0.9 * F.cross_entropy(head, labels) + 0.1 * 9 * soft
        positive = (feature > 0) | (maps[3] > 0)
        expected = expected + 1e-2 * ((feature - maps[3]).double().square() * positive).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert teacher.grad is None and maps[3].grad is None
    listed = kd.auxiliary_heads_loss(list(heads), teacher, labels, backend=fused.backend)
    torch.testing.assert_close(listed, kd.auxiliary_heads_loss(heads, teacher, labels, backend=fused.backend))


@pytest.mark.parametrize("name", ["reverse_kl", "js", "total_variation", "alpha_beta", "decoupled_kl"])
def test_any_divergence_can_be_the_soft_term(fused: Target, generator, name):
    student, teacher = (torch.randn(5, 30, generator=generator).to(fused.device) for _ in range(2))
    labels = torch.randint(0, 30, (5,), generator=generator).to(fused.device)
    labels[2] = -100
    alone = {
        "reverse_kl": kd.reverse_kl_div,
        "js": kd.js_div,
        "total_variation": kd.total_variation,
        "alpha_beta": kd.alpha_beta_div,
        "decoupled_kl": kd.decoupled_kd_loss,
    }[name]
    both = kd.distillation_loss(student, teacher, labels, 3.0, 0.4, divergence=name, backend=fused.backend)
    soft = alone(student, teacher, temperature=3.0, labels=labels, backend=fused.backend)
    torch.testing.assert_close(both, 0.6 * F.cross_entropy(student, labels) + 0.4 * soft, rtol=1e-5, atol=1e-6)


def test_parameters_anneal_without_recompiling(generator):
    student, teacher = (torch.randn(4, 10, generator=generator) for _ in range(2))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(s, t, beta, temperature):
        return kd.generalized_js_div(s, t, beta=beta, temperature=temperature)

    torch._dynamo.reset()
    for k in range(5):
        beta, temperature = 0.1 + 0.15 * k, 1.5 + 0.5 * k
        s = student.clone().requires_grad_()
        loss = step(s, teacher, beta, temperature)
        loss.backward()
        expected = kd.generalized_js_div(student, teacher, beta=beta, temperature=temperature)
        torch.testing.assert_close(loss.detach(), expected)
    assert counter.frame_count <= 2, "one compilation, and at most one more when the numbers turn out to change"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, t, y: kd.generalized_js_div(s, t, beta=1.5), ValueError, "beta must be between 0 and 1"),
        (lambda s, t, y: kd.skew_kl_div(s, t, skew=-0.1), ValueError, "skew must be between 0 and 1"),
        (lambda s, t, y: kd.alpha_beta_div(s, t, alpha=math.nan), ValueError, "alpha must be finite"),
        (lambda s, t, y: kd.symmetric_kl_div(s, t, ratio="half"), TypeError, "ratio must be a number"),
        (lambda s, t, y: kd.distillation_loss(s, t, y, divergence="jensen"), ValueError, "unknown divergence 'jensen'"),
        (
            lambda s, t, y: kd.distillation_loss(s, t, y, divergence="js", divergence_options={"skew": 0.1}),
            ValueError, "has no option 'skew'",
        ),
        (lambda s, t, y: kd.decoupled_kd_loss(s, t, None), TypeError, "labels must be a tensor"),
        (lambda s, t, y: kd.channel_wise_div(s, t), ValueError, "with a spatial axis"),
        (lambda s, t, y: kd.pixel_wise_div(s[0], t[0]), ValueError, r"must be \(N, V, ...\)"),
        (lambda s, t, y: kd.pixel_wise_div(s, t, form="mse"), ValueError, "unknown form"),
        (lambda s, t, y: kd.lwf_loss(s, t, uniform=-1.0), ValueError, "uniform must be at least 0"),
        (lambda s, t, y: kd.auxiliary_heads_loss(s, t, y), ValueError, "head_logits must be"),
        (lambda s, t, y: kd.auxiliary_heads_loss(s[None], t, y[:-1]), ValueError, "labels must have the shape"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    student, teacher, labels = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0, 1, 2])
    with pytest.raises(error, match=message):
        call(student, teacher, labels)
