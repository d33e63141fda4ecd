"""The operators as PyTorch sees them: schema and fakes, gradients of everything that may learn, compilation."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sweep import BF16, F16, F32, F64, cast
from targets import Target
from test_properties import FUNCTIONS, cases_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import kdkernels
from kdkernels import backends, distillation_loss, kl_div
from kdkernels.ops.row_divergence.kinds import STATS

OPS = torch.ops.kdkernels


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(
    target: Target, generator: torch.Generator, shape: tuple[int, ...] = (4, 9), dtype: torch.dtype = F32
) -> Any:
    s, t = (torch.randn(shape, generator=generator).to(target.device, dtype) for _ in range(2))
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator).to(target.device)
    return s, t, labels


# --------------------------------------------------------------------------------------------------------------- schema


@pytest.fixture
def zeroed(monkeypatch: pytest.MonkeyPatch) -> None:
    """opcheck compares whole outputs, and the last row of `saved` is not all used: 0 rather than whatever was there."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).zero_())


def forward_arguments(
    target: Target, generator: torch.Generator, hard: bool, wants: tuple[bool, bool], dtype: torch.dtype
) -> Any:
    s, t, labels = tensors(target, generator, dtype=dtype)
    weight = torch.rand(4, generator=generator).to(target.device)
    class_weight = torch.rand(9, generator=generator).to(target.device) if hard else None
    scalars = torch.tensor([2.0, 3, 4, 0.5 if hard else 0, 0.1, 0, 0, 0])
    return (
        s,
        t,
        labels,
        weight,
        class_weight,
        scalars,
        None,
        0,
        0,
        hard,
        3 if hard else 1,
        -100,
        1,
        *wants,
        target.backend,
    )


@pytest.mark.usefixtures("zeroed")
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("wants", [(True, True, True), (False, True, False), (True, False, False)], ids=str)
@pytest.mark.parametrize("hard", [False, True])
def test_opcheck_forward(fused: Target, hard: bool, wants: Any, dtype: torch.dtype, generator: torch.Generator) -> None:
    torch.library.opcheck(OPS.row_divergence_forward.default, forward_arguments(fused, generator, hard, wants, dtype))


@pytest.mark.usefixtures("zeroed")
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("wants", [(True, True, True), (True, False, False), (False, False, True)], ids=str)
def test_opcheck_backward(fused: Target, per_row: bool, wants: Any, generator: torch.Generator) -> None:
    s, t, labels, weight, cw, scalars, *_ = forward_arguments(fused, generator, True, (True, False, False), F32)
    saved = OPS.row_divergence_forward(
        s, t, labels, weight, cw, scalars, None, 0, 0, True, 3, -100, 1, True, False, False, fused.backend
    )[1][1]
    assert saved.shape == (5, STATS)
    upstream = torch.randn(4 if per_row else (), generator=generator).to(fused.device)
    arguments = (s, t, labels, weight, cw, scalars, saved, upstream, 0, 0, True, True, -100, 1, *wants, fused.backend)
    torch.library.opcheck(OPS.row_divergence_backward.default, arguments)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_opcheck_scale(fused: Target, factor: float) -> None:
    x = torch.randn(3, 5, device=fused.device)
    torch.library.opcheck(OPS.scale_.default, (x, torch.tensor(factor, device=fused.device), fused.backend))
    before = x.clone()
    OPS.scale_(x, torch.tensor(factor, device=fused.device), fused.backend)
    assert torch.equal(x, before * factor)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("offset, shape", [(4, (5, 3, 2)), (1, (2, 1, 1)), (3, (82, 10, 7))], ids=str)
