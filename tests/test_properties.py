"""What must hold of every public loss, whatever it is called with: hypothesis looks for a counterexample.

The losses and how to call them come from the registry's cases. A property holds of all losses but those that its table names
with a reason, so that a new loss is held to all of them from its first day.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from targets import SEED

import kdkernels
from kdkernels.losses.module import LossModule
from kdkernels.ops.registry import Case, specs

Inputs = dict[str, torch.Tensor]
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def examples(n: int) -> Callable[[Any], Any]:
    """Few, as there are many losses; KDKERNELS_EXAMPLES=100 takes a hundred times as many. The run's seed draws them."""
    many = n * int(os.environ.get("KDKERNELS_EXAMPLES", "1"))
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    few = settings(deadline=None, max_examples=many, database=None, suppress_health_check=checks)
    return lambda test: seed(SEED)(few(test))


# ---- what is called, and how ----


CASES = [c for s in specs() for c in s.cases]
PUBLIC = {m.__dict__["function"].__func__ for m in LossModule.__subclasses__() if m.__name__ in kdkernels.__all__}
FUNCTIONS = sorted({c.function.__name__ for c in CASES} & {f.__name__ for f in PUBLIC})


def cases_of(name: str) -> list[Case]:
    return [c for c in CASES if c.function.__name__ == name]


def size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


