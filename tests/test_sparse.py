"""Losses against a sparse teacher: each variant in plain words, its limits, and what must not go wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from targets import Target

from kdkernels import BackendError, TopKDivLoss, ULDLoss, kl_div, topk_div, uld_loss, union_support

INF = float("inf")
VARIANTS = [
    ("renormalize", "forward_kl"),
    ("renormalize", "js"),
    *((m, d) for m in ("renormalize_both", "none", "tail") for d in ("forward_kl", "reverse_kl", "js")),
    ("uniform", "forward_kl"),
]


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """sum p log(p / q), for masses that need not add up to one."""
    return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log()), 0.0).sum(-1)


def in_words(s: torch.Tensor, q: torch.Tensor, index: torch.Tensor, missing: str, divergence: str) -> torch.Tensor:
    """Rows of the loss from float64 scores and the teacher's probabilities at `index`, all over dense (N, V) tensors."""
    n, v = s.shape
    p = s.softmax(-1)
    support = torch.zeros(n, v, dtype=torch.bool).scatter(1, index, True)
    t = torch.zeros(n, v, dtype=torch.float64).scatter(1, index, q)
    if missing.startswith("renormalize"):
        t = t / t.sum(1, keepdim=True)
    if missing == "renormalize_both":
        p = p * support / (p * support).sum(1, keepdim=True)
    elif missing == "none":
        p = p * support
    elif missing == "tail":
        p = torch.cat([p * support, (p * ~support).sum(1, keepdim=True)], 1)
        t = torch.cat([t, 1 - t.sum(1, keepdim=True)], 1)
    elif missing == "uniform":
        t = t + ~support * ((1 - t.sum(1, keepdim=True)) / (~support).sum(1, keepdim=True))
    if divergence == "js":
        return 0.5 * kl(t, (p + t) / 2) + 0.5 * kl(p, (p + t) / 2)
    return kl(t, p) if divergence == "forward_kl" else kl(p, t)