def test_scale_keeps_to_its_own_elements(
    fused: Target, offset: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """A dense gradient whose axes are permuted, before and behind an address for whole vectors, with neighbours on both sides."""
    n = math.prod(shape)
    storage = (torch.arange(n + 8, device=fused.device) % 64).to(dtype)
    expected = storage.clone()
    expected[offset : offset + n] *= 3
    x = storage[offset : offset + n].view(shape).permute(2, 0, 1)
    OPS.scale_(x, torch.tensor(3.0, device=fused.device), fused.backend)
    assert torch.equal(storage, expected)


@pytest.mark.parametrize("reduction", ["rowmean", "none"])
def test_fake_tensors_and_tracing(fused: Target, reduction: str, generator: torch.Generator) -> None:
    s, t, labels = tensors(fused, generator, (2, 3, 7), torch.bfloat16)

    def step(s: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> Any:
        s = s.detach().requires_grad_()
        loss = distillation_loss(s, t, labels, 2.0, reduction=reduction, backend=fused.backend)
        return loss, torch.autograd.grad(loss.sum(), s)[0]

    real = step(s, t, labels)
    # The packed scalars are real: small constants.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes = step(*map(mode.from_tensor, (s, t, labels)))
    for fake, x in zip(fakes, real, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (x.shape, x.dtype, x.stride())
    for tracing in ("fake", "symbolic"):
        graph = make_fx(step, tracing_mode=tracing, _allow_non_fake_inputs=True)(s, t, labels)
        assert "row_divergence_forward" in graph.code
        for got, x in zip(graph(s, t, labels), real, strict=True):
            torch.testing.assert_close(got, x)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.slow_takes(lambda order: order in ((0, 1, 2), (2, 0, 1)))
def test_fake_strides_are_the_real_ones(fused: Target, order: tuple[int, ...], generator: torch.Generator) -> None:
    base = torch.randn(2, 3, 5, generator=generator).to(fused.device)
    s = base.permute(order)
    arguments = (s, s, None, None, None, torch.ones(8), None, 0, 0, False, 0, -100, 1, False, True, True, fused.backend)
    torch.library.opcheck(OPS.row_divergence_forward.default, arguments, test_utils=("test_schema", "test_faketensor"))


# ------------------------------------------------------------------------------------------------------------ gradients


def test_the_reference_against_finite_differences(generator: torch.Generator) -> None:
    """Everything else is checked against the reference's autograd; this is what checks that."""
    s, t = (torch.randn(3, 5, generator=generator, dtype=F64, requires_grad=True) for _ in range(2))
    ts, tt = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (2.0, 3.0))
    labels = torch.tensor([1, -100, 4])
    cw = torch.rand(5, generator=generator, dtype=F64)

    def kl(s: Any, t: Any, ts: Any, tt: Any) -> Any:
        return kl_div(s, t, temperature=ts, teacher_temperature=tt, reduction="none", backend="reference")

    def both(s: Any, t: Any, ts: Any) -> Any:
        return distillation_loss(s, t, labels, ts, 0.6, label_smoothing=0.1, class_weight=cw, backend="reference")

    assert torch.autograd.gradcheck(kl, (s, t, ts, tt))
    assert torch.autograd.gradcheck(both, (s, t, ts))
    assert torch.autograd.gradgradcheck(kl, (s, t, ts, tt))


TEMPERATURES = {
    "shared": {"temperature": 2.5},
    "both": {"temperature": 2.5, "teacher_temperature": 1.5},
    "student-only": {"temperature": 2.5, "fixed": {"teacher_temperature": 1.5}},
    "student-only-tensor": {"temperature": 2.5, "fixed": {"teacher_temperature": torch.tensor(1.5)}},
    "teacher-only": {"teacher_temperature": 1.5, "fixed": {"temperature": 2.5}},
    "teacher-only-default": {"teacher_temperature": 1.5},
}


@pytest.mark.parametrize("learn_scores", [True, False])
@pytest.mark.parametrize("reduction", ["rowmean", "none", "sum", "batchmean"])
@pytest.mark.parametrize("which", TEMPERATURES)
@pytest.mark.parametrize("function", [kl_div, distillation_loss])
@pytest.mark.slow_takes(
    lambda which, reduction, learn_scores: which == "both" or (reduction in ("rowmean", "none") and learn_scores)
)
def test_learnable_temperatures(
    fused: Target, function: Any, which: str, reduction: str, learn_scores: bool, generator: torch.Generator
) -> None:
    values = dict(TEMPERATURES[which])
    fixed: Any = values.pop("fixed", {})
    if function is distillation_loss and "temperature" not in {**values, **fixed}:
        fixed = {**fixed, "temperature": 4.0}
    s, t, labels = tensors(fused, generator, (6, 33))
    labels[1] = -100
    weight = torch.rand(6, generator=generator).to(fused.device)
    weight[4] = 0
    upstream = torch.randn(6 if reduction == "none" else (), generator=generator)

    def gradients(dtype: torch.dtype, backend: str, device: str) -> list[torch.Tensor]:
        learned = {k: torch.tensor(v, dtype=dtype, device=device, requires_grad=True) for k, v in values.items()}
        student, teacher = (x.detach().to(device, dtype).requires_grad_(learn_scores) for x in (s, t))
        loss = function(
            student, teacher, labels=labels.to(device), weight=weight.to(device), reduction=reduction, backend=backend,
            **learned, **fixed,
        )  # fmt: skip
        wanted = [*learned.values(), *((student, teacher) if learn_scores else ())]
        return [g.cpu().double() for g in torch.autograd.grad(loss, wanted, upstream.to(loss))]

    for got, expected in zip(
        gradients(F32, fused.backend, fused.device), gradients(F64, "reference", "cpu"), strict=True
    ):
        # A temperature's is a sum over rows of either sign, each of the order of T^2 times its upstream gradient.
        terms = 1.0 if got.dim() else 1 + 4 * float(upstream.abs().sum())
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6 * terms)


@pytest.mark.parametrize("options", [{}, {"scale_by_t2": False}, {"dim": 1}, {"temperature": "half"}], ids=str)
def test_learnable_temperature_variants(fused: Target, options: Any, generator: torch.Generator) -> None:
    s, t, _ = tensors(fused, generator, (3, 8, 5), F16)
    dtype = F16 if options.pop("temperature", None) else F32
    learned = torch.tensor([2.0], dtype=dtype, device=fused.device, requires_grad=True)
    loss = kl_div(s, t, temperature=learned, backend=fused.backend, **options)
    loss.backward()
    exact = torch.tensor([2.0], dtype=F64, requires_grad=True)
    kl_div(s.double().cpu(), t.double().cpu(), temperature=exact, backend="reference", **options).backward()
    assert learned.grad.shape == (1,)
    torch.testing.assert_close(learned.grad.cpu().double(), exact.grad, rtol=1e-3 if dtype == F16 else 2e-5, atol=2e-6)


def test_masked_classes_and_a_learnable_temperature(fused: Target, generator: torch.Generator) -> None:
    """A -inf score has no part in the temperature's gradient: never 0 * inf."""
    s, t, _ = tensors(fused, generator, (4, 12))
    s[:, 3] = t[:, 3] = -torch.inf
    t[1, 5] = -torch.inf
    temperature = torch.tensor(2.0, device=fused.device, requires_grad=True)
    kl_div(s, t, temperature=temperature, backend=fused.backend).backward()
    exact = torch.tensor(2.0, dtype=F64, requires_grad=True)
    kept = [i for i in range(12) if i not in (3,)]
    s, t = s[:, kept].double().cpu(), t[:, kept].double().cpu().clamp(min=-1e5)
    kl_div(s, t, temperature=exact, backend="reference").backward()
    torch.testing.assert_close(temperature.grad.cpu().double(), exact.grad, rtol=2e-5, atol=2e-6)


# ---------------------------------------------------------------------------------------------------- second derivatives


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("reduction", ["rowmean", "none"])
def test_second_derivatives_are_refused(
    fused: Target, dtype: torch.dtype, reduction: str, generator: torch.Generator
) -> None:
    """A penalty on the gradient is an error that names the way out, not a silent zero."""
    s, t, _ = tensors(fused, generator, dtype=dtype)
    s.requires_grad_()
    loss = kl_div(s, t, reduction=reduction, backend=fused.backend).sum()
    (g,) = torch.autograd.grad(loss, s, create_graph=True)
    assert g.requires_grad
    with pytest.raises(
        RuntimeError, match=r"row_divergence have no second derivative; call it with backend='reference'"
    ):
        (s.sum() + g.float().square().sum()).backward()


def test_create_graph_without_a_second_backward_is_no_error(fused: Target, generator: torch.Generator) -> None:
    s, t, _ = tensors(fused, generator)
    s.requires_grad_()
    loss = kl_div(s, t, backend=fused.backend)
    (g,) = torch.autograd.grad(loss, s, create_graph=True)
    (h,) = torch.autograd.grad(loss, s)
    assert torch.equal(g.detach(), h)


def test_the_reference_has_second_derivatives(generator: torch.Generator) -> None:
    s, t = (torch.randn(3, 5, generator=generator, dtype=F64) for _ in range(2))
    s.requires_grad_()
    (g,) = torch.autograd.grad(kl_div(s, t, reduction="sum", backend="reference"), s, create_graph=True)
    (h,) = torch.autograd.grad(g[0, 0], s)
    p = s[0].softmax(-1).detach()
    torch.testing.assert_close(h[0], p * (torch.eye(5, dtype=F64)[0] - p[0]))


# ---------------------------------------------------------------------------------------------------------- compilation


def training_step(backend: str, reduction: str) -> Any:
    def step(s: torch.Tensor, t: torch.Tensor, y: torch.Tensor, temperature: Any, alpha: Any) -> torch.Tensor:
        hard = distillation_loss(s, t, y, temperature, alpha, reduction=reduction, label_smoothing=0.1, backend=backend)
        soft = kl_div(s, t, temperature=temperature, reduction=reduction, backend=backend)
        return (hard + 0.5 * soft).sum()

    return step


@functools.cache
def numbers_stay_dynamic() -> bool:
    """Whether this torch (not 2.11) compiles a function of a changing number only twice, where it calculates with the number."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, number: x * (1 - number), backend=counter, fullgraph=True)
    for number in (0.9, 0.8, 0.3):
        compiled(torch.ones(3), number)
    return counter.frame_count <= 2


def annealed(as_tensor: bool, *numbers: float) -> tuple[Any, ...]:
    """Hyper-parameters as a user changes them from step to step."""
    if not as_tensor and not numbers_stay_dynamic():
        pytest.skip(
            f"torch {torch.__version__} compiles anew for every number: there, anneal tensors; 2.13 and later do not"
        )
    return tuple(map(torch.tensor, numbers)) if as_tensor else numbers


def both_ways(step: Any, s: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    s = s.detach().requires_grad_()
    loss = step(s, *rest)
    loss.backward()
    return loss.detach(), s.grad


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("reduction", ["rowmean", "none"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["numbers", "tensors"])
@pytest.mark.slow_takes(lambda dtype, reduction: dtype == F32 and reduction == "rowmean")
def test_compiled_equals_eager_and_is_compiled_once(
    fused: Target, as_tensor: bool, reduction: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Forward and backward in one graph each, also while temperature and alpha are annealed."""
    s, t, labels = tensors(fused, generator, dtype=dtype)
    step = training_step(fused.backend, reduction)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    # Not 1: dynamo specialises 0 and 1, as it does for every function.
    for i, (temperature, alpha) in enumerate([(4.0, 0.9), (3.5, 0.8), (2.25, 0.3), (7.0, 0.55)]):
        values = annealed(as_tensor, temperature, alpha)
        got, expected = both_ways(compiled, s, t, labels, *values), both_ways(step, s, t, labels, *values)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-6 if dtype == F32 else 2e-3, atol=1e-6)
        if as_tensor or i == 1:
            first = counter.frame_count
    # A number is specialised at first and becomes dynamic when it changes; from then on nothing recompiles.
    assert counter.frame_count == first <= (1 if as_tensor else 2)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["numbers", "tensors"])