@st.composite
def calls(draw: Any, name: str, first: bool = False) -> tuple[Case, Inputs]:
    """A case of a loss with small inputs, spread out or close together."""
    case = cases_of(name)[0] if first else draw(st.sampled_from(cases_of(name)))
    shape = draw(st.sampled_from(sorted(case.shapes, key=size)[:3]))
    inputs = case.make(shape, torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    given_logs = case.options.get("from_log_probs") or case.options.get("teacher_values_are") == "log_probs"
    far = 3.0 if name.startswith("linear") else 10.0  # scores are a product of two that are scaled
    scale = 1.0 if first or given_logs else draw(st.sampled_from([1.0, 1e-3, far]))
    return case, {n: x * scale if n in case.grads and "variance" not in n else x for n, x in inputs.items()}


def run(case: Case, inputs: Inputs, upstream: float = 1.0, **options: Any) -> tuple[torch.Tensor, Inputs]:
    """The loss, and its gradients by what the case says learns."""
    leaves = {n: x.detach().requires_grad_(n in case.grads) for n, x in inputs.items()}
    loss = case.function(**leaves, **{**case.options, "backend": "cpu", **options})
    learn = [n for n in case.grads if n in leaves]
    grads = torch.autograd.grad(loss, [leaves[n] for n in learn], torch.full_like(loss, upstream), allow_unused=True)
    found = {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(learn, grads, strict=True)}
    return loss.detach(), found


def noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The same for all of a shape, so that models that agree go on doing so."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Rounding:
    """What float32 leaves of a loss and of its gradients at some inputs, by name.

    How far plain PyTorch in float32 is from float64 where each input is off by its own rounding: measured for the few inputs at
    which a result is mostly what cancels.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case, self.inputs = case, inputs

    @functools.cached_property
    def by_name(self) -> dict[str, float]:
        floats = {n: x for n, x in self.inputs.items() if x.is_floating_point()}
        truth, true_grads = run(
            self.case, self.inputs | {n: x.double() for n, x in floats.items()}, backend="reference"
        )
        self.true_sizes = {n: float(x.abs().max()) for n, x in (("loss", truth), *true_grads.items())}
        off: dict[str, float] = {}
        for draw in range(8):
            upstream = 1 + draw / 3
            near = {n: x * (1 + torch.finfo(x.dtype).eps * noise(x.shape, draw)) for n, x in floats.items()}
            loss, grads = run(
                self.case, self.inputs | {n: x.float() for n, x in near.items()}, upstream, backend="reference"
            )
            for n, x, y in (("loss", loss, truth), *((n, g / upstream, true_grads[n]) for n, g in grads.items())):
                off[n] = max(off.get(n, 0.0), float((x.double() - y).abs().max()))
        return off

    def __call__(self, name: str) -> float:
        return 16 * self.by_name[name]  # two results are compared, each of which is a draw


def close(
    got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-4, least: float = 1e-5, *, off: Rounding, of: str = "loss",
    factor: float = 1.0,
) -> None:  # fmt: skip
    """To a share of the largest element, which is what float32 leaves of identities that reorder sums; or to its rounding here.

    Args:
        off, of, factor: both are this name's result at the inputs of `off`, times a factor.
    """
    expected = expected.to(got.dtype)
    allowed = tolerance * max(float(expected.abs().max()) if expected.numel() else 0.0, least)
    if got.shape == expected.shape and not ((got - expected).abs() <= allowed).all():
        allowed += factor * off(of)
    torch.testing.assert_close(got, expected, rtol=0, atol=allowed)


def all_but(reasons: dict[str, str]) -> Any:
    """Every loss that the table has no reason against."""
    assert set(reasons) <= {f.__name__ for f in PUBLIC}, set(reasons) - {f.__name__ for f in PUBLIC}
    return pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in reasons])


def test_every_public_loss_is_here():
    assert {f.__name__ for f in PUBLIC} == set(FUNCTIONS)


# ---- what holds of all ----


@all_but({})
@given(st.data())
@examples(6)
def test_finite_inputs_have_finite_results(name: str, data: Any) -> None:
    case, inputs = data.draw(calls(name))
    loss, grads = run(case, inputs)
    assert loss.isfinite().all(), f"{case.name}: {loss}"
    assert all(g.isfinite().all() for g in grads.values()), case.name


@all_but({})
@given(st.data())
@examples(4)
def test_layout_and_repetition_change_no_value(name: str, data: Any) -> None:
    """Strided copies give the same values; nothing is written into an input; a second run has the same bits."""
    case, inputs = data.draw(calls(name))
    loss, grads = run(case, inputs)
    before = {n: x.clone() for n, x in inputs.items()}
    again, more = run(case, inputs)
    assert torch.equal(loss, again) and all(torch.equal(grads[n], more[n]) for n in grads)
    assert all(torch.equal(x, before[n]) for n, x in inputs.items())

    def strided(x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 0 or not x.is_floating_point():
            return x
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan)
        wide[..., 1::2] = x
        return wide[..., 1::2]

    other, others = run(case, {n: strided(x) for n, x in inputs.items()})
    off = Rounding(case, inputs)
    close(other, loss, off=off)
    for n in grads:
        close(others[n], grads[n], off=off, of=n)


@all_but({})
@given(st.data())
@examples(4)
def test_half_precision_is_its_widened_values(name: str, data: Any) -> None:
    """A loss of half-precision tensors is that of the same numbers in float32, and its gradient that one rounded."""
    case, inputs = data.draw(calls(name))
    dtype = data.draw(st.sampled_from([F16, BF16]))
    half = {n: x.to(dtype) if n in case.grads else x for n, x in inputs.items()}
    loss, grads = run(case, half)
    wide, exact = run(case, {n: x.float() if n in case.grads else x for n, x in half.items()})
    assert loss.dtype == F32 or loss.dtype == torch.float64
    off = Rounding(case, {n: x.float() if n in case.grads else x for n, x in half.items()})
    close(loss, wide, off=off)
    for n in grads:
        assert grads[n].dtype == dtype
        fits = exact[n].abs() < torch.finfo(dtype).max
        assert (grads[n].isinf() | fits).all()
        least = 1e-3 if dtype == F16 else 1e-5
        got, expected = grads[n].float().where(fits, 0.0), exact[n].where(fits, 0.0)
        close(got, expected, 2 * torch.finfo(dtype).eps, least, off=off, of=n)


@all_but({})
@given(st.data(), st.sampled_from([-0.5, 2.0, 1024.0]))
@examples(3)
def test_gradients_are_linear_in_the_upstream_one(name: str, data: Any, upstream: float) -> None:
    case, inputs = data.draw(calls(name))
    _, grads = run(case, inputs)
    _, scaled = run(case, inputs, upstream)
    off = Rounding(case, inputs)
    for n in grads:
        close(scaled[n], upstream * grads[n], 1e-5, off=off, of=n, factor=abs(upstream))


@all_but({})
@given(st.data())
@examples(3)
def test_kernels_and_reference_are_one_loss(name: str, data: Any) -> None:
    case, inputs = data.draw(calls(name))
    loss, grads = run(case, inputs)
    eager, eager_grads = run(case, inputs, backend="reference")
    wide = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    exact, exact_grads = run(case, wide, backend="reference")

    # What cancels in a gradient is as large as 1 over the input. The bar itself is test_numerics.py's; this one is wide, so
    # that chance never meets it.
    size_of = {n: max(float(x.abs().max()), 1e-6) for n, x in inputs.items() if n in case.grads}
    off = Rounding(case, inputs)
    for of, got, plain, truth, least in (
        ("loss", loss, eager, exact, 1e-5),
        *((n, grads[n], eager_grads[n], exact_grads[n], 2e-4 / size_of[n]) for n in grads),
    ):
        allowed = 10 * float((plain.double() - truth).abs().max()) + 1e-5 * float(truth.abs().max()) + least
        if not ((got - truth).abs() <= allowed).all():
            allowed += off(of)
        torch.testing.assert_close(got.double(), truth, rtol=0, atol=allowed)


# ---- signs, and where the least value is ----

NEGATIVE = {
    "variational_information_loss": "the log of a variance below 1",
    "topk_div": "missing='none' is no divergence",
}


@all_but(NEGATIVE)
@given(st.data())
@examples(6)
def test_never_negative(name: str, data: Any) -> None:
    case, inputs = data.draw(calls(name))
    loss, _ = run(case, inputs)
    assert (loss >= -1e-5 * (1 + max(float(x.abs().max()) for x in inputs.values() if x.is_floating_point()))).all()


HARD = "there is a term with labels"
ONE = "there is one model's tensor"
NOT_ZERO = {
    "distillation_loss": HARD, "linear_distillation_loss": HARD, "sequence_loss": HARD, "linear_sequence_loss": HARD,
    "auxiliary_heads_loss": HARD, "margin_ranking_loss": HARD,
    "lwf_loss": "a cross-entropy, whose least value is the teacher's entropy",
    "dist_loss": "what has no spread correlates with nothing, itself included",
    "mutual_kl_div": ONE,
    "soft_cross_entropy": "its least value is the teacher's entropy",
    "seed_loss": "its least value is the teacher's entropy",
    "info_nce_distillation_loss": "a sample's own negatives are left",
    "crd_loss": "a sample's own negatives are left",
    "compress_loss": "the models' queues differ",
    "hard_dark_rank_loss": "a likelihood of ranks, which is below 1 whatever the scores",
    "variational_information_loss": "the log of a variance is left",
    "topk_div": "the teacher is known at k classes only",
    "linear_topk_div": "the teacher is known at k classes only",
    "uld_loss": "the teacher has other classes",
    "cross_image_relation_loss": "the least value of a divergence, but float32's rounding over a small temperature",
}  # fmt: skip


def agreeing(inputs: Inputs) -> Inputs:
    """The same, the teacher's tensors replaced by the student's."""
    return {n: inputs[n.replace("teacher", "student")] if n.startswith("teacher") else x for n, x in inputs.items()}


@all_but(NOT_ZERO)
@given(st.data())
@examples(5)
def test_zero_where_the_models_agree(name: str, data: Any) -> None:
    case, inputs = data.draw(calls(name))
    if "teacher_temperature" in case.options:
        return  # the models differ
    if any(
        n.startswith("teacher") and inputs[n.replace("teacher", "student")].shape != x.shape for n, x in inputs.items()
    ):
        inputs = {n: x for n, x in inputs.items() if not n.startswith("teacher")}
        inputs |= {n.replace("student", "teacher"): x for n, x in inputs.items() if n.startswith("student")}
    inputs = agreeing(inputs)
    loss, grads = run(case, inputs)
    off = Rounding(case, inputs)
    largest = max(1.0, *(float(x.abs().max()) for x in inputs.values() if x.is_floating_point()))
    for of, x, allowed in (("loss", loss, 2e-5 * largest**2), *((n, g, 1e-3 * largest) for n, g in grads.items())):
        if not (x.abs() <= allowed).all():
            allowed += off(of) + off.true_sizes[of]  # an eps may leave something
        assert x.isfinite().all() and x.abs().max() <= allowed, f"{case.name}, {of}: {x.abs().max()}"


# ---- what is the same loss ----

SYMMETRIC = {
    "js_div", "total_variation", "uld_loss", "dist_loss", "hint_loss", "pearson_feature_loss", "attention_transfer_loss",
    "channel_attention_transfer_loss", "hierarchical_context_loss", "cosine_loss", "similarity_preserving_loss",
    "cosine_similarity_matrix_loss", "correlation_congruence_loss", "gram_loss", "ickd_loss", "fsp_loss", "rkd_distance_loss",
    "rkd_angle_loss", "rkd_loss", "global_structure_loss", "pairwise_structure_loss", "margin_mse_loss",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SYMMETRIC))
@given(st.data())
@examples(4)
def test_the_models_may_change_places(name: str, data: Any) -> None:
    """And so do their gradients."""
    case, inputs = data.draw(calls(name, first=True))
    other = {"student": "teacher", "teacher": "student"}

    def swapped(values: Inputs) -> Inputs:
        return {n.replace(m, other[m], 1) if (m := n[:7]) in other else n: x for n, x in values.items()}

    loss, grads = run(case, inputs)
    mirrored, mirrored_grads = run(case, swapped(inputs))
    off = Rounding(case, swapped(inputs))
    close(mirrored, loss, off=off)
    for n, g in swapped(grads).items():
        if n in mirrored_grads:
            close(mirrored_grads[n], g, 1e-3, 1e-4, off=off, of=n)


UNORDERED = {
    "local_structure_loss": "edges name samples by their number",
    "crd_loss": "indices name entries of a bank",
    "auxiliary_heads_loss": "the first axis is heads, and the last of them teaches",
    "fgd_loss": "boxes are lists, one an image",
    "hierarchical_context_loss": "maps come as lists of levels",
    "sequence_loss": "tokens have an order",
    "linear_sequence_loss": "tokens have an order",
}
SHARED = ("_weight", "_bias", "_queue", "_bank", "class_weight", "raw_variance", "queue", "embeddings")


@all_but(UNORDERED)
@given(st.data(), st.randoms(use_true_random=False))
@examples(4)
def test_the_order_of_samples_does_not_matter(name: str, data: Any, random: Any) -> None:
    """Of what lies along the first axis: samples, rows, or peers."""
    case, inputs = data.draw(calls(name, first=True))
    own = [n for n, x in inputs.items() if not n.endswith(SHARED) and x.dim()]
    order = list(range(inputs[own[0]].shape[0]))
    random.shuffle(order)
    loss, grads = run(case, inputs)
    moved, moved_grads = run(case, {n: x[order] if n in own else x for n, x in inputs.items()})
    off = Rounding(case, inputs)
    close(moved, loss[order] if loss.dim() else loss, 1e-3, 1e-3, off=off)
    for n, g in grads.items():
        close(moved_grads[n], g[order] if n in own else g, 1e-3, 1e-3, off=off, of=n)


SOFTMAX = {  # a constant on a row of scores changes nothing: where the classes are
    "kl_div": -1, "reverse_kl_div": -1, "symmetric_kl_div": -1, "js_div": -1, "generalized_js_div": -1, "skew_kl_div": -1,
    "skew_reverse_kl_div": -1, "total_variation": -1, "alpha_beta_div": -1, "soft_cross_entropy": -1, "distillation_loss": -1,
    "decoupled_kd_loss": -1, "lwf_loss": -1, "dist_loss": -1, "mutual_kl_div": -1, "auxiliary_heads_loss": -1, "uld_loss": -1,
    "topk_div": -1, "pixel_wise_div": 1, "rank_mimicking_loss": -1,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SOFTMAX))
@given(st.data(), st.integers(-20, 20))
@examples(4)
def test_a_constant_on_a_row_changes_nothing(name: str, data: Any, constant: int) -> None:
    case, inputs = data.draw(calls(name, first=True))
    main = case.grads[0]
    loss, grads = run(case, inputs)
    shifted = inputs | {main: inputs[main] + constant}
    moved, moved_grads = run(case, shifted)
    off = Rounding(case, shifted)
    close(moved, loss, 1e-3, 1e-2, off=off)
    close(moved_grads[main], grads[main], 1e-3, 1e-2, off=off, of=main)
    sums = grads[main].double().sum(SOFTMAX[name])
    assert sums.abs().max() <= 2e-6 * grads[main].shape[SOFTMAX[name]] * (1 + grads[main].abs().max())


TRANSLATED = ("rkd_distance_loss", "rkd_angle_loss", "rkd_loss", "hard_dark_rank_loss")


@pytest.mark.parametrize("name", TRANSLATED)
@given(st.data())
@examples(4)
def test_distances_do_not_change_when_all_samples_move(name: str, data: Any) -> None:
    """So the gradients of all samples sum to zero; and neither do they under a rotation."""
    case, inputs = data.draw(calls(name, first=True))
    x = inputs["student"]
    loss, grads = run(case, inputs)
    shifted = inputs | {"student": x + torch.arange(x.shape[1])}
    moved, moved_grads = run(case, shifted)
    off = Rounding(case, shifted)
    close(moved, loss, 1e-3, 1e-3, off=off)
    close(moved_grads["student"], grads["student"], 5e-3, 1e-3, off=off, of="student")
    assert grads["student"].double().sum(0).abs().max() <= 1e-5 * (1 + grads["student"].abs().max())
    turn = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=torch.Generator().manual_seed(1)))[0]
    rotated = inputs | {"student": x @ turn}
    turned, turned_grads = run(case, rotated)
    off = Rounding(case, rotated)
    close(turned, loss, 1e-3, 1e-3, off=off)
    close(turned_grads["student"], grads["student"] @ turn, 5e-3, 1e-3, off=off, of="student")


SCALED = ("cosine_loss", "similarity_preserving_loss", "cosine_similarity_matrix_loss", "rkd_distance_loss", "rkd_angle_loss",
          "rkd_loss", "attention_transfer_loss", "ickd_loss", "pearson_feature_loss")  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
@given(st.data(), st.sampled_from([0.25, 2.0, 16.0]))
@examples(4)
def test_the_students_scale_does_not_matter(name: str, data: Any, scale: float) -> None:
    """So its gradient is at right angles to it, and falls as the scale grows."""
    case, inputs = data.draw(calls(name, first=True))
    main = case.grads[0]
    loss, grads = run(case, inputs)
    scaled, scaled_grads = run(case, inputs | {main: scale * inputs[main]})
    off = Rounding(case, inputs)
    close(scaled, loss, 1e-3, 1e-3, off=off)
    close(scale * scaled_grads[main], grads[main], 5e-3, 1e-3, off=off, of=main)
    inner = (grads[main].double() * inputs[main].double()).sum().abs()
    assert inner <= 1e-4 * (1 + grads[main].abs().sum() * inputs[main].abs().max())
