"""What is true of the divergence whatever the numbers: hypothesis looks for a counterexample on the CPU kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kdkernels import distillation_loss, kl_div

settings.register_profile(
    "kdkernels",
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("kdkernels")


@st.composite
def scores(draw: Any, largest: float = 30.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two (N, V) tensors of moderate float32 scores: plain, tied, far apart."""
    n, v = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    values = st.one_of(st.floats(-largest, largest, width=32), st.sampled_from([0.0, 1.0, -1.0, largest, -largest]))
    s, t = (torch.tensor(draw(st.lists(values, min_size=n * v, max_size=n * v))).view(n, v) for _ in range(2))
    return s, t


temperatures = st.floats(0.5, 20.0, width=32)


def value_and_gradient(function: Any, s: torch.Tensor, *rest: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    s = s.detach().requires_grad_()
    loss = function(s, *rest, **options)
    loss.sum().backward()
    return loss.detach(), s.grad


def near(x: torch.Tensor, y: torch.Tensor, scale: float = 1.0) -> None:
    torch.testing.assert_close(x, y, rtol=1e-5, atol=4e-6 * scale)


@given(scores(), temperatures)
@example((torch.tensor([[30.0, -30.0]]), torch.tensor([[-30.0, 30.0]])), 0.5)
def test_never_negative(pair: Any, temperature: float) -> None:
    s, t = pair
    loss = kl_div(s, t, temperature=temperature, scale_by_t2=False, reduction="none")
    assert (loss >= -4e-7 * (1 + s.abs().amax() + t.abs().amax()) / temperature).all()


@given(scores(), temperatures)
def test_zero_where_the_models_agree(pair: Any, temperature: float) -> None:
    s, _ = pair
    loss, grad = value_and_gradient(kl_div, s, s.clone(), temperature=temperature, reduction="none")
    assert loss.abs().max() <= 1e-6 * temperature**2
    assert grad.abs().max() <= 1e-6 * temperature


@given(scores(), st.integers(0, 3), st.floats(0.5, 5.0, width=32))
def test_positive_where_they_differ(pair: Any, row: int, step: float) -> None:
    s, _ = pair
    if s.shape[1] < 2:
        return
    t = s.clone()
    t[row % len(s), s[row % len(s)].argmax()] += step
    if (s.softmax(-1) - t.softmax(-1)).abs().max() > 1e-2:
        assert kl_div(s, t, reduction="none")[row % len(s)] > 0


@given(scores(), temperatures, st.integers(-64, 64), st.integers(-64, 64))
def test_a_constant_on_a_row_changes_nothing(pair: Any, temperature: float, a: int, b: int) -> None:
    s, t = ((x * 8).round() / 8 for x in pair)  # so that the sums are exact
    plain = value_and_gradient(kl_div, s, t, temperature=temperature, scale_by_t2=False, reduction="none")
    moved = value_and_gradient(kl_div, s + a, t + b, temperature=temperature, scale_by_t2=False, reduction="none")
    scale = 1 + 100 / temperature  # scores divided by the temperature are rounded
    near(moved[0], plain[0], scale)
    near(moved[1], plain[1], scale)


@given(scores(), temperatures)
def test_a_gradient_row_sums_to_zero(pair: Any, temperature: float) -> None:
    s, t = pair
    _, grad = value_and_gradient(kl_div, s, t, temperature=temperature, reduction="none")
    assert grad.double().sum(-1).abs().max() <= 4e-6 * temperature
    labels = torch.zeros(len(s), dtype=torch.long)
    _, grad = value_and_gradient(distillation_loss, s, t, labels, temperature, label_smoothing=0.1, reduction="none")
    assert grad.double().sum(-1).abs().max() <= 4e-6 * (temperature + 1)


@given(scores(), temperatures)
def test_the_gradient_is_bounded_by_the_temperature(pair: Any, temperature: float) -> None:
    """|T^2 (p_s - p_t) / T| <= T."""
    s, t = pair
    _, grad = value_and_gradient(kl_div, s, t, temperature=temperature, reduction="none")
    assert grad.abs().max() <= temperature * (1 + 1e-6)


@given(scores(), temperatures)
def test_temperature_is_a_scale_of_the_scores(pair: Any, temperature: float) -> None:
    s, t = pair
    whole = kl_div(s, t, temperature=temperature, scale_by_t2=False, reduction="none")
    near(whole, kl_div(s / temperature, t / temperature, reduction="none"), 1 + 60 / temperature)


@given(scores(), st.randoms())
def test_the_order_of_classes_does_not_matter(pair: Any, random: Any) -> None:
    s, t = pair
    order = list(range(s.shape[1]))
    random.shuffle(order)
    plain, grad = value_and_gradient(kl_div, s, t, reduction="none")
    other, moved = value_and_gradient(kl_div, s[:, order], t[:, order], reduction="none")
    near(other, plain, 10)
    near(moved, grad[:, order])


@given(scores(), temperatures, st.data())
def test_alpha_zero_and_one(pair: Any, temperature: float, data: Any) -> None:
    """CE + KD is the cross-entropy at alpha = 0 and the distillation at alpha = 1, gradients included."""
    s, t = pair
    labels = torch.tensor(data.draw(st.lists(st.integers(0, s.shape[1] - 1), min_size=len(s), max_size=len(s))))
    at_0 = value_and_gradient(distillation_loss, s, t, labels, temperature, 0.0)
    hard = value_and_gradient(lambda s: F.cross_entropy(s, labels), s)
    near(at_0[0], hard[0], 10)
    near(at_0[1], hard[1])
    at_1 = value_and_gradient(distillation_loss, s, t, labels, temperature, 1.0)
    soft = value_and_gradient(kl_div, s, t, temperature=temperature)
    near(at_1[0], soft[0], temperature**2)
    near(at_1[1], soft[1], temperature)


@given(scores(), temperatures, st.floats(0, 1, width=32))
def test_alpha_mixes_linearly(pair: Any, temperature: float, alpha: float) -> None:
    s, t = pair
    labels = torch.zeros(len(s), dtype=torch.long)
    ends = [distillation_loss(s, t, labels, temperature, a) for a in (0.0, 1.0)]
    mixed = distillation_loss(s, t, labels, temperature, alpha)
    near(mixed, (1 - alpha) * ends[0] + alpha * ends[1], 10 + temperature**2)


@given(scores(), temperatures)
def test_reductions_are_of_the_rows(pair: Any, temperature: float) -> None:
    s, t = pair
    rows = kl_div(s, t, temperature=temperature, reduction="none").double()
    n, v = s.shape
    for reduction, expected in {
        "sum": rows.sum(),
        "batchmean": rows.sum() / n,
        "rowmean": rows.mean(),
        "mean": rows.sum() / (n * v),
    }.items():
        got = kl_div(s, t, temperature=temperature, reduction=reduction).double()
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-12)


@given(scores(), st.data())
def test_a_mask_is_a_selection(pair: Any, data: Any) -> None:
    s, t = pair
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s))))
    loss, grad = value_and_gradient(kl_div, s, t, weight=mask)
    kept, kept_grad = value_and_gradient(kl_div, s[mask], t[mask])
    assert torch.equal(loss, kept)
    assert torch.equal(grad[mask], kept_grad)
    assert (grad[~mask] == 0).all()


@given(scores())
def test_log_probabilities_are_their_own_logits(pair: Any) -> None:
    s, t = (x.double().log_softmax(-1).float() for x in pair)
    near(kl_div(s, t, from_log_probs=True, reduction="none"), kl_div(s, t, reduction="none"), 20)