def test_annealing_never_recompiles(as_tensor: bool, generator: torch.Generator) -> None:
    here = Target("auto", "cpu")
    s, t, labels = tensors(here, generator)
    compiled = torch.compile(training_step("auto", "rowmean"), backend="aot_eager", fullgraph=True, dynamic=True)

    def at(temperature: float, alpha: float) -> None:
        values = annealed(as_tensor, temperature, alpha)
        both_ways(compiled, s, t, labels, *values)

    at(4.0, 0.9)
    at(4.5, 0.85)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for k in range(5):
            at(3.0 - 0.1 * k, 0.7 - 0.05 * k)


def test_compiled_for_batches_of_any_size(generator: torch.Generator) -> None:
    compiled = torch.compile(training_step("auto", "rowmean"), backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (4, 6, 9):
        s, t, labels = tensors(Target("auto", "cpu"), generator, (n, 9))
        got, expected = (
            both_ways(compiled, s, t, labels, 2.0, 0.5),
            both_ways(training_step("auto", "rowmean"), s, t, labels, 2.0, 0.5),
        )
        torch.testing.assert_close(got, expected)


def test_compiled_by_inductor(device: str, generator: torch.Generator) -> None:
    target = Target("auto", device)
    s, t, labels = tensors(target, generator, (6, 50))
    head = torch.randn(50, 50, generator=generator).to(device)

    def step(s: torch.Tensor, t: torch.Tensor, y: torch.Tensor, temperature: float, alpha: float) -> torch.Tensor:
        return 2 * distillation_loss((s @ head).relu(), t, y, temperature, alpha)

    try:
        got = both_ways(torch.compile(step, fullgraph=True), s, t, labels, 2.0, 0.5)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"inductor cannot compile here: {error}")
    torch.testing.assert_close(got, both_ways(step, s, t, labels, 2.0, 0.5), rtol=1e-5, atol=1e-6)


