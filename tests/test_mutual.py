"""Deep mutual learning: what the definition says, the variants, and what must not go wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from targets import Target

from kdkernels import BackendError, MutualKLDivLoss, mutual_kl_div

INF = float("inf")


def peers(generator: torch.Generator, learners: int, *shape: int) -> torch.Tensor:
    return 2 * torch.randn(learners, *shape, generator=generator)


def pair(x: torch.Tensor, i: int, j: int, t: float = 1.0) -> torch.Tensor:
    """KL(p_j, p_i) of every row, p_j constant."""
    own, peer = F.log_softmax(x[i] / t, -1), F.log_softmax(x[j].detach() / t, -1)
    return F.kl_div(own, peer, reduction="none", log_target=True).sum(-1)


def loss_and_gradient(target: Target, x: torch.Tensor, upstream: torch.Tensor | None = None, **options):
    x = x.detach().to(target.device).requires_grad_()
    options = {n: o.to(target.device) if isinstance(o, torch.Tensor) and o.dim() else o for n, o in options.items()}
    loss = mutual_kl_div(x, backend=target.backend, **options)
    (grad,) = torch.autograd.grad(loss, x, None if upstream is None else upstream.to(loss))
    return loss.detach().cpu(), grad.cpu()


@pytest.mark.parametrize("learners", [2, 3, 7])
@pytest.mark.parametrize("pairs", ["paper", "pair_sum", "mean"])
def test_definition(target: Target, learners: int, pairs: str, generator: torch.Generator) -> None:
    x, t = peers(generator, learners, 5, 19), 2.5
    y = x.double().requires_grad_()
    weights = {"paper": 1 / (learners - 1), "pair_sum": 1.0, "mean": 1 / (learners * (learners - 1))}
    each = [pair(y, i, j, t).mean() for i in range(learners) for j in range(learners) if i != j]
    expected = t**2 * weights[pairs] * torch.stack(each).sum()
    (expected_grad,) = torch.autograd.grad(expected, y)
    loss, grad = loss_and_gradient(target, x, pairs=pairs, temperature=t)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-6)


def test_gradient_is_own_minus_the_others_mean(target: Target, generator: torch.Generator) -> None:
    x = peers(generator, 4, 3, 11)
    p = torch.softmax(x.double() / 3, -1)
    _, grad = loss_and_gradient(target, x, temperature=3.0, reduction="sum", scale_by_t2=False)
    torch.testing.assert_close(grad.double(), (p - (p.sum(0) - p) / 3) / 3, rtol=1e-4, atol=1e-7)
    assert grad.sum(-1).abs().max() < 1e-6


def test_none_is_every_learner_on_every_row(target: Target, generator: torch.Generator) -> None:
    x = peers(generator, 3, 2, 4, 9)
    upstream = torch.rand(3, 2, 4, generator=generator) - 0.3
    y = x.double().requires_grad_()
    expected = torch.stack([(pair(y, i, (i + 1) % 3) + pair(y, i, (i + 2) % 3)) / 2 for i in range(3)])
    (expected_grad,) = torch.autograd.grad(expected, y, upstream.double())
    loss, grad = loss_and_gradient(target, x, upstream, reduction="none")
    assert loss.shape == (3, 2, 4)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-6)


def test_two_learners_are_two_kl_divs(target: Target, generator: torch.Generator) -> None:
    x = peers(generator, 2, 6, 12)
    both = sum(F.kl_div(F.log_softmax(x[i], -1), F.softmax(x[1 - i], -1), reduction="batchmean") for i in (0, 1))
    for pairs in ("paper", "pair_sum"):
        loss, _ = loss_and_gradient(target, x, pairs=pairs, reduction="batchmean")
        torch.testing.assert_close(loss, both, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learners", [1, 2, 5, 16, 17])
def test_a_list_is_the_stack(target: Target, learners: int, generator: torch.Generator) -> None:
    x = peers(generator, learners, 4, 10)
    members = [y.clone().to(target.device).requires_grad_() for y in x]
    loss = mutual_kl_div(members, backend=target.backend)
    grads = torch.autograd.grad(loss, members)
    stacked_loss, stacked_grad = loss_and_gradient(target, x)
    torch.testing.assert_close(loss.detach().cpu(), stacked_loss, rtol=0, atol=0)
    torch.testing.assert_close(torch.stack(grads).cpu(), stacked_grad, rtol=0, atol=0)


def test_a_list_of_other_strides_and_dtypes(target: Target, generator: torch.Generator) -> None:
    x = peers(generator, 3, 4, 10).bfloat16()
    members = [x[0].float(), x[1].t().contiguous().t(), torch.cat([x[2], x[2]], 1)[:, :10]]
    members = [y.to(target.device).requires_grad_() for y in members]
    grads = torch.autograd.grad(mutual_kl_div(members, backend=target.backend), members)
    _, expected = loss_and_gradient(target, x.float())
    for got, member, want in zip(grads, members, expected):
        assert got.dtype == member.dtype
        torch.testing.assert_close(got.cpu().float(), want, rtol=1e-2, atol=1e-4)


def test_some_members_of_a_list_are_frozen(target: Target, generator: torch.Generator) -> None:
    x = peers(generator, 3, 4, 10).to(target.device)
    free = x[1].clone().requires_grad_()
    (grad,) = torch.autograd.grad(mutual_kl_div([x[0], free, x[2]], backend=target.backend), free)
    torch.testing.assert_close(grad.cpu(), loss_and_gradient(target, x)[1][1], rtol=0, atol=0)


def test_one_learner_has_nobody_to_learn_from(target: Target) -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0]]])
    for reduction in ("rowmean", "none"):
        loss, grad = loss_and_gradient(
            target, x, torch.ones((1, 1) if reduction == "none" else ()), reduction=reduction
        )
        assert not loss.any() and not grad.any()


def test_learners_that_agree(target: Target, generator: torch.Generator) -> None:
    x = peers(generator, 1, 5, 30).expand(6, 5, 30)
    loss, grad = loss_and_gradient(target, x)
    assert loss.abs() < 1e-6 and grad.abs().max() < 1e-7


def test_the_order_of_learners_is_the_order_of_gradients(target: Target, generator: torch.Generator) -> None:
    x, order = peers(generator, 4, 3, 8), torch.tensor([2, 0, 3, 1])
    loss, grad = loss_and_gradient(target, x)
    other_loss, other_grad = loss_and_gradient(target, x[order])
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other_grad, grad[order], rtol=1e-5, atol=1e-7)


def test_a_constant_changes_nothing(target: Target, generator: torch.Generator) -> None:
    x = peers(generator, 3, 4, 16)
    loss, grad = loss_and_gradient(target, x)
    moved_loss, moved_grad = loss_and_gradient(target, x + torch.tensor([64.0, -256.0, 8.0]).view(3, 1, 1))
    torch.testing.assert_close(moved_loss, loss, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(moved_grad, grad, rtol=1e-3, atol=1e-4)


def test_masks(target: Target, generator: torch.Generator) -> None:
    """Ignored rows, rows of weight 0 and a NaN among them: as if they were not there."""
    x = peers(generator, 3, 6, 9)
    labels, weight = torch.tensor([1, -7, 3, 0, -7, 8]), torch.tensor([0.5, 1.0, 2.0, 0.0, 1.0, 1.0])
    kept = (labels != -7) & (weight != 0)
    expected, expected_grad = loss_and_gradient(target, x[:, kept], weight=weight[kept])
    x[:, 1] = float("nan")
    x[1, 3] = INF
    loss, grad = loss_and_gradient(target, x, labels=labels, weight=weight, ignore_index=-7)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad[:, kept], expected_grad, rtol=1e-5, atol=1e-7)
    assert not grad[:, ~kept].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["rowmean", "sum", "none"])
def test_all_rows_ignored(target: Target, dtype: torch.dtype, reduction: str, generator: torch.Generator) -> None:
    x = peers(generator, 3, 4, 5).to(dtype)
    upstream = torch.ones((3, 4) if reduction == "none" else ())
    loss, grad = loss_and_gradient(target, x, upstream, labels=torch.full((4,), -100), reduction=reduction)
    assert not loss.any() and not grad.any()


@pytest.mark.parametrize("reduction", ["rowmean", "batchmean", "mean", "none"])
def test_no_rows(target: Target, reduction: str) -> None:
    loss, grad = loss_and_gradient(
        target, torch.empty(3, 0, 7), torch.ones((3, 0) if reduction == "none" else ()), reduction=reduction
    )
    assert grad.shape == (3, 0, 7) and not loss.any()


def test_nan_stays_in_its_row(target: Target, generator: torch.Generator) -> None:
    x = peers(generator, 3, 4, 9)
    clean, clean_grad = loss_and_gradient(target, x, torch.ones(3, 4), reduction="none")
    x[1, 2, 5] = float("nan")
    loss, grad = loss_and_gradient(target, x, torch.ones(3, 4), reduction="none")
    others = torch.tensor([0, 1, 3])
    assert loss[:, 2].isnan().all() and grad[:, 2].isnan().all()
    torch.testing.assert_close(loss[:, others], clean[:, others], rtol=0, atol=0)
    torch.testing.assert_close(grad[:, others], clean_grad[:, others], rtol=0, atol=0)


def test_minus_infinity(target: Target, generator: torch.Generator) -> None:
    """A class that nobody can take adds nothing; one that only a learner cannot take makes its loss infinite."""
    x = peers(generator, 3, 2, 6)
    without = x[:, :, [0, 1, 3, 4, 5]]
    expected, expected_grad = loss_and_gradient(target, without, torch.ones(3, 2), reduction="none")
    x[:, :, 2] = -INF
    loss, grad = loss_and_gradient(target, x, torch.ones(3, 2), reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad[:, :, [0, 1, 3, 4, 5]], expected_grad, rtol=1e-5, atol=1e-7)
    assert not grad[:, :, 2].any()
    x[1, 0, 4] = -INF
    loss, grad = loss_and_gradient(target, x, torch.ones(3, 2), reduction="none")
    assert loss[1, 0] == INF and loss[[0, 2], 0].isfinite().all() and loss[:, 1].isfinite().all()
    if target.fused:
        p = torch.softmax(x.double(), -1)
        torch.testing.assert_close(grad.double(), p - (p.sum(0) - p) / 2, rtol=1e-4, atol=1e-6)


def test_one_class(target: Target) -> None:
    loss, grad = loss_and_gradient(target, torch.randn(4, 3, 1))
    assert loss == 0 and not grad.any()


@pytest.mark.parametrize("dim", [0, 1, 2, -2])
def test_class_axis_of_one_learner(target: Target, dim: int, generator: torch.Generator) -> None:
    x = peers(generator, 3, 4, 5, 6)
    weight = torch.rand([n for d, n in enumerate((4, 5, 6)) if d != dim % 3], generator=generator)
    expected, expected_grad = loss_and_gradient(target, x.movedim(dim % 3 + 1, -1).contiguous(), weight=weight)
    loss, grad = loss_and_gradient(target, x, weight=weight, dim=dim)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad.movedim(-1, dim % 3 + 1), rtol=1e-5, atol=1e-7)
    # Learners, rows and classes stored in another order than they are numbered.
    y = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    loss, grad = loss_and_gradient(target, y, weight=weight, dim=dim)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad.movedim(-1, dim % 3 + 1), rtol=1e-5, atol=1e-7)


def test_float16_gradient_survives_the_scaler(fused: Target) -> None:
    """1/N times a difference of probabilities underflows in float16 unless it is scaled before it is stored."""
    x = torch.zeros(2, 1024, 64)
    x[1, :, 0] = 0.01
    _, truth = loss_and_gradient(Target("reference", "cpu"), x.half().double(), torch.tensor(2.0**16))
    _, grad = loss_and_gradient(fused, x.half(), torch.tensor(2.0**16))
    torch.testing.assert_close(grad.double(), truth, rtol=5e-3, atol=1e-5)
    assert grad.abs().min() > 0


def test_retain_graph(target: Target, generator: torch.Generator) -> None:
    x = peers(generator, 3, 4, 9).to(target.device).requires_grad_()
    loss = mutual_kl_div(x, backend=target.backend)
    first = torch.autograd.grad(loss * 3, x, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(loss * 3, x)[0], first, rtol=0, atol=0)


def test_second_derivative(fused: Target, generator: torch.Generator) -> None:
    x = peers(generator, 3, 4, 9).to(fused.device).requires_grad_()
    (grad,) = torch.autograd.grad(mutual_kl_div(x, backend=fused.backend), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.square().sum().backward()


def test_same_bits_with_other_threads() -> None:
    target, x = Target("cpu", "cpu"), torch.randn(4, 333, 257)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(loss_and_gradient(target, x))
    finally:
        torch.set_num_threads(before)
    for loss, grad in found[1:]:
        assert torch.equal(loss, found[0][0]) and torch.equal(grad, found[0][1])


def test_temperature_as_a_tensor_does_not_recompile(generator: torch.Generator) -> None:
    x, compiled_again = peers(generator, 3, 4, 9).requires_grad_(), 0

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        nonlocal compiled_again
        compiled_again += 1
        return graph

    torch._dynamo.reset()
    step = torch.compile(lambda x, t: mutual_kl_div(x, temperature=t, backend="cpu"), fullgraph=True, backend=backend)
    for t in (1.0, 2.0, 3.5):
        loss = step(x, torch.tensor(t))
        torch.testing.assert_close(loss, mutual_kl_div(x, temperature=t, backend="cpu"))
        loss.backward()
    assert compiled_again == 1


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiles_whole(stacked: bool, dtype: torch.dtype, generator: torch.Generator) -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return mutual_kl_div(x if stacked else [x[0], x[1], x[2]], backend="cpu") * 2.0

    torch._dynamo.reset()
    x = peers(generator, 3, 4, 9).to(dtype).requires_grad_()
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x), x)[0]
    torch.testing.assert_close(got, torch.autograd.grad(step(x), x)[0], rtol=0, atol=0)


@pytest.mark.parametrize("stacked", [True, False])
def test_opcheck(stacked: bool, generator: torch.Generator) -> None:
    x = peers(generator, 3, 4, 9)
    first, others = (x, []) if stacked else (x[0].clone(), [x[1].clone(), x[2].clone()])
    scalars, labels = torch.tensor([2.0, 1.0]), torch.tensor([0, -100, 3, 4])
    forward = (scalars, first, others, labels, None, None, 1, -100, 1, stacked, True, "cpu")
    torch.library.opcheck(torch.ops.kdkernels.peer_divergence_forward.default, forward)
    backward = (scalars, first, others, labels, None, torch.ones(1), torch.ones(1), -100, 1, stacked, "cpu")
    torch.library.opcheck(torch.ops.kdkernels.peer_divergence_backward.default, backward)


def test_module(generator: torch.Generator) -> None:
    x = peers(generator, 3, 4, 9)
    module = MutualKLDivLoss(temperature=2.0, pairs="mean")
    assert torch.equal(module(x), mutual_kl_div(x, temperature=2.0, pairs="mean"))
    assert torch.equal(module(list(x)), module(x)) and "pairs='mean'" in repr(module)


X = torch.zeros(3, 4, 5)


@pytest.mark.parametrize(
    "error, words, call",
    [
        (ValueError, "empty list", lambda: mutual_kl_div([])),
        (TypeError, "must be a tensor or a list", lambda: mutual_kl_div("logits")),
        (TypeError, r"logits\[1\] must be float16", lambda: mutual_kl_div([X[0], X[0].long()])),
        (ValueError, r"logits\[1\] \(4, 6\)", lambda: mutual_kl_div([X[0], torch.zeros(4, 6)])),
        (ValueError, "at least one peer", lambda: mutual_kl_div(torch.zeros(0, 4, 5))),
        (ValueError, r"\(peers, ..., classes\)", lambda: mutual_kl_div(torch.zeros(5))),
        (ValueError, "at least one class", lambda: mutual_kl_div(torch.zeros(3, 4, 0))),
        (ValueError, "unknown pairs 'all'", lambda: mutual_kl_div(X, pairs="all")),
        (ValueError, "unknown reduction 'avg'", lambda: mutual_kl_div(X, reduction="avg")),
        (ValueError, "temperature must be positive", lambda: mutual_kl_div(X, temperature=0.0)),
        (
            ValueError,
            "temperature gets no gradient",
            lambda: mutual_kl_div(X, temperature=torch.ones((), requires_grad=True)),
        ),
        (ValueError, "weight must have the shape", lambda: mutual_kl_div(X, weight=torch.ones(3, 4))),
        (IndexError, "labels hold 5", lambda: mutual_kl_div(X, labels=torch.full((4,), 5))),
        (IndexError, "dim must be between", lambda: mutual_kl_div(X, dim=2)),
        (BackendError, "float64 runs on 'reference'", lambda: mutual_kl_div(X.double(), backend="cpu")),
    ],
)
def test_errors(error: type, words: str, call) -> None:
    with pytest.raises(error, match=words):
        call()
