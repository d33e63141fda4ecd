"""kdkernels.integrations.torch against the torch that is installed."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import kdkernels
from kdkernels import backends
from kdkernels.integrations import torch as ours

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides", "ignore:size_average and reduce args")

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")
SHAPES = ((7,), (5000,), (3, 5), (40, 2), (2, 3, 130), (2, 5, 3, 4), (0, 4), ())


def make(shape, dtype=torch.float32, log_target=False, layout="contiguous", seed=0):
    """Log-probabilities and a target, both ending in this layout."""
    generator = torch.Generator().manual_seed(seed)
    stored = tuple(reversed(shape)) if layout == "transposed" else shape
    if layout == "sliced" and shape:
        stored = (*shape[:-1], 2 * shape[-1])
    tensors = []
    for k in range(2):
        x = torch.randn(stored, generator=generator)
        x = (torch.log_softmax(x, -1) if k == 0 or log_target else torch.softmax(x, -1)) if stored else -x.abs()
        x = x.to(dtype)
        if layout == "transposed":
            x = x.permute(tuple(reversed(range(x.dim()))))
        elif layout == "sliced" and shape:
            x = x[..., ::2]
        elif layout == "expanded" and shape and k == 1:
            x = x[:1].expand(shape)
        tensors.append(x.abs() if k == 1 and not log_target else x)
    return tensors


def run(function, input, target, upstream=1.0, wanted=(True, False), **arguments):
    """Value, and gradients as far as they are wanted."""
    input, target = input.detach().requires_grad_(wanted[0]), target.detach().requires_grad_(wanted[1])
    value = function(input, target, **arguments)
    sources = [x for x, want in zip((input, target), wanted, strict=True) if want]
    return value.detach(), torch.autograd.grad(value, sources, torch.full_like(value, upstream))


def tolerance(dtype):
    # torch rounds every element in half precision, and its sum: the difference is torch's error.
    return {torch.float64: (0, 0), torch.float32: (2e-6, 1e-6)}.get(dtype, (2e-2, 2e-3))


def agree(theirs, mine, dtype):
    rtol, atol = tolerance(dtype)
    for x, y in zip((mine[0], *mine[1]), (theirs[0], *theirs[1]), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, equal_nan=True)  # dtype and shape too


@pytest.fixture(params=["cpu", "triton", "reference"])
def backend(request):
    reason = backends.unavailable(request.param, "cpu")
    if reason:
        pytest.skip(reason)
    with kdkernels.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_torchs(dtype, log_target, backend):
    layouts = LAYOUTS if backend == "cpu" else LAYOUTS[:2]
    for shape, layout, reduction in itertools.product(SHAPES, layouts, ("mean", "batchmean", "sum", "none")):
        if backend == "triton" and (dtype == torch.float64 or shape == (5000,)):
            continue
        input, target = make(shape, dtype, log_target, layout)
        arguments = {"reduction": reduction, "log_target": log_target, "upstream": 0.75}
        if torch.finfo(dtype).bits == 16 and target.numel() > 4096:
            continue  # torch's own rounding is all that would be seen
        agree(run(F.kl_div, input, target, **arguments), run(ours.kl_div, input, target, **arguments), dtype)


@pytest.mark.parametrize("log_target", [False, True])
def test_gradient_of_the_target(log_target, backend):
    for shape, reduction in itertools.product(((3, 5), (7,), (2, 3, 130)), ("mean", "batchmean", "sum", "none")):
        input, target = make(shape, log_target=log_target)
        for wanted in ((True, True), (False, True)):
            arguments = {"reduction": reduction, "log_target": log_target, "wanted": wanted}
            agree(
                run(F.kl_div, input, target, **arguments), run(ours.kl_div, input, target, **arguments), torch.float32
            )


def test_mixed_dtypes():
    for one, other in itertools.product(DTYPES, DTYPES):
        input, target = make((4, 9), one)[0], make((4, 9), other)[1]
        theirs, mine = (run(f, input, target, reduction="sum") for f in (F.kl_div, ours.kl_div))
        half = any(torch.finfo(x).bits == 16 for x in (one, other))
        agree(theirs, mine, torch.bfloat16 if half else torch.float32)


@pytest.mark.parametrize(
    "arguments", [{"size_average": a, "reduce": b} for a in (None, True, False) for b in (None, True, False)]
)
def test_deprecated_arguments(arguments):
    input, target = make((4, 6))
    for reduction in ("mean", "batchmean", "sum"):
        with warnings.catch_warnings(record=True) as theirs:
            warnings.simplefilter("always")
            expected = F.kl_div(input, target, **arguments, reduction=reduction)
        with warnings.catch_warnings(record=True) as mine:
            warnings.simplefilter("always")
            value = ours.kl_div(input, target, **arguments, reduction=reduction)
            module = ours.KLDivLoss(**arguments, reduction=reduction)
        torch.testing.assert_close(value, expected)
        assert {w.category for w in theirs} <= {w.category for w in mine}
        theirs_module = torch.nn.KLDivLoss(**arguments, reduction=reduction)
        assert module.reduction == theirs_module.reduction
        torch.testing.assert_close(module(input, target), theirs_module(input, target))


def test_the_warning_about_mean():
    input, target = make((4, 6))
    messages = []
    for function in (F.kl_div, ours.kl_div):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function(input, target)
        messages.append([(w.category, str(w.message)[:80], w.filename) for w in caught])
    assert len(messages[0]) == 1
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    "input, other, arguments",
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), {}),
        (torch.zeros(2, 3), torch.zeros(2, 3), {"reduction": "rowmean"}),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3), {"reduction": "sum"}),
        (torch.zeros(2, 3, dtype=torch.complex64), torch.zeros(2, 3), {"reduction": "sum"}),
        (torch.zeros(2, 3), None, {"reduction": "sum"}),
        ("words", torch.zeros(2, 3), {"reduction": "sum"}),
    ],
    ids=["shapes", "reduction", "integers", "complex", "none", "string"],
)
def test_errors_are_torchs(input, other, arguments):
    with pytest.raises(Exception) as theirs:
        F.kl_div(input, other, **arguments)
    with pytest.raises(type(theirs.value)) as mine:
        ours.kl_div(input, other, **arguments)
    assert str(mine.value) == str(theirs.value)


def test_broadcasting_and_integer_targets():
    input, target = make((4, 6))
    for other in (target[0], target[:, :1], target[0, 0], torch.ones(4, 6).long()):
        for reduction in ("batchmean", "sum", "none"):
            try:
                expected = F.kl_div(input, other, reduction=reduction)
            except RuntimeError as error:
                with pytest.raises(RuntimeError, match=str(error)[:20]):
                    ours.kl_div(input, other, reduction=reduction)
            else:
                torch.testing.assert_close(ours.kl_div(input, other, reduction=reduction), expected)


# (input, target, log_target, loss, gradient): torch's, except where torch has 0 * inf.
EDGES = {
    "no mass": ([-1.0, -2.0], [1.0, 0.0], False, 1.0, [-1.0, 0.0]),
    "no mass at -inf": ([-1.0, -INF], [1.0, 0.0], False, 1.0, [-1.0, 0.0]),
    "log no mass": ([-1.0, -2.0], [0.0, -INF], True, 1.0, [-1.0, 0.0]),
    "log no mass at -inf": ([-1.0, -INF], [0.0, -INF], True, 1.0, [-1.0, 0.0]),
    "mass at -inf": ([-1.0, -INF], [0.0, 0.5], False, INF, [0.0, -0.5]),
    "log mass at -inf": ([-1.0, -INF], [-INF, 0.0], True, INF, [0.0, -1.0]),
    "not normalised": ([1.0, -2.0], [3.0, 5.0], False, 18.343027, [-3.0, -5.0]),
    "negative": ([-1.0, -2.0], [0.5, -0.25], False, NAN, None),
    "target NaN": ([-1.0, -2.0], [0.5, NAN], False, NAN, None),
    "log target NaN": ([-1.0, -2.0], [-0.5, NAN], True, NAN, None),
    "input NaN": ([-1.0, NAN], [0.5, 0.5], False, NAN, None),
}


ZERO_TIMES_INFINITY = ("no mass at -inf", "log no mass", "log no mass at -inf", "log mass at -inf")


@pytest.mark.parametrize("case", EDGES, ids=lambda name: name.replace(" ", "-"))
def test_edges(case, backend):
    input, target, log_target, loss, gradient = EDGES[case]
    if backend == "reference" and case in ZERO_TIMES_INFINITY:  # which is torch's own function
        loss, gradient = NAN, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, from Triton's interpreter
        value, (grad,) = run(
            ours.kl_div, torch.tensor([input]), torch.tensor([target]), reduction="sum", log_target=log_target
        )
    torch.testing.assert_close(value, torch.tensor(loss), equal_nan=True)
    if gradient is not None:
        torch.testing.assert_close(grad, torch.tensor([gradient]))


def test_float16_sums_do_not_overflow():
    input = torch.full((64, 2048), -8.0, dtype=torch.float16)
    target = torch.full((64, 2048), 1.0, dtype=torch.float16)
    assert ours.kl_div(input, target, reduction="batchmean") == 8 * 2048


def test_second_derivative_is_refused_or_torchs():
    input, target = make((3, 5))
    input.requires_grad_()
    (grad,) = torch.autograd.grad(ours.kl_div(input, target, reduction="sum"), input, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()
    with kdkernels.use_backend("reference"):
        input, target = make((3, 5), torch.float64)
        assert torch.autograd.gradcheck(lambda x: ours.kl_div(x, target, reduction="sum"), input.requires_grad_())


def test_functional_transforms():
    input, target = make((3, 5))

    def loss(function):
        return lambda x: function(x, target, reduction="sum")

    tangent = torch.ones_like(input)
    torch.testing.assert_close(torch.func.grad(loss(ours.kl_div))(input), torch.func.grad(loss(F.kl_div))(input))
    torch.testing.assert_close(
        torch.func.jvp(loss(ours.kl_div), (input,), (tangent,)), torch.func.jvp(loss(F.kl_div), (input,), (tangent,))
    )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input, tangent)
        mine, theirs = (torch.autograd.forward_ad.unpack_dual(loss(f)(dual)) for f in (ours.kl_div, F.kl_div))
    torch.testing.assert_close(mine.tangent, theirs.tangent)


def test_autocast_gives_torchs_dtype():
    input, target = make((4, 6), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, mine = (run(f, input, target, reduction="batchmean") for f in (F.kl_div, ours.kl_div))
    agree(theirs, mine, torch.bfloat16)


def test_compiles_whole():
    input, target = make((4, 6))

    def step(x):
        return ours.kl_div(x, target, reduction="batchmean")

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    mine = run(lambda x, _: compiled(x), input, target)
    agree(run(lambda x, _: F.kl_div(x, target, reduction="batchmean"), input, target), mine, torch.float32)


def test_signatures_and_module():
    for mine, theirs in ((ours.kl_div, F.kl_div), (ours.KLDivLoss, torch.nn.KLDivLoss)):
        expected, found = (inspect.signature(f).parameters for f in (theirs, mine))
        assert [(p.name, p.default) for p in found.values()] == [(p.name, p.default) for p in expected.values()]
    module = ours.KLDivLoss(reduction="batchmean", log_target=True)
    assert isinstance(module, torch.nn.KLDivLoss)
    assert repr(module) == "KLDivLoss()"
    input, target = make((4, 6), log_target=True)
    torch.testing.assert_close(
        module(input, target), torch.nn.KLDivLoss(reduction="batchmean", log_target=True)(input, target)
    )


def test_kernels_do_run(monkeypatch):
    """Nothing above would notice if every call went to torch."""
    calls = []
    real = ours.row_divergence
    monkeypatch.setattr(ours, "row_divergence", lambda *a, **k: calls.append(a[0]) or real(*a, **k))
    input, target = make((3, 5))
    for reduction in ("mean", "batchmean", "sum"):
        for log_target in (False, True):
            ours.kl_div(input, target, reduction=reduction, log_target=log_target)
    assert len(calls) == (6 if backends.resolve("", (input,)) != "reference" else 0)