def test_learnable_temperature_compiled(generator: torch.Generator) -> None:
    s, t, _ = tensors(Target("auto", "cpu"), generator)
    compiled = torch.compile(kl_div, backend="aot_eager", fullgraph=True)
    grads = []
    for function in (kl_div, compiled):
        temperature = torch.tensor(2.0, requires_grad=True)
        function(s, t, temperature=temperature).backward()
        grads.append(temperature.grad)
    torch.testing.assert_close(*grads)


def test_torch_func_and_inference_mode(generator: torch.Generator) -> None:
    s, t, _ = tensors(Target("auto", "cpu"), generator)
    with torch.inference_mode():
        inside = kl_div(s, t, temperature=2.0)
    s.requires_grad_()
    loss = kl_div(s, t, temperature=2.0)
    torch.testing.assert_close(inside, loss.detach())
    loss.backward()
    with torch.no_grad():
        assert not kl_div(s, t).requires_grad


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_teacher_under_inference_mode(name: str, generator: torch.Generator) -> None:
    """As in eager code it may be; autograd saves no such tensor, and in float16 every backward reads the teacher again."""
    for case in cases_of(name):
        inputs = cast(case, case.make(case.shapes[0], generator), (F16,))
        learner = case.grads[0]

        def run(inputs: Any, case: Any = case, learner: str = learner) -> Any:
            x = inputs[learner].clone().requires_grad_()
            loss = case.function(**{**inputs, learner: x}, **case.options, backend="cpu")
            return loss.detach(), *torch.autograd.grad(loss.sum(), x)

        with torch.inference_mode():
            frozen = {n: x.clone() if n in case.grads[1:] else x for n, x in inputs.items()}
        assert all(map(torch.equal, run(frozen), run(inputs))), case.name


