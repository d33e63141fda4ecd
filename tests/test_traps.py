"""The traps that other libraries fell into, for losses on logits: infinities, masks, layouts of the batch, scales."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sweep import BF16, CASES, F16, F32, F64, cast, check
from targets import Target

from kdkernels import distillation_loss, js_div, kl_div

pytestmark = pytest.mark.usefixtures("poisoned")
INF, NAN = math.inf, math.nan


def scores(shape: Any, generator: torch.Generator, dtype: torch.dtype = F32) -> tuple[torch.Tensor, torch.Tensor]:
    s, t = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    return s.to(dtype), t.to(dtype)


def run(function: Any, target: Target, *tensors: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, the student's gradient of its sum), on the CPU."""
    student, *rest = (x.to(target.device) if isinstance(x, torch.Tensor) else x for x in tensors)
    options = {k: v.to(target.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    student = student.detach().requires_grad_()
    loss = function(student, *rest, backend=target.backend, **options)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach().cpu(), grad.cpu()


def close(x: torch.Tensor, y: torch.Tensor, rtol: float = 2e-6, atol: float = 1e-7) -> None:
    torch.testing.assert_close(x.double(), y.double(), rtol=rtol, atol=atol)


# ------------------------------------------------------------------------------------------ infinities and masked classes


@pytest.mark.parametrize("classes", [6, 1500, 9000])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_classes_masked_in_both_models(
    target: Target, classes: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """-inf in both contributes nothing: as if the class were not there. (More than one tile, whole tiles masked.)"""
    s, t = scores((4, classes), generator, dtype)
    masked = torch.zeros(classes, dtype=torch.bool)
    masked[1::2] = True
    masked[: classes // 3] = True
    labels = torch.full((4,), int((~masked).nonzero()[0]))
    short = distillation_loss(s[:, ~masked].double(), t[:, ~masked].double(), labels * 0, 2.0, backend="reference")
    s, t = s.masked_fill(masked, -INF), t.masked_fill(masked, -INF)
    loss, grad = run(distillation_loss, target, s, t, labels, temperature=2.0)
    close(loss, short)
    assert grad.isfinite().all()
    assert (grad[:, masked] == 0).all()


def test_class_masked_in_the_teacher_only(target: Target, generator: torch.Generator) -> None:
    """No teacher mass, no contribution; the student still learns to leave the class."""
    s, t = scores((3, 11), generator)
    t[:, 4] = -INF
    loss, grad = run(kl_div, target, s, t, temperature=2.0, reduction="none")
    truth, expected = run(kl_div, Target("reference", "cpu"), s.double(), t.double(), temperature=2.0, reduction="none")
    assert loss.isfinite().all()
    close(loss, truth)
    close(grad, expected)
    assert (grad[:, 4] > 0).all()


@pytest.mark.parametrize("classes", [11, 2000])
@pytest.mark.parametrize("reduction", ["none", "rowmean"])
def test_teacher_mass_on_a_class_masked_in_the_student(
    target: Target, classes: int, reduction: str, generator: torch.Generator
) -> None:
    """The divergence is +inf (not 0 and not NaN), and its gradient p_s - p_t is still finite."""
    s, t = scores((3, classes), generator)
    s[1, 4] = -INF
    loss, grad = run(kl_div, target, s, t, temperature=2.0, reduction=reduction)
    assert (loss[1] if reduction == "none" else loss) == INF
    if reduction == "none":
        assert loss[[0, 2]].isfinite().all()
    p_s, p_t = (s.double() / 2).softmax(-1), (t.double() / 2).softmax(-1)
    # Two probabilities that may be near 1, each with its rounding.
    close(grad, (p_s - p_t) * 2 / (1 if reduction == "none" else 3), atol=1e-6)


def test_mass_that_underflows_on_a_masked_class(target: Target, generator: torch.Generator) -> None:
    """A teacher probability below float32 on a student's -inf class, met before the teacher's largest score is: never NaN."""
    s, t = scores((2, 5000), generator)
    s[:, 3] = -INF
    t[0, 4999] += 300.0
    t[1, 4999] += 60.0
    loss, grad = run(kl_div, target, s, t, reduction="none")
    assert not loss.isnan().any()
    assert loss[1] == INF  # e^-60 is a float
    assert grad.isfinite().all()


@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_whole_vocabulary_masked(target: Target, who: str, generator: torch.Generator) -> None:
    """A softmax over nothing is NaN, in its own row only, and nothing at all if the row is left out."""
    s, t = scores((3, 7), generator)
    if who in ("student", "both"):
        s[1] = -INF
    if who in ("teacher", "both"):
        t[1] = -INF
    loss, grad = run(kl_div, target, s, t, reduction="none")
    assert loss[1].isnan()
    assert loss[[0, 2]].isfinite().all()
    assert grad[[0, 2]].isfinite().all()
    loss, grad = run(kl_div, target, s, t, labels=torch.tensor([0, -100, 1]))
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert (grad[1] == 0).all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("of_teacher", [False, True], ids=["student", "teacher"])
@pytest.mark.parametrize("loss", [kl_div, js_div, distillation_loss])
def test_gradients_too_large_for_the_caches(
    loss: Any, of_teacher: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """From 8 MiB on the CPU kernel writes them past the caches; rows of 9001 classes begin anywhere in a line."""
    n = 240 if dtype == F32 else 480
    both, labels = scores((n, 9001), generator, dtype), torch.randint(9001, (n,), generator=generator)
    grads = []
    for rows in (slice(None), slice(97, 100)):
        leaves = [x[rows].clone().requires_grad_(i == of_teacher) for i, x in enumerate(both)]
        with_labels = {"labels": labels[rows]} if loss is distillation_loss else {}
        total = loss(*leaves, temperature=2.0, reduction="sum", backend="cpu", **with_labels)
        grads += torch.autograd.grad(total, leaves[of_teacher])
    whole, some = grads
    assert whole.nbytes >= 2**23 > some.nbytes
    assert torch.equal(whole[97:100], some)
    assert whole.isfinite().all() and (whole != 0).any(dim=1).all()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("classes", [9, 3000])
def test_nan_stays_in_its_own_row(
    target: Target, bad: float, who: str, classes: int, generator: torch.Generator
) -> None:
    s, t = scores((5, classes), generator)
    (s if who == "student" else t)[3, classes // 2] = bad
    loss, grad = run(kl_div, target, s, t, temperature=2.0, reduction="none")
    others = [0, 1, 2, 4]
    clean, clean_grad = run(kl_div, target, s[others], t[others], temperature=2.0, reduction="none")
    assert loss[3].isnan()
    assert grad[3].isnan().any()
    close(loss[others], clean, 0, 0) if target.backend == "cpu" else close(loss[others], clean)
    close(grad[others], clean_grad)


@pytest.mark.parametrize("function", [kl_div, distillation_loss])
@pytest.mark.parametrize("by", ["labels", "weight"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_what_is_left_out_may_hold_anything(
    target: Target, function: Any, by: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """NaN and infinities in ignored rows change nothing; their gradient is 0."""
    s, t = scores((5, 13), generator, dtype)
    labels = torch.randint(0, 13, (5,), generator=generator)
    out = torch.tensor([False, True, False, True, True])
    options: dict[str, Any] = {"labels": labels}
    if by == "labels":
        options["labels"] = labels.masked_fill(out, -100)
    else:
        options["weight"] = torch.rand(5, generator=generator).masked_fill(out, 0)
    clean, clean_grad = run(function, target, s, t, **options)
    s[1], s[3, 2], t[3, 5], t[4] = NAN, INF, NAN, -INF
    loss, grad = run(function, target, s, t, **options)
    assert torch.equal(loss, clean)
    assert torch.equal(grad, clean_grad)
    assert (grad[out] == 0).all()


@pytest.mark.parametrize("function", [kl_div, distillation_loss])
@pytest.mark.parametrize("reduction", ["rowmean", "mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_all_rows_ignored(
    target: Target, function: Any, reduction: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    s, t = scores((2, 3, 17), generator, dtype)
    labels = torch.full((2, 3), -100)
    loss, grad = run(function, target, s, t, labels=labels, reduction=reduction)
    assert (loss == 0).all()
    assert (grad == 0).all()
    assert grad.shape == s.shape


@pytest.mark.parametrize("function", [kl_div, distillation_loss])
@pytest.mark.parametrize("reduction", ["rowmean", "mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 3, 5), (2, 2, 0, 5)], ids=str)
def test_empty_batch(target: Target, function: Any, reduction: str, shape: tuple[int, ...]) -> None:
    s, t = torch.empty(shape), torch.empty(shape)
    options = {"labels": torch.empty(shape[:-1], dtype=torch.long)} if function is distillation_loss else {}
    loss, grad = run(function, target, s, t, reduction=reduction, **options)
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    assert (loss == 0).all()
    assert grad.shape == shape


def test_single_class(target: Target) -> None:
    s, t = torch.tensor([[3.0], [-1e30]]), torch.tensor([[-2.0], [5.0]])
    loss, grad = run(distillation_loss, target, s, t, torch.zeros(2, dtype=torch.long), label_smoothing=0.1)
    assert loss == 0
    assert (grad == 0).all()


# -------------------------------------------------------------------------------------------------------- extreme scores


@pytest.mark.parametrize("size", [1e4, 65504.0])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_extreme_scores(target: Target, size: float, dtype: torch.dtype, generator: torch.Generator) -> None:
    signs = torch.randint(0, 2, (2, 4, 1500), generator=generator) * 2 - 1
    s, t = (signs * size).to(dtype)
    loss, grad = run(kl_div, target, s, t, temperature=4.0, reduction="none")
    truth, expected = run(kl_div, Target("reference", "cpu"), s.double(), t.double(), temperature=4.0, reduction="none")
    close(loss, truth, rtol=1e-5)
    close(grad, expected, rtol={F32: 1e-5, F16: 1e-3, BF16: 1e-2}[dtype], atol=1e-6)


def test_log_probabilities_below_float32(target: Target) -> None:
    """Both models below -104 on a class: e^x is 0 in float32, and 0 * (-inf) must not appear."""
    s = torch.tensor([[0.0, -110.0, -300.0, -1e4], [-2e4, 0.0, -105.0, -104.0]])
    t = torch.tensor([[0.0, -1e4, -120.0, -200.0], [-104.0, 0.0, -3e4, -110.0]])
    for options in ({}, {"temperature": 0.5}):
        loss, grad = run(kl_div, target, s, t, reduction="none", **options)
        assert (loss == 0).all()
        assert (grad == 0).all()
    # Where the teacher's mass is there and the student's is not a float, the divergence still is one.
    loss, grad = run(kl_div, target, torch.tensor([[0.0, -500.0]]), torch.tensor([[0.0, 0.0]]), reduction="none")
    close(loss, torch.tensor([250 - math.log(2)]))
    close(grad, torch.tensor([[0.5, -0.5]]))


@pytest.mark.parametrize("shift", [1e3, -3e4, 2.0**20])
def test_a_constant_added_to_a_row_changes_nothing(target: Target, shift: float, generator: torch.Generator) -> None:
    # Multiples of 1/8 below 2^4, so that the sums are exact.
    s, t = (torch.randint(-64, 64, (3, 300), generator=generator) / 8 for _ in range(2))
    rows = torch.tensor([[1.0], [0.0], [-1.0]]) * shift
    labels = torch.randint(0, 300, (3,), generator=generator)
    plain, grad = run(distillation_loss, target, s, t, labels, 2.0, reduction="none")
    moved, moved_grad = run(distillation_loss, target, s + rows, t - rows, labels, 2.0, reduction="none")
    close(moved, plain, rtol=1e-5)
    close(moved_grad, grad, rtol=1e-5)


# -------------------------------------------------------------------------------------------- reductions and their scale


def test_none_with_another_upstream_gradient_in_each_row(target: Target, generator: torch.Generator) -> None:
    s, t = scores((6, 40), generator)
    upstream = torch.tensor([0.0, 1.0, -2.0, 1e-6, 3e4, 0.5], dtype=F64)
    student = s.to(target.device).requires_grad_()
    loss = kl_div(student, t.to(target.device), temperature=3.0, reduction="none", backend=target.backend)
    loss.backward(upstream.to(loss))
    expected = (s.double() / 3).softmax(-1) - (t.double() / 3).softmax(-1)
    for r in range(6):  # each to its own scale
        close(student.grad[r].cpu() / (upstream[r] or 1), 3 * expected[r] * (upstream[r] != 0), rtol=1e-5, atol=1e-6)


def test_three_axes_are_rows(target: Target, generator: torch.Generator) -> None:
    """(B, T, V) with a mask is the same as its rows, flattened and selected."""
    s, t = scores((3, 4, 21), generator)
    labels = torch.randint(0, 21, (3, 4), generator=generator)
    labels[0, 2:] = labels[2, 0] = -100
    kept = labels != -100
    loss, grad = run(distillation_loss, target, s, t, labels, 2.0, 0.6)
    flat, flat_grad = run(distillation_loss, target, s[kept], t[kept], labels[kept], 2.0, 0.6)
    close(loss, flat)
    close(grad[kept], flat_grad)
    assert (grad[~kept] == 0).all()


@pytest.mark.parametrize("ignore_index", [-100, -1, 5])
def test_ignore_index_is_applied(target: Target, ignore_index: int, generator: torch.Generator) -> None:
    s, t = scores((4, 9), generator)
    labels = torch.tensor([0, ignore_index, 3, ignore_index])
    for function in (kl_div, distillation_loss):
        loss, grad = run(function, target, s, t, labels=labels, ignore_index=ignore_index)
        kept, kept_grad = run(function, target, s[::2], t[::2], labels=labels[::2])
        close(loss, kept)
        close(grad[::2], kept_grad)
        assert (grad[1::2] == 0).all()


@pytest.mark.parametrize("scale", [True, False])
def test_the_square_of_the_temperature_is_on_the_gradient_too(
    target: Target, scale: bool, generator: torch.Generator
) -> None:
    s, t = scores((4, 30), generator)
    loss, grad = run(kl_div, target, s, t, temperature=5.0, scale_by_t2=scale)
    student = s.double().requires_grad_()
    plain = F.kl_div((student / 5).log_softmax(-1), (t.double() / 5).softmax(-1), reduction="batchmean") * (
        25 if scale else 1
    )
    plain.backward()
    close(loss, plain.detach())
    close(grad, student.grad, rtol=1e-5)


@pytest.mark.parametrize("function", [kl_div, distillation_loss])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_add_up_to_the_batch(
    target: Target, function: Any, as_tensor: bool, generator: torch.Generator
) -> None:
    """With num_items, whatever the numbers of valid tokens in the micro-batches are."""
    s, t = scores((8, 25), generator)
    labels = torch.randint(0, 25, (8,), generator=generator)
    labels[[0, 1, 2, 5]] = -100
    whole, grad = run(function, target, s, t, labels=labels)
    items = torch.tensor(4) if as_tensor else 4
    parts = [
        run(function, target, s[i : i + 2], t[i : i + 2], labels=labels[i : i + 2], num_items=items)
        for i in (0, 2, 4, 6)
    ]
    close(sum(loss for loss, _ in parts), whole)
    close(torch.cat([g for _, g in parts]), grad, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ the graph used twice


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_retained_graphs(target: Target, dtype: torch.dtype, upstream: float, generator: torch.Generator) -> None:
    """Each backward gives the same gradient, also after somebody wrote into what the one before gave."""
    s, t = (x.to(target.device) for x in scores((3, 40), generator, dtype))
    s.requires_grad_()
    t.requires_grad_()
    loss = kl_div(s, t, temperature=2.0, backend=target.backend)
    factor = torch.full_like(loss, upstream)
    first = torch.autograd.grad(loss, (s, t), factor, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.mul_(7.0)
    second = torch.autograd.grad(loss, (s, t), factor, retain_graph=True)
    for x, y in zip(second, kept, strict=True):
        assert torch.equal(x, y)
    for _ in range(3):
        loss.backward(factor, retain_graph=True)
    close(s.grad.cpu(), 3 * kept[0].double().cpu(), rtol=1e-2 if dtype != F32 else 1e-6, atol=1e-4)
    last = torch.autograd.grad(loss, (s, t), factor)
    for x, y in zip(last, kept, strict=True):
        assert torch.equal(x, y)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_loss_used_twice(target: Target, generator: torch.Generator) -> None:
    s, t = (x.to(target.device) for x in scores((3, 40), generator))
    s.requires_grad_()
    once = kl_div(s, t, backend=target.backend)
    (g,) = torch.autograd.grad(once, s, retain_graph=True)
    (twice,) = torch.autograd.grad(once + 2 * once.square(), s)
    close(twice.cpu(), (g * (1 + 4 * once.detach())).cpu(), rtol=1e-5)


def test_gradients_are_added_to_those_that_are_there(target: Target, generator: torch.Generator) -> None:
    s, t = (x.to(target.device) for x in scores((3, 40), generator))
    s.requires_grad_()
    total = torch.zeros_like(s)
    for temperature in (1.0, 2.0, 3.0):
        kl_div(s, t, temperature=temperature, backend=target.backend).backward()
        total += run(kl_div, target, s.detach(), t, temperature=temperature)[1].to(s)
    close(s.grad.cpu(), total.cpu())


def test_teacher_and_student_may_be_one_tensor(target: Target, generator: torch.Generator) -> None:
    s = scores((3, 40), generator)[0].to(target.device).requires_grad_()
    loss = kl_div(s, s, temperature=2.0, backend=target.backend)
    loss.backward()
    assert abs(float(loss)) < 1e-6
    assert s.grad.abs().max() < 1e-6
    loss = kl_div(s, s.detach(), backend=target.backend)
    assert torch.autograd.grad(loss, s)[0].abs().max() < 1e-7


# ------------------------------------------------------------------------------------------------------------- dtypes


def test_bfloat16_is_not_summed_in_bfloat16(target: Target, generator: torch.Generator) -> None:
    rows = 64 if target.slow else 4096
    s, t = scores((rows, 10), generator, BF16)
    loss, _ = run(kl_div, target, s, t, reduction="sum")
    close(loss, kl_div(s.double(), t.double(), reduction="sum", backend="reference"), rtol=1e-6)
    assert loss.dtype == F32


@pytest.mark.parametrize("dtypes", [(F16, F32), (F32, BF16), (BF16, F16)], ids=str)
def test_student_and_teacher_of_different_dtypes(target: Target, dtypes: Any, generator: torch.Generator) -> None:
    case, shape = CASES["kl_div"], (4, 100)
    if target.fused:
        check(case, cast(case, case.make(shape, generator), dtypes), target, shape, dtypes, unit=True)
    else:
        s, t = scores(shape, generator)
        loss, grad = run(kl_div, target, s.to(dtypes[0]), t.to(dtypes[1]))
        assert (loss.dtype, grad.dtype) == (F32, dtypes[0])


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_autocast(target: Target, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Inside autocast the loss takes what the layers give it, and is float32 as outside."""
    x = torch.randn(6, 8, generator=generator).to(target.device)
    head = torch.nn.Linear(8, 30, device=target.device)
    teacher = torch.randn(6, 30, generator=generator).to(target.device)
    with torch.autocast(target.device, dtype):
        logits = head(x)
        assert logits.dtype == dtype
        loss = kl_div(logits, teacher, temperature=2.0, backend=target.backend)
    assert loss.dtype == F32
    close(loss.cpu(), kl_div(logits.detach().double(), teacher.double(), temperature=2.0, backend="reference").cpu())
    loss.backward()
    assert head.weight.grad.dtype == F32
    assert head.weight.grad.abs().sum() > 0


def test_float16_with_a_gradient_scaler(target: Target, generator: torch.Generator) -> None:
    """Most of this gradient underflows in float16 before it is scaled: it must be scaled first."""
    rows = 64
    s, t = scores((rows, 800), generator, F16)
    student = s.to(target.device).requires_grad_()
    scale = 65536.0
    loss = kl_div(student, t.to(target.device), num_items=rows * 512, backend=target.backend)
    (loss * scale).backward()
    expected = ((s.double()).softmax(-1) - t.double().softmax(-1)) * (scale / (rows * 512))
    plain = (expected / scale).half()
    assert (plain == 0).double().mean() > 0.3, "this input does not show what it should"
    error = (student.grad.cpu().double() - expected).abs()
    assert (error <= 2.0**-11 * expected.abs() + 2.0**-25 + 2.0**-22 * expected.abs().max()).all()


def test_torch_grad_scaler_steps(target: Target, generator: torch.Generator) -> None:
    weight = torch.zeros(20, 50, requires_grad=True, device=target.device)
    x, teacher = torch.randn(4, 20, generator=generator), torch.randn(4, 50, generator=generator)
    x, teacher = x.to(target.device), teacher.to(target.device)
    scaler = torch.amp.GradScaler(target.device, init_scale=65536.0)
    optimiser = torch.optim.SGD([weight], lr=1.0)
    loss = kl_div((x @ weight).half(), teacher, backend=target.backend)
    scaler.scale(loss).backward()
    scaler.step(optimiser)
    scaler.update()
    assert scaler.get_scale() == 65536.0
    expected = -x.double().t() @ (1 / 50 - teacher.double().softmax(-1)) / 4
    close(weight.detach().cpu(), expected.cpu(), rtol=2e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------- order and determinism


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().cpu().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("shape", [(64, 300), (7, 9000), (300, 3)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_threads_do_not_change_a_bit(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    s, t = scores(shape, generator, dtype)
    labels = torch.randint(0, shape[1], shape[:1], generator=generator)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            student, teacher = s.clone().requires_grad_(), t.clone().requires_grad_()
            temperature = torch.tensor(2.0, requires_grad=True)
            loss = distillation_loss(student, teacher, labels, 2.0, label_smoothing=0.1, backend="cpu")
            loss.backward()
            learned = kl_div(student, teacher, temperature=temperature, backend="cpu")
            learned.backward()
            found.append([bits(x) for x in (loss, learned, student.grad, teacher.grad, temperature.grad)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("classes", [70, 72])
def test_rows_do_not_depend_on_their_order(fused: Target, classes: int, generator: torch.Generator) -> None:
    rows = 12
    s, t = scores((rows, classes), generator)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    order = torch.randperm(rows, generator=generator)
    loss, grad = run(distillation_loss, fused, s, t, labels, reduction="none")
    again, again_grad = run(distillation_loss, fused, s[order], t[order], labels[order], reduction="none")
    if classes * s.element_size() % 16 and "cuda" in fused.backend:
        # CUDA C++ cuts a row at 16-byte boundaries, which lie elsewhere in the next row.
        # Both are differences of terms of the order of one: a few roundings of those.
        close(again, loss[order], rtol=1e-6, atol=5e-7)
        close(again_grad, grad[order], rtol=1e-6, atol=5e-7)
        return
    assert torch.equal(bits(again), bits(loss[order]))
    assert torch.equal(bits(again_grad), bits(grad[order]))


def test_two_runs_agree_to_the_bit(fused: Target, generator: torch.Generator) -> None:
    s, t = scores((5, 1300), generator, BF16)
    labels = torch.randint(0, 1300, (5,), generator=generator)
    one, two = (run(distillation_loss, fused, s, t, labels) for _ in range(2))
    assert torch.equal(bits(one[0]), bits(two[0]))
    assert torch.equal(bits(one[1]), bits(two[1]))


# ---------------------------------------------------------------------------------------------------------- huge offsets


def far_apart(rows: torch.Tensor, distance: int, axis: int) -> torch.Tensor:
    """Two rows of scores whose rows (axis 0) or classes (axis 1) lie `distance` elements apart. Only the pages that
    are touched take memory."""
    n, classes = rows.shape
    stride = (distance, 1) if axis == 0 else (1, distance)
    need = 1 + (n - 1) * stride[0] + (classes - 1) * stride[1]
    far = torch.empty(need, dtype=rows.dtype).as_strided((n, classes), stride)
    return far.copy_(rows)


@pytest.mark.backends(
    "cpu", "triton", "reference"
)  # cuda_on_cpu copies what lies between: test_cuda_on_cpu.py's business
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "classes"])
def test_offsets_past_two_to_the_31(target: Target, axis: int, generator: torch.Generator) -> None:
    """A stride that 32 bits cannot hold. The memory is reserved, not used: only a few pages of it are touched."""
    if target.device != "cpu":
        pytest.skip("a GPU has no memory that is only reserved")
    s, t = scores((2, 4) if axis == 0 else (3, 2), generator, BF16)
    # With memory that is NaN to begin with every page would be touched.
    torch.utils.deterministic.fill_uninitialized_memory = False
    distance = 2**31 + 64
    try:
        far = far_apart(s, distance, axis)
    except RuntimeError as error:
        pytest.skip(f"cannot reserve {distance * 2 / 2**30:.1f} GiB: {error}")
    # In float16 and for a student without a gradient nothing of that size is written.
    loss = kl_div(far, t, temperature=2.0, reduction="none", backend=target.backend)
    close(
        loss,
        kl_div(s.double(), t.double(), temperature=2.0, reduction="none", backend="reference"),
        rtol=1e-5,
        atol=1e-6,
    )
    teacher = t.clone().requires_grad_()
    kl_div(far, teacher, temperature=2.0, backend=target.backend).backward()
    expected = t.double().requires_grad_()
    kl_div(s.double(), expected, temperature=2.0, backend="reference").backward()
    close(teacher.grad, expected.grad, rtol=1e-2, atol=1e-4)


@pytest.mark.backends("cpu")
def test_gradients_past_two_to_the_31(fused: Target, generator: torch.Generator) -> None:
    """The kernel writes a gradient there too: the native entry is called with far apart rows."""
    from kdkernels import backends
    from kdkernels.native import View

    s, t = scores((2, 48), generator)
    torch.utils.deterministic.fill_uninitialized_memory = False
    distance = 2**31 + 16
    try:
        ds = far_apart(torch.zeros(2, 48), distance, 0)
    except RuntimeError as error:
        pytest.skip(f"cannot reserve {distance * 4 / 2**30:.1f} GiB: {error}")
    scalars = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0])
    losses, total, stats = torch.empty(2), torch.empty(1), torch.empty(2, 8)
    near = View(s, (2, 48, 1), (48, 1, 1)), View(t, (2, 48, 1), (48, 1, 1))
    backends.library("cpu").call(
        "row_divergence_forward", *near, None, None, None, scalars, None, losses, total, stats,
        View(ds, (2, 48, 1), (distance, 1, 1)), None, 0, 0, 0, 0, -100, 1,
    )  # fmt: skip
    close(ds, s.double().softmax(-1) - t.double().softmax(-1), rtol=1e-5)
