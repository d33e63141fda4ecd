"""DIST: what the definition says, the variants, and what must not go wrong."""

from __future__ import annotations

import pytest
import torch
from targets import Target

from kdkernels import BackendError, DISTLoss, dist_loss

INF = float("inf")


def models(generator: torch.Generator, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    teacher = 2 * torch.randn(shape, generator=generator)
    return teacher + torch.randn(shape, generator=generator), teacher


def run(target: Target, s: torch.Tensor, t: torch.Tensor, **options):
    """(loss, student's gradient, teacher's gradient)"""
    s, t = (x.detach().to(target.device).requires_grad_() for x in (s, t))
    options = {n: o.to(target.device) if isinstance(o, torch.Tensor) and o.dim() else o for n, o in options.items()}
    loss = dist_loss(s, t, backend=target.backend, **options)
    grads = torch.autograd.grad(loss, (s, t))
    return loss.detach().cpu(), *(g.cpu() for g in grads)


def correlation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.corrcoef(torch.stack([x, y]))[0, 1]


def same(got, expected, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


def test_definition(target: Target, generator: torch.Generator) -> None:
    s, t = models(generator, 7, 11)
    p, q = (torch.softmax(x.double() / 2, 1) for x in (s, t))
    rows = torch.stack([correlation(p[n], q[n]) for n in range(7)]).mean()
    columns = torch.stack([correlation(p[:, v], q[:, v]) for v in range(11)]).mean()
    loss, _, _ = run(target, s, t, temperature=2.0, beta=0.5, gamma=3.0)
    torch.testing.assert_close(loss.double(), 0.5 * (1 - rows) + 3 * (1 - columns), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clamp", [False, True])
def test_gradients_by_differences(target: Target, clamp: bool, generator: torch.Generator) -> None:
    s, t = models(generator, 4, 5)
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0])
    # An eps that counts; but a clamped norm keeps its derivative, which differences do not see.
    options = {"temperature": 1.5, "eps": 1e-8 if clamp else 0.05, "clamp_norms": clamp, "weight": weight}
    _, ds, dt = run(target, s, t, **options)

    def f(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return dist_loss(s, t, backend="reference", **options)

    h = 1e-5
    for which, grad in enumerate((ds, dt)):
        for at in [(0, 0), (1, 3), (2, 2), (3, 1)]:
            plus, minus = ([s.double().clone(), t.double().clone()] for _ in range(2))
            plus[which][at] += h
            minus[which][at] -= h
            torch.testing.assert_close(grad[at].double(), (f(*plus) - f(*minus)) / (2 * h), rtol=1e-3, atol=1e-5)


def test_equal_models(target: Target, generator: torch.Generator) -> None:
    _, t = models(generator, 6, 9)
    loss, ds, dt = run(target, t, t)
    assert loss.abs() < 1e-5 and ds.abs().max() < 1e-5 and dt.abs().max() < 1e-5


def test_symmetric(target: Target, generator: torch.Generator) -> None:
    s, t = models(generator, 6, 9)
    loss, ds, dt = run(target, s, t)
    other, dt2, ds2 = run(target, t, s)
    same((loss, ds, dt), (other, ds2, dt2))


def test_t2_and_weights_are_factors(target: Target, generator: torch.Generator) -> None:
    s, t = models(generator, 6, 9)
    plain = run(target, s, t, temperature=3.0)
    same(run(target, s, t, temperature=3.0, scale_by_t2=True), [9 * x for x in plain])
    same(run(target, s, t, temperature=3.0, beta=torch.tensor(9.0), gamma=9), [9 * x for x in plain])


def test_clamp_is_torchs_cosine_similarity(target: Target, generator: torch.Generator) -> None:
    s, t = (x.double() for x in models(generator, 6, 9))
    s.requires_grad_()
    p, q = torch.softmax(s / 4, 1), torch.softmax(t / 4, 1)

    def relation(p: torch.Tensor, q: torch.Tensor, dim: int) -> torch.Tensor:
        p, q = p - p.mean(dim, keepdim=True), q - q.mean(dim, keepdim=True)
        return 1 - torch.cosine_similarity(p, q, dim, eps=0.2).mean()  # so that it clamps some norms and not others

    expected = relation(p, q, 1) + relation(p, q, 0)
    (grad,) = torch.autograd.grad(expected, s)
    loss, ds, _ = run(target, s.float(), t.float(), temperature=4.0, clamp_norms=True, eps=0.2)
    same((loss, ds), (expected, grad), rtol=1e-3, atol=1e-6)


def test_invariances(target: Target, generator: torch.Generator) -> None:
    """Row constants, the order of rows, the order of classes."""
    s, t = models(generator, 6, 9)
    loss, ds, dt = run(target, s, t)
    same(run(target, s + 16, t - 64), (loss, ds, dt), rtol=1e-3, atol=1e-5)
    rows, classes = torch.randperm(6, generator=generator), torch.randperm(9, generator=generator)
    same(run(target, s[rows][:, classes], t[rows][:, classes]), (loss, ds[rows][:, classes], dt[rows][:, classes]))
    assert ds.sum(1).abs().max() < 1e-5 and dt.sum(1).abs().max() < 1e-5


def test_masked_rows_are_in_neither_term(target: Target, generator: torch.Generator) -> None:
    s, t = models(generator, 6, 9)
    labels = torch.tensor([-7, 3, 1, -7, 0, 2])
    weight = torch.tensor([1.0, 0.5, 0.0, 1.0, 2.0, 1.0])
    kept = (labels != -7) & (weight != 0)
    expected = run(target, s[kept], t[kept], weight=weight[kept])
    s[0], t[3], s[2, 4] = float("nan"), INF, -INF
    loss, ds, dt = run(target, s, t, labels=labels, weight=weight, ignore_index=-7)
    same((loss, ds[kept], dt[kept]), expected)
    assert not ds[~kept].any() and not dt[~kept].any()


def test_a_weight_of_two_is_the_row_twice(target: Target, generator: torch.Generator) -> None:
    s, t = models(generator, 4, 7)
    twice = torch.tensor([0, 1, 1, 2, 3, 3, 3])
    loss, ds, dt = run(target, s, t, weight=torch.tensor([1.0, 2.0, 1.0, 3.0]))
    other, ds2, dt2 = run(target, s[twice], t[twice])
    add = torch.zeros(4, 7)
    same((loss, ds, dt), (other, add.index_add(0, twice, ds2), add.index_add(0, twice, dt2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_rows_ignored(target: Target, dtype: torch.dtype, generator: torch.Generator) -> None:
    s, t = (x.to(dtype) for x in models(generator, 4, 5))
    for out in run(target, s, t, labels=torch.full((4,), -100)):
        assert not out.any()


def test_no_rows(target: Target) -> None:
    loss, ds, dt = run(target, torch.empty(0, 5), torch.empty(0, 5))
    assert loss == 0 and ds.shape == dt.shape == (0, 5)


def test_one_row_has_no_columns(target: Target, generator: torch.Generator) -> None:
    s, t = models(generator, 5, 9)
    expected = run(target, s[:1], t[:1], gamma=0.0)
    same(run(target, s[:1], t[:1]), expected)
    loss, ds, _ = run(target, s, t, weight=torch.tensor([1, 0, 0, 0, 0]).bool())  # one that is left
    same((loss, ds[:1]), expected[:2])


def test_one_class(target: Target, generator: torch.Generator) -> None:
    """Everything is constant: no correlation, no gradient, as in the published code."""
    loss, ds, dt = run(target, *models(generator, 4, 1))
    assert loss == 2 and not ds.any() and not dt.any()


def test_two_classes(target: Target, generator: torch.Generator) -> None:
    """A row's correlation is 1 or -1 there, and has no gradient but for eps."""
    s, t = models(generator, 6, 2)
    loss, ds, dt = run(target, s, t, gamma=0.0)
    agree = ((s[:, 0] > s[:, 1]) == (t[:, 0] > t[:, 1])).float().mean()
    torch.testing.assert_close(loss, 2 * (1 - agree), rtol=1e-2, atol=1e-2)
    assert max(ds.abs().max(), dt.abs().max()) < 1e-2


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("clamp", [False, True])
def test_constant_rows_and_columns(target: Target, side: str, clamp: bool, generator: torch.Generator) -> None:
    """Published code divides their gradient by 1e-8."""
    s, t = models(generator, 6, 37)
    flat = {"student": (s,), "teacher": (t,), "both": (s, t)}[side]
    for x in flat:
        x[2] = 1.7  # a uniform row
    options = {"temperature": 3.0, "clamp_norms": clamp}
    loss, ds, dt = run(target, s, t, gamma=0.0, **options)
    assert loss.isfinite() and not ds[2].any() and not dt[2].any() and max(ds.abs().max(), dt.abs().max()) < 1
    for x in flat:
        x[:] = x[:1].clone()  # all rows alike, so that every column is constant
    loss, ds, dt = run(target, s, t, beta=0.0, **options)
    assert loss == 1 and not ds.any() and not dt.any()


def test_minus_infinity(target: Target, generator: torch.Generator) -> None:
    """A class that a model cannot take has probability 0; the rest goes on."""
    s, t = models(generator, 6, 9)
    s[:, 2] = t[:, 2] = -INF
    s[1, 5] = t[3, 4] = -INF
    expected = run(Target("reference", "cpu"), s.double(), t.double())
    got = run(target, s, t)
    same(got, expected, rtol=1e-3, atol=1e-6)
    assert all(x.isfinite().all() for x in got) and not got[1][:, 2].any() and got[1][1, 5] == 0


def test_nan_is_not_hidden(target: Target, generator: torch.Generator) -> None:
    s, t = models(generator, 4, 9)
    s[1, 3] = float("nan")
    loss, ds, _ = run(target, s, t)
    assert loss.isnan() and ds[1].isnan().all()
    loss, ds, _ = run(target, s, t, gamma=0.0)
    assert loss.isnan() and ds[1].isnan().all()


@pytest.mark.parametrize("dim", [0, 1, 2, -2])
def test_class_axis_anywhere(target: Target, dim: int, generator: torch.Generator) -> None:
    s, t = models(generator, 3, 4, 5)
    weight = torch.rand([n for d, n in enumerate((3, 4, 5)) if d != dim % 3], generator=generator)
    loss, ds, dt = run(target, s.movedim(dim, -1).contiguous(), t.movedim(dim, -1).contiguous(), weight=weight)
    expected = loss, ds.movedim(-1, dim), dt.movedim(-1, dim)
    same(run(target, s, t, weight=weight, dim=dim), expected)
    shuffled = s.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    same(run(target, shuffled, t, weight=weight, dim=dim), expected)


def test_rows_of_any_shape_are_one_batch(target: Target, generator: torch.Generator) -> None:
    s, t = models(generator, 2, 3, 8)
    loss, ds, dt = run(target, s, t)
    same((loss, ds.flatten(0, 1), dt.flatten(0, 1)), run(target, s.flatten(0, 1), t.flatten(0, 1)))


@pytest.mark.parametrize("wanted", ["student", "teacher"])
def test_one_gradient(target: Target, wanted: str, generator: torch.Generator) -> None:
    s, t = models(generator, 5, 9)
    _, ds, dt = run(target, s, t)
    s, t = s.to(target.device), t.to(target.device)
    x = (s if wanted == "student" else t).requires_grad_()
    (grad,) = torch.autograd.grad(dist_loss(s, t, backend=target.backend), x)
    assert torch.equal(grad.cpu(), ds if wanted == "student" else dt)


def test_float16_gradient_survives_the_scaler(fused: Target, generator: torch.Generator) -> None:
    s, t = (x.half() for x in models(generator, 64, 50))
    x = s.double().requires_grad_()
    (truth,) = torch.autograd.grad(1024 * dist_loss(x, t.double(), temperature=4.0, backend="reference"), x)
    x = s.to(fused.device).requires_grad_()
    (grad,) = torch.autograd.grad(1024 * dist_loss(x, t.to(fused.device), temperature=4.0, backend=fused.backend), x)
    torch.testing.assert_close(grad.cpu().double(), truth, rtol=2e-3, atol=1e-5)


def test_retain_graph_and_second_derivative(fused: Target, generator: torch.Generator) -> None:
    s, t = (x.to(fused.device) for x in models(generator, 5, 9))
    s.requires_grad_()
    loss = dist_loss(s, t, backend=fused.backend)
    first = torch.autograd.grad(loss * 3, s, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss * 3, s, retain_graph=True)[0])
    (grad,) = torch.autograd.grad(loss, s, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize("shape", [(2000, 19), (300, 700), (70, 4500)], ids=str)
def test_same_bits_with_other_threads(shape: tuple[int, ...]) -> None:
    s, t = models(torch.Generator().manual_seed(0), *shape)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(Target("cpu", "cpu"), s, t))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize("shape", [(1500, 3), (129, 130), (600, 1000)], ids=str)
@pytest.mark.slow_takes(lambda shape: shape == (129, 130))
def test_many_rows(target: Target, shape: tuple[int, ...], generator: torch.Generator) -> None:
    """Columns that are cut into shares of rows."""
    s, t = models(generator, *shape)
    weight = torch.rand(shape[0], generator=generator)
    expected = run(Target("reference", "cpu"), s.double(), t.double(), weight=weight)
    got = run(target, s, t, weight=weight)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_temperature_as_a_tensor_does_not_recompile(generator: torch.Generator) -> None:
    (s, t), compilations = models(generator, 5, 9), 0

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        nonlocal compilations
        compilations += 1
        return graph

    torch._dynamo.reset()
    s.requires_grad_()
    step = torch.compile(
        lambda x, tau: dist_loss(x, t, temperature=tau, backend="cpu"), fullgraph=True, backend=backend
    )
    for tau in (1.0, 2.0, 3.5):
        loss = step(s, torch.tensor(tau))
        torch.testing.assert_close(loss, dist_loss(s, t, temperature=tau, backend="cpu"))
        loss.backward()
    assert compilations == 1


def test_compiles_whole(generator: torch.Generator) -> None:
    s, t = models(generator, 5, 9)
    s.requires_grad_()
    torch._dynamo.reset()
    step = torch.compile(lambda x: 2 * dist_loss(x, t, backend="cpu"), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(step(s), s)[0]
    assert torch.equal(got, torch.autograd.grad(2 * dist_loss(s, t, backend="cpu"), s)[0])


def test_opcheck(generator: torch.Generator) -> None:
    s, t = models(generator, 4, 9)
    scalars, labels = torch.tensor([2.0, 1.0, 1.0, 1e-8]), torch.tensor([0, -100, 3, 4])
    forward = (s, t, labels, None, scalars, False, -100, 1, "cpu")
    torch.library.opcheck(torch.ops.kdkernels.dist_forward.default, forward)
    _, *saved = torch.ops.kdkernels.dist_forward(*forward)
    backward = (s, t, labels, None, scalars, *saved, torch.ones(()), False, -100, 1, True, False, "cpu")
    torch.library.opcheck(torch.ops.kdkernels.dist_backward.default, backward)


def test_module(generator: torch.Generator) -> None:
    s, t = models(generator, 4, 9)
    module = DISTLoss(temperature=4.0, beta=2.0, gamma=2.0, scale_by_t2=True)
    assert torch.equal(module(s, t), dist_loss(s, t, temperature=4.0, beta=2.0, gamma=2.0, scale_by_t2=True))


X = torch.zeros(4, 5)


@pytest.mark.parametrize(
    "error, words, call",
    [
        (ValueError, "same number of classes", lambda: dist_loss(X, torch.zeros(4, 6))),
        (TypeError, "student_logits must be float16", lambda: dist_loss(X.long(), X)),
        (ValueError, "temperature must be positive", lambda: dist_loss(X, X, temperature=-1.0)),
        (ValueError, "eps must be positive", lambda: dist_loss(X, X, eps=0.0)),
        (ValueError, "beta gets no gradient", lambda: dist_loss(X, X, beta=torch.ones((), requires_grad=True))),
        (ValueError, "weight must have the shape", lambda: dist_loss(X, X, weight=torch.ones(5))),
        (IndexError, "labels hold 5", lambda: dist_loss(X, X, labels=torch.full((4,), 5))),
        (TypeError, "labels must hold class indices", lambda: dist_loss(X, X, labels=torch.ones(4))),
        (BackendError, "float64 runs on 'reference'", lambda: dist_loss(X.double(), X.double(), backend="cpu")),
    ],
)
def test_errors(error: type, words: str, call) -> None:
    with pytest.raises(error, match=words):
        call()