@pytest.mark.parametrize(
    "name", ["kl_div", "dist_loss", "hint_loss", "attention_transfer_loss", "cosine_loss", "rkd_loss", "nst_loss"]
)
def test_transforms_of_torch_func(name: str, generator: torch.Generator) -> None:
    """They go to the reference, and forward-mode derivatives too, which a kernel would leave out silently."""
    x, t, tangent = (torch.randn(2, 3, 2, 2, generator=generator) for _ in range(3))
    shape = x.shape if name in ("hint_loss", "attention_transfer_loss", "nst_loss") else (6, 4)
    x, t, tangent = (v.reshape(shape) for v in (x, t, tangent))

    def loss(x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        return getattr(kdkernels, name)(x, t, backend=backend)

    loss(x)  # what is remembered of this must not be taken
    x.requires_grad_()
    (expected,) = torch.autograd.grad(loss(x, "reference"), x)
    x.requires_grad_(False)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    along = (expected * tangent).sum()
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6, check_dtype=False)
    close(torch.func.jvp(loss, (x,), (tangent,))[1], along)
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        close(forward_ad.unpack_dual(loss(forward_ad.make_dual(x, tangent))).tangent, along)
    with pytest.raises(backends.BackendError, match="torch.func"):
        torch.func.grad(lambda x: loss(x, "cpu"))(x)