def scores(generator: torch.Generator, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    s = 3 * torch.randn(shape, generator=generator)
    return s, s + 2 * torch.randn(shape, generator=generator)


def top(
    teacher: torch.Tensor, k: int, missing: str, t: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, dict[str, str]]:
    """(values, indices, options) as a variant takes them."""
    if missing.startswith("renormalize"):
        return *teacher.topk(k, -1), {"missing": missing}
    return *(teacher / t).log_softmax(-1).topk(k, -1), {"missing": missing, "teacher_values_are": "log_probs"}


def run(
    target: Target, s: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, upstream: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Loss and both gradients, on the CPU."""
    s, values = (x.detach().to(target.device).requires_grad_() for x in (s, values))
    options = {n: o.to(target.device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    loss = topk_div(s, values, indices.to(target.device), backend=target.backend, **options)
    ds, dv = torch.autograd.grad(loss, (s, values), None if upstream is None else upstream.to(loss))
    return loss.detach().cpu(), ds.cpu(), dv.cpu()


def close(got: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got.double(), expected.detach().double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("missing, divergence", VARIANTS)
@pytest.mark.parametrize("k", [1, 5, 37])
def test_definition(target: Target, missing: str, divergence: str, k: int, generator: torch.Generator) -> None:
    s, teacher = scores(generator, 4, 37)
    t = 2.5
    values, indices, options = top(teacher, k, missing, t)
    upstream = torch.rand(4, generator=generator) - 0.4
    shuffled = torch.rand(4, k, generator=generator).argsort(-1)
    x, y = s.double().requires_grad_(), values.double().requires_grad_()
    q = (y / t if missing.startswith("renormalize") else y).exp()
    expected = t**2 * in_words(x / t, q, indices, missing, divergence)
    if k == 37 and missing in ("tail", "uniform"):
        expected = t**2 * in_words(x / t, q, indices, "none", divergence)  # nothing is missing
    dx, dy = torch.autograd.grad(expected, (x, y), upstream.double())
    loss, ds, dv = run(target, s, values.gather(1, shuffled), indices.gather(1, shuffled), upstream, divergence=divergence,
                       temperature=t, reduction="none", **options)  # fmt: skip
    close(loss, expected, atol=1e-5)
    close(ds, dx)
    close(dv, dy.gather(1, shuffled), atol=3e-6)


@pytest.mark.parametrize("missing, divergence", VARIANTS)
def test_all_classes_are_the_dense_loss(
    target: Target, missing: str, divergence: str, generator: torch.Generator
) -> None:
    s, teacher = scores(generator, 5, 23)
    values, indices, options = top(teacher, 23, missing, 2.0)
    loss, ds, _ = run(target, s, values, indices, divergence=divergence, temperature=2.0, **options)
    x = s.double().requires_grad_()
    p, q = (x / 2).softmax(-1), (teacher.double() / 2).softmax(-1)
    dense = {"forward_kl": kl(q, p), "reverse_kl": kl(p, q), "js": (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2}
    expected = 4 * dense[divergence].mean()
    close(loss, expected)
    close(ds, torch.autograd.grad(expected, x)[0])
    if divergence == "forward_kl":
        close(loss, kl_div(s, teacher, temperature=2.0))


@pytest.mark.parametrize("missing, divergence", VARIANTS)
def test_entries_at_minus_one_are_left_out(
    target: Target, missing: str, divergence: str, generator: torch.Generator
) -> None:
    s, teacher = scores(generator, 3, 31)
    values, indices, options = top(teacher, 4, missing)
    expected = run(target, s, values, indices, divergence=divergence, **options)
    padded = torch.cat([torch.full((3, 2), INF), values, torch.full((3, 1), float("nan"))], 1)
    at = F.pad(indices, (2, 1), value=-1)
    loss, ds, dv = run(target, s, padded, at, divergence=divergence, **options)
    # Losses and gradients cancel from terms of order 1.
    close(loss, expected[0], atol=2**-23, rtol=1e-6)
    close(ds, expected[1], atol=5e-7, rtol=1e-5)
    close(dv, F.pad(expected[2], (2, 1)), atol=5e-7, rtol=1e-5)


@pytest.mark.parametrize("missing, divergence", VARIANTS)
def test_rows_without_any_entry(target: Target, missing: str, divergence: str, generator: torch.Generator) -> None:
    s, teacher = scores(generator, 3, 9)
    values, indices, options = top(teacher, 2, missing)
    indices[1] = -1
    loss, ds, dv = run(
        target, s, values, indices, divergence=divergence, reduction="none", upstream=torch.ones(3), **options
    )
    assert loss.isfinite().all() and ds.isfinite().all() and dv.isfinite().all()
    if divergence == "forward_kl" and missing != "uniform":
        close(loss[1], torch.zeros(()))
        close(ds[1], torch.zeros(9))


@pytest.mark.parametrize("missing, divergence", VARIANTS)
def test_rows_left_out(target: Target, missing: str, divergence: str, generator: torch.Generator) -> None:
    s, teacher = scores(generator, 6, 40)
    values, indices, options = top(teacher, 5, missing)
    labels = torch.tensor([1, -100, 3, 4, -100, 6])
    weight = torch.tensor([1.0, 1.0, 0.0, 2.0, 0.5, 0.25])
    kept = torch.tensor([0, 3, 5])
    s[1], s[2, 3], values[4], values[2] = float("nan"), INF, float("nan"), -INF
    got = run(target, s, values, indices, labels=labels, weight=weight, divergence=divergence, **options)
    alone = run(target, s[kept], values[kept], indices[kept], weight=weight[kept], divergence=divergence, **options)
    close(got[0], alone[0], rtol=1e-6)
    for full, part in zip(got[1:], alone[1:], strict=True):
        close(full[kept], part, rtol=1e-5, atol=1e-8)
        assert not full[[1, 2, 4]].any()
    loss, ds, dv = run(target, s, values, indices, labels=torch.full((6,), -100), divergence=divergence, **options)
    assert loss == 0 and not ds.any() and not dv.any()


def test_empty_batch(target: Target) -> None:
    loss, ds, dv = run(target, torch.zeros(0, 7), torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long))
    assert loss == 0 and ds.shape == (0, 7) and dv.shape == (0, 3)


def test_reductions(target: Target, generator: torch.Generator) -> None:
    s, teacher = scores(generator, 2, 3, 19)
    values, indices = teacher.topk(4, -1)
    weight = torch.rand(2, 3, generator=generator)
    rows, _, _ = run(target, s, values, indices, torch.ones(2, 3), reduction="none", weight=weight)
    assert rows.shape == (2, 3)
    for options, divisor in (
        ({}, weight.sum()), ({"reduction": "batchmean"}, 2), ({"reduction": "mean"}, s.numel()),
        ({"reduction": "sum"}, 1), ({"num_items": 37.0}, 37), ({"num_items": torch.tensor(37)}, 37),
    ):  # fmt: skip
        close(run(target, s, values, indices, weight=weight, **options)[0], rows.sum() / divisor, rtol=1e-6)
    assert run(target, s, values, indices)[0].dtype == torch.float32
    close(
        run(target, s, values, indices, temperature=torch.tensor(2.0))[0],
        run(target, s, values, indices, temperature=2.0)[0],
    )


def test_masked_vocabulary(target: Target, generator: torch.Generator) -> None:
    """-inf outside the support changes nothing; where the teacher has mass the loss is +inf, the gradient finite."""
    s, teacher = scores(generator, 3, 30)
    for missing in ("renormalize", "tail", "none"):
        values, indices, options = top(teacher, 4, missing)
        x = s.clone().scatter(1, indices[:, :1], 9.0)
        outside = torch.ones(3, 30).scatter(1, indices, 0).argmax(1)
        x[0, outside[0]] = -INF
        loss, ds, _ = run(target, x, values, indices, torch.ones(3), reduction="none", **options)
        y = x.double().requires_grad_()
        q = values.double().exp()
        expected = in_words(y, q, indices, missing, "forward_kl")
        close(loss, expected)
        close(ds, torch.autograd.grad(expected.sum(), y)[0].nan_to_num())
        x[1, indices[1, 2]] = -INF
        loss, ds, _ = run(target, x, values, indices, torch.ones(3), reduction="none", **options)
        assert loss[1] == INF and loss[[0, 2]].isfinite().all() and ds.isfinite().all()
    values, indices, options = top(teacher, 4, "uniform")
    loss, ds, _ = run(target, x, values, indices, torch.ones(3), reduction="none", **options)
    assert loss[0] == INF and loss[2].isfinite() and ds[2].isfinite().all()


def test_a_vanishing_tail_is_exact(target: Target) -> None:
    """The k hold all but 1e-11 of the student's mass: 1 - sum p would be rounding."""
    s = torch.zeros(1, 3000)
    s[0, 7], s[0, 1234] = 33.0, 32.0
    s[0, 2999] = 1.0
    values, indices = torch.tensor([[0.6, 0.3]]).log(), torch.tensor([[7, 1234]])
    loss, ds, _ = run(target, s, values, indices, missing="tail", teacher_values_are="log_probs", scale_by_t2=False)
    x = s.double().requires_grad_()
    log_p = x.log_softmax(1)
    rest = torch.cat([log_p[:, :7], log_p[:, 8:1234], log_p[:, 1235:]], 1).logsumexp(1)
    q = values.double().exp()
    tail = 1 - q.sum(1)
    expected = ((q * (values.double() - log_p[:, [7, 1234]])).sum(1) + tail * (tail.log() - rest)).mean()
    close(loss, expected, rtol=1e-6)
    close(ds, torch.autograd.grad(expected, x)[0], rtol=1e-5, atol=1e-6)


def test_nan_stays_in_its_row(target: Target, generator: torch.Generator) -> None:
    for missing, divergence in VARIANTS:
        s, teacher = scores(generator, 4, 50)
        values, indices, options = top(teacher, 3, missing)
        clean = run(target, s, values, indices, torch.ones(4), divergence=divergence, reduction="none", **options)
        s[1, indices[1, 0]], s[2, (indices[2, 0] + 1) % 50] = float("nan"), float("nan")
        loss, ds, dv = run(
            target, s, values, indices, torch.ones(4), divergence=divergence, reduction="none", **options
        )
        assert loss[0] == clean[0][0] and loss[3] == clean[0][3]
        assert torch.equal(ds[[0, 3]], clean[1][[0, 3]]) and torch.equal(dv[[0, 3]], clean[2][[0, 3]])
        assert loss[1].isnan() and ds[1].isnan().any()
        assert loss[2].isnan()


def test_float16_gradients_do_not_underflow(target: Target, generator: torch.Generator) -> None:
    s, teacher = scores(generator, 2, 400)
    values, indices = teacher.topk(8, -1)
    scale = 2.0**16
    _, ds, _ = run(target, s.half(), values, indices, torch.tensor(scale), num_items=8192.0)
    _, exact, _ = run(
        Target("reference", "cpu"), s.half().double(), values.double(), indices, torch.tensor(scale), num_items=8192.0
    )
    close(ds, exact, rtol=2**-10, atol=2**-24)
    assert (ds != 0).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout(target: Target, dtype: torch.dtype, generator: torch.Generator) -> None:
    s, teacher = scores(generator, 2, 3, 45)
    s = s.to(dtype)
    values, indices, options = top(teacher, 6, "tail")
    loss, ds, dv = run(target, s, values, indices, **options)
    odd = [
        (s.transpose(1, 2).contiguous().transpose(1, 2), values, indices),
        (s.movedim(-1, 0).contiguous().movedim(0, -1), values, indices),
        (torch.stack([s, s], -1)[..., 0], torch.stack([values, values], -1)[..., 1], indices),
        (torch.cat([s, s], -1)[..., :45], values.transpose(0, 1).contiguous().transpose(0, 1), indices.int()),
        (F.pad(s, (1, 0))[..., 1:], values, torch.stack([indices, indices], 0)[1]),
    ]
    for x, v, i in odd:
        got = run(target, x, v, i, **options)
        close(got[0], loss, rtol=1e-6)
        close(got[1], ds, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)
        close(got[2], dv, rtol=1e-5, atol=1e-7)
    one = s[:1, :1].expand(2, 3, 45)
    close(
        run(target, one, values, indices, **options)[0],
        run(target, one.contiguous(), values, indices, **options)[0],
        rtol=1e-6,
    )


def test_duplicates_count_twice_inside_and_once_outside(target: Target, generator: torch.Generator) -> None:
    s, _ = scores(generator, 1, 2500)
    values = torch.tensor([[0.1, 0.2, 0.3, 0.15, 0.05]]).log()
    indices = torch.tensor([[2000, 7, 2000, 8, 2000]])
    loss, ds, _ = run(target, s, values, indices, missing="tail", teacher_values_are="log_probs")
    x = s.double().requires_grad_()
    p, q = x.softmax(1), values.double().exp()
    rest = 1 - p[0, [7, 8, 2000]].sum()
    expected = kl(q, p[:, indices[0]]) + 0.2 * (torch.tensor(0.2).double().log() - rest.log())
    close(loss, expected[0])
    close(ds, torch.autograd.grad(expected, x)[0])
    again = run(target, s, values, indices, missing="tail", teacher_values_are="log_probs")
    assert torch.equal(ds, again[1])


def test_union_support(target: Target, generator: torch.Generator) -> None:
    s, teacher = scores(generator, 3, 20)
    union = union_support(s, teacher.topk(4, -1).indices, 4)
    for row, mine, theirs in zip(union, s.topk(4, -1).indices, teacher.topk(4, -1).indices, strict=True):
        assert sorted(set(row.tolist()) - {-1}) == sorted({*mine.tolist(), *theirs.tolist()})
        assert len(row) == 8 and (row[row >= 0].diff() < 0).all()
    assert union_support(s, union, 20).shape == (3, 20)
    values = teacher.gather(1, union.clamp(min=0))
    loss, _, _ = run(target, s, values, union, missing="renormalize_both", divergence="reverse_kl")
    some = union >= 0
    p, q = (x.gather(1, union.clamp(min=0)).double().masked_fill(~some, -INF).softmax(1) for x in (s, teacher))
    close(loss, kl(p, q).mean())


def test_out_of_range(target: Target) -> None:
    s, values = torch.randn(3, 9), torch.randn(3, 2)
    indices = torch.tensor([[0, 1], [2, 9], [3, 4]])
    for bad in (9, -2):
        indices[1, 1] = bad
        if target.device == "cpu":
            with pytest.raises(IndexError, match=f"teacher_indices must be .*; got {bad}"):
                run(target, s, values, indices)
            continue
        loss, ds, _ = run(target, s, values, indices, torch.ones(3), reduction="none")
        assert loss[1].isnan() and ds[1].isnan().all() and loss[[0, 2]].isfinite().all() and ds[[0, 2]].isfinite().all()


def test_kernels_make_a_row_with_a_bad_index_nan(target: Target) -> None:
    """What a GPU does, where nobody looks at the indices first."""
    from kdkernels.ops.row_gather.op import row_gather

    s = torch.randn(4, 9, device=target.device, requires_grad=True)
    indices = torch.tensor([[0, 1], [2, 9], [-5, 4], [-1, 8]], device=target.device)
    live = torch.tensor([True, True, True, False], device=target.device)
    outputs = row_gather(s, indices, live=live, outside=2, backend=target.backend)
    sum(x.nan_to_num().sum() for x in outputs[1:]).backward()
    assert outputs[1][1:3].isnan().all() and outputs[2][1:3].isnan().all() and outputs[1][[0, 3]].isfinite().all()
    assert s.grad[1:3].isnan().all() and s.grad[0].isfinite().all() and not s.grad[3].any()


def test_two_runs_and_any_number_of_threads(target: Target, generator: torch.Generator) -> None:
    s, teacher = scores(generator, 9, 1500)
    values, indices, options = top(teacher, 20, "tail")
    before, first = torch.get_num_threads(), run(target, s, values, indices, **options)
    try:
        torch.set_num_threads(2)
        second = run(target, s, values, indices, **options)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_errors() -> None:
    s, v, i = torch.randn(4, 9), torch.randn(4, 3), torch.zeros(4, 3, dtype=torch.long)
    for message, call in {
        "between 1 and 9": lambda: topk_div(s, torch.randn(4, 10), torch.zeros(4, 10, dtype=torch.long)),
        "same shape": lambda: topk_div(s, v, i[:, :2]),
        "same rows": lambda: topk_div(s, v[:2], i[:2]),
        "dim must be the last": lambda: topk_div(s, v, i, dim=0),
        "reverse_kl is infinite": lambda: topk_div(s, v, i, divergence="reverse_kl"),
        "needs the teacher's mass": lambda: topk_div(s, v, i, missing="tail"),
        "'uniform' goes with": lambda: topk_div(
            s, v, i, missing="uniform", divergence="js", teacher_values_are="log_probs"
        ),
        "teacher_temperature is for": lambda: topk_div(
            s, v, i, teacher_values_are="log_probs", teacher_temperature=2.0
        ),
        "min_log_prob goes with": lambda: topk_div(s, v, i, min_log_prob=-5.0),
        "unknown missing 'zero'": lambda: topk_div(s, v, i, missing="zero"),
        "temperature must be positive": lambda: topk_div(s, v, i, temperature=0.0),
        "gets no gradient": lambda: topk_div(s, v, i, num_items=torch.tensor(2.0, requires_grad=True)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="class indices"):
        topk_div(s, v, v)
    with pytest.raises(TypeError, match="teacher_values must be"):
        topk_div(s, i, i)
    with pytest.raises(BackendError, match="float64"):
        topk_div(s.double(), v, i, backend="cpu")
    assert topk_div(s.double(), v, i).dtype == torch.float64


def test_clamped_log_probs(target: Target) -> None:
    s = torch.tensor([[0.0, -30.0, 1.0, 2.0]])
    values, indices = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[1, 2]])
    options = {"missing": "none", "teacher_values_are": "log_probs", "min_log_prob": -4.0}
    loss, ds, _ = run(target, s, values, indices, **options)
    x = s.double().requires_grad_()
    a, b = x.log_softmax(1)[:, [1, 2]].clamp(min=-4), values.double()
    expected = (b.exp() * (b - a)).sum()
    close(loss, expected)
    close(ds, torch.autograd.grad(expected, x)[0])


@pytest.mark.parametrize("missing, divergence", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_temperature_learns(
    fused: Target, missing: str, divergence: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    s, teacher = scores(generator, 4, 23)
    student = (s + 300).to(dtype)
    if missing != "uniform":
        student[1, 3:7] = -math.inf  # autograd's own -inf / T is NaN
    if missing in ("none", "tail", "uniform"):
        teacher = teacher.log_softmax(-1)
        kind = "log_probs"
    else:
        kind = "logits"
    values, indices = teacher[:, :3].to(dtype), torch.arange(3).expand(4, 3)
    upstream = torch.tensor([0.5, 2.0, -1.0, 3.0])

    def gradients(x: torch.Tensor, backend: str, wanted: tuple[bool, bool]) -> list[torch.Tensor]:
        x = x.to(fused.device).requires_grad_(wanted[0])
        wide = torch.promote_types(x.dtype, torch.float32)
        temperature = torch.tensor(1.5, device=fused.device, dtype=wide, requires_grad=wanted[1])
        loss = topk_div(
            x, values.to(x), indices.to(x.device), missing=missing, divergence=divergence, temperature=temperature,
            teacher_values_are=kind, reduction="none", backend=backend,
        )  # fmt: skip
        leaves = [leaf for leaf, want in zip((x, temperature), wanted, strict=True) if want]
        return [g.double().cpu() for g in torch.autograd.grad(loss, leaves, upstream.to(loss))]

    ds, dt = gradients(student.clone(), fused.backend, (True, True))
    (alone,) = gradients(student.clone(), fused.backend, (False, True))
    expected_ds, expected_dt = gradients(student.double().clamp(min=-1e4), "reference", (True, True))
    roundoff = torch.finfo(dtype).eps
    close(ds, expected_ds, rtol=2 * roundoff, atol=1e-6 + roundoff / 8)
    close(dt, expected_dt, rtol=2 * roundoff + 1e-5, atol=1e-5)
    assert torch.equal(alone, dt)


def test_module_and_second_derivative(fused: Target, generator: torch.Generator) -> None:
    s, teacher = scores(generator, 3, 12)
    values, indices = (x.to(fused.device) for x in teacher.topk(3, -1))
    s = s.to(fused.device).requires_grad_()
    module = TopKDivLoss(temperature=2.0, backend=fused.backend)
    loss = module(s, values, indices)
    assert torch.equal(loss, topk_div(s, values, indices, temperature=2.0, backend=fused.backend))
    (grad,) = torch.autograd.grad(loss, s, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "missing, divergence", [("renormalize", "forward_kl"), ("tail", "js"), ("uniform", "forward_kl")]
)
def test_compiles_as_one_graph(missing: str, divergence: str, generator: torch.Generator) -> None:
    s, teacher = scores(generator, 4, 25)
    values, indices, options = top(teacher, 3, missing)
    labels = torch.tensor([1, -100, 2, 3])

    def step(x: torch.Tensor, temperature: float) -> torch.Tensor:
        return topk_div(x, values, indices, labels=labels, temperature=temperature, divergence=divergence, **options)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for temperature in (1.0, 2.0, 3.0):
        results = []
        for f in (step, compiled):
            x = s.clone().requires_grad_()
            loss = f(x, temperature)
            loss.backward()
            results.append((loss.detach(), x.grad))
        close(results[1][0], results[0][0], rtol=1e-6)
        close(results[1][1], results[0][1], rtol=1e-6, atol=1e-8)


# ----------------------------------------------------------------------------------------------------------------- ULD


@pytest.mark.parametrize("classes", [(11, 11), (11, 17), (17, 11), (1, 5)])
def test_uld(target: Target, classes: tuple[int, int], generator: torch.Generator) -> None:
    s, teacher = (3 * torch.randn(2, 3, v, generator=generator).to(target.device) for v in classes)
    upstream = (torch.rand(2, 3, generator=generator) - 0.4).to(target.device)
    x, y = (z.double().requires_grad_() for z in (s, teacher))
    p, q = (F.pad(z, (0, 17 - z.shape[-1])) for z in ((x / 2).softmax(-1), (y / 3).softmax(-1)))
    expected = (p.sort(descending=True).values - q.sort(descending=True).values).abs().sum(-1)
    grads = torch.autograd.grad(expected, (x, y), upstream.double())
    s, teacher = s.requires_grad_(), teacher.requires_grad_()
    options = {"temperature": 2.0, "teacher_temperature": 3.0, "reduction": "none", "backend": target.backend}
    loss = uld_loss(s, teacher, **options)
    close(loss, expected)
    for got, wanted in zip(torch.autograd.grad(loss, (s, teacher), upstream), grads, strict=True):
        close(got, wanted)
    assert torch.equal(ULDLoss(**options)(s, teacher), loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uld_keeps_the_order_of_equal_scores(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Zeros of both signs among them: which class gets which gradient is torch's stable sort's choice."""
    s, t = (torch.randint(-2, 3, (4, v), generator=generator).to(dtype) for v in (300, 260))
    s = s.where(torch.rand(s.shape, generator=generator) < 0.5, -s).requires_grad_()
    (got,), (wanted,) = (
        torch.autograd.grad(uld_loss(x, t.to(x.dtype), reduction="sum", backend=backend), x)
        for x, backend in ((s, "auto"), (s.detach().double().requires_grad_(), "reference"))
    )
    close(got.double(), wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_uld_has_no_slope_where_probabilities_meet(target: Target) -> None:
    """The halves at the first place pull at nothing, though other places do."""
    x = torch.tensor([[0.0, math.log(2), 0.0]], device=target.device, requires_grad=True)
    uld_loss(x, torch.tensor([[1.0, 1.0, -INF]], device=target.device), backend=target.backend).backward()
    close(x.grad, torch.tensor([[-0.25, 0.0, 0.25]], device=target.device))


def test_uld_traps(generator: torch.Generator) -> None:
    s = torch.randn(4, 9, generator=generator)
    same = s[:, torch.randperm(9, generator=generator)]
    assert uld_loss(s, same) < 1e-6  # a vocabulary in another order
    x = s.clone()
    x[1], x[2, 0] = float("nan"), -INF
    x.requires_grad_()
    labels = torch.tensor([0, -100, 2, 3])
    loss = uld_loss(x, torch.randn(4, 12, generator=generator), labels=labels)
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.isfinite() and grad.isfinite().all() and not grad[1].any() and grad[2, 0] == 0
    (grad,) = torch.autograd.grad(uld_loss(x, s, labels=torch.full((4,), -100)), x)
    assert not grad.any()
    assert uld_loss(torch.zeros(0, 5), torch.zeros(0, 6)) == 0
    with pytest.raises(ValueError, match="same rows"):
        uld_loss(s, s[:2])
    compiled = torch.compile(lambda a, b: uld_loss(a, b, temperature=2.0), fullgraph=True, backend="aot_eager")
    y = s.clone().requires_grad_()
    compiled(y, same * 2).backward()
    (expected,) = torch.autograd.grad(uld_loss(y, same * 2, temperature=2.0), y)
    close(y.grad, expected)
