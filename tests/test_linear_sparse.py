"""The sparse teacher's loss from hidden states: what topk_div makes of the whole logits, in a chunk's memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sweep import BF16, F32
from targets import TARGETS, Target
from test_linear import Largest, close
from test_sparse import VARIANTS
from torch._dynamo.testing import CompileCounterWithBackend

from kdkernels import LinearTopKDivLoss, linear_topk_div, topk_div
from kdkernels.bench.memory import peak_bytes
from kdkernels.ops.linear_divergence import gemm
from kdkernels.ops.row_divergence.kinds import Kind

N, V, H, K = 7, 23, 4, 5


def make(
    generator: torch.Generator, device: str = "cpu", missing: str = "tail"
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Hidden states, head and teacher's values, which all require grad, and indices in no order; options."""
    shapes = (N, H), (V, H)
    hidden, head = (torch.randn(s, generator=generator).to(device).requires_grad_() for s in shapes)
    teacher = torch.randn(N, V, generator=generator)
    options = {"missing": missing}
    if not missing.startswith("renormalize"):
        teacher, options = teacher.log_softmax(-1), {**options, "teacher_values_are": "log_probs"}
    at = torch.rand(N, V, generator=generator).argsort(-1)[:, :K]
    values = teacher.gather(1, at).to(device).requires_grad_()
    at[1, 2] = -1
    return [hidden, head, values, at.to(device)], options


# What differs between the variants is no kernel's: the interpreter and the emulator get two.
EACH = [(t, *v) for t in TARGETS for v in (VARIANTS if not t.slow else (("tail", "js"), ("uniform", "forward_kl")))]


@pytest.mark.parametrize("target, missing, divergence", EACH, ids=str)
@pytest.mark.parametrize("reduction", ["rowmean", "none"])
def test_the_same_as_from_logits(
    target: Target, missing: str, divergence: str, reduction: str, generator: torch.Generator
) -> None:
    x, options = make(generator, target.device, missing)
    labels = torch.randint(0, V, (N,), generator=generator).to(target.device)
    labels[2] = -100
    weight = torch.rand(N, generator=generator).to(target.device)
    weight[4] = 0
    options |= {
        "divergence": divergence,
        "reduction": reduction,
        "labels": labels,
        "weight": weight,
        "temperature": 1.5,
    }
    bias = torch.randn(V, generator=generator).to(target.device).requires_grad_()
    scores = 3 * torch.tanh(0.7 * (F.linear(x[0], x[1]) + bias) / 3)
    expected = topk_div(scores, *x[2:], **options, backend="reference")
    upstream = torch.rand(expected.shape, generator=generator).to(target.device)
    inputs = (*x[:3], bias)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for compact in (False, True):
        loss = linear_topk_div(
            *x, student_bias=bias, student_softcap=3.0, student_logit_scale=0.7, **options, compact=compact,
            chunk_bytes=3 * 8 * V, backend=target.backend,
        )  # fmt: skip
        close(loss, expected)
        close(torch.autograd.grad(loss, inputs, upstream), wanted)


def test_shapes_padding_and_divisors(target: Target, generator: torch.Generator) -> None:
    """(B, T, H), a head padded beyond the vocabulary, an entry that occurs twice, divisors from outside."""
    x, options = make(generator, target.device)
    at = x[3].clone()
    at[0, 0] = at[0, 1]
    padded = F.pad(x[1].detach(), (0, 0, 0, 3), value=9.0).requires_grad_()
    rows = [v.view(1, N, -1) for v in (x[0], x[2], at)]
    for more in (
        {"num_items": torch.tensor(3.0)},
        {"reduction": "mean"},
        {"reduction": "batchmean", "scale_by_t2": False},
    ):
        expected = topk_div(F.linear(rows[0], x[1]), *rows[1:], **options, **more, backend="reference")
        loss = linear_topk_div(rows[0], padded, *rows[1:], vocab_size=V, **options, **more, backend=target.backend)
        close(loss, expected)
        got, wanted = torch.autograd.grad(loss, (x[0], padded)), torch.autograd.grad(expected, x[:2])
        close((got[0], got[1][:V]), wanted)
        assert not got[1][V:].any()


def test_nothing_counts(target: Target, generator: torch.Generator) -> None:
    """All tokens ignored, no tokens at all, and no tokens on any rank: 0 with zero gradients."""
    x, options = make(generator, target.device)
    empty = [x[0][:0], x[1], x[2][:0], x[3][:0]]
    ignored = torch.full((N,), -100, device=target.device)
    nowhere = {"num_items": torch.zeros(1, device=target.device)}
    for inputs, more in (
        (x, {"labels": ignored}),
        (x, {"labels": ignored, "compact": True}),
        (empty, {}),
        (x, nowhere),
    ):
        loss = linear_topk_div(*inputs, **options, **more, backend=target.backend)
        assert loss == 0
        assert all(not g.any() for g in torch.autograd.grad(loss, x[:3]))


def test_a_bad_index_or_label_makes_its_row_nan(fused: Target, generator: torch.Generator, monkeypatch: Any) -> None:
    """Where values cannot be looked at beforehand: nothing is read out of bounds, and the other rows are right."""
    monkeypatch.setattr("kdkernels.checks._may_read", lambda x: False)
    x, options = make(generator, fused.device)
    labels = torch.zeros(N, dtype=torch.int64, device=fused.device)
    options["reduction"] = "none"
    expected = linear_topk_div(*x, **options, backend=fused.backend)
    x[3][3, 1], labels[5] = V, V
    loss = linear_topk_div(*x, labels=labels, **options, backend=fused.backend)
    bad = torch.tensor([i in (3, 5) for i in range(N)], device=fused.device)
    assert loss[bad].isnan().all()
    assert torch.equal(loss[~bad], expected[~bad])
    gradient = torch.autograd.grad(loss, x[0], torch.ones_like(loss))[0]
    assert torch.equal(gradient.isnan().all(1), bad)
    assert torch.equal(gradient.isnan().any(1), bad)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_memory_does_not_grow_with_the_tokens(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Two tensors of a chunk's logits and the weight's gradient in float32, while N grows 16 times."""
    classes, width, budget = 4096, 16, 2 * 4 * 4096 * 32
    head = torch.randn(classes, width, generator=generator, dtype=dtype).requires_grad_()
    extra = []
    for n in (64, 1024):
        hidden = torch.randn(n, width, generator=generator, dtype=dtype).requires_grad_()
        values, at = torch.randn(n, 8, generator=generator), torch.arange(n * 8).view(n, 8) % classes

        def step(hidden: torch.Tensor = hidden, values: torch.Tensor = values, at: torch.Tensor = at) -> Any:
            loss = linear_topk_div(hidden, head, values, at, chunk_bytes=budget, backend="cpu")
            return torch.autograd.grad(loss, (hidden, head))

        step()
        peak = peak_bytes(step, torch.device("cpu"))
        if peak is None:
            pytest.skip("this torch does not report its allocations; see kdkernels/bench/memory.py")
        extra.append(peak - hidden.nbytes - head.nbytes)
        with Largest() as seen:
            step()
        assert seen.numel <= max(32 * classes, classes * width), "a tensor larger than a chunk was made"
    wide_weight = 4 * head.numel() * (1 if dtype == F32 else 3)
    # A token's indices and the teacher's entries, and what sorting them takes.
    assert extra[0] <= budget + wide_weight + 64 * 1024
    assert extra[1] <= budget + wide_weight + 64 * 1024 + 1024 * 8 * 64


def test_frozen_parts_cost_no_product(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    called: list[str] = []
    for name in ("scores", "by_hidden", "by_weight"):
        real = getattr(gemm.Products, name)
        monkeypatch.setattr(gemm.Products, name, lambda *a, real=real, name=name: (called.append(name), real(*a)))
    x, options = make(generator)
    for wanted, expected in (((0,), ["by_hidden"]), ((1,), ["by_weight"]), ((2,), []), ((), [])):
        called.clear()
        args = [v.detach().requires_grad_(i in wanted) if i < 3 else v for i, v in enumerate(x)]
        loss = linear_topk_div(*args, **options, backend="cpu")
        if wanted:
            torch.autograd.grad(loss, [args[i] for i in wanted])
        assert called == ["scores", *expected]


def test_float16_gradients_do_not_underflow(target: Target, generator: torch.Generator) -> None:
    x, options = make(generator, target.device)
    half = [v.detach().half().requires_grad_() for v in x[:2]]
    loss = linear_topk_div(*half, *x[2:], **options, num_items=1e8, backend=target.backend)
    got = torch.autograd.grad(loss, half, torch.full_like(loss, 65536.0))
    wide = [v.detach().double().requires_grad_() for v in half]
    wanted = torch.autograd.grad(65536 * linear_topk_div(*wide, *x[2:], **options, num_items=1e8), wide)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=2**-10, atol=1e-7)


@pytest.mark.parametrize("reduction", ["rowmean", "none"])
def test_compiles_without_breaks_and_once(reduction: str, generator: torch.Generator) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    x, options = make(generator)
    call = partial(linear_topk_div, *x, **options, reduction=reduction, backend="cpu")

    @torch.compile(backend=counter, fullgraph=True)
    def step(temperature: float, softcap: float) -> torch.Tensor:
        return call(temperature=temperature, student_softcap=softcap).sum()

    for temperature in (1.0, 1.5, 2.0, 2.5):
        loss = step(temperature, 3 * temperature)
        plain = call(temperature=temperature, student_softcap=3 * temperature).sum()
        close(loss, plain)
        close(torch.autograd.grad(loss, x[:3]), torch.autograd.grad(plain, x[:3]))
    assert counter.frame_count <= 2  # the second sees that the numbers change
    torch._dynamo.reset()


def test_opcheck(fused: Target, generator: torch.Generator) -> None:
    hidden, head, values, at = (v.detach() for v in make(generator, fused.device)[0])
    at, order = at.sort(-1)
    arguments = (
        hidden.half(), head.half(), None, values.gather(1, order).double(), at, torch.ones_like(values[:, 0]).double(),
        torch.tensor([2.0]), torch.zeros(2), "none", int(Kind.REVERSE_KL), None, 0, 300, [True, True, False, True],
        fused.backend,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.kdkernels.linear_sparse.default, arguments)


def test_module_and_second_derivative(fused: Target, generator: torch.Generator) -> None:
    x, options = make(generator, fused.device)
    loss = LinearTopKDivLoss(**options, backend=fused.backend)(*x)
    assert torch.equal(loss, linear_topk_div(*x, **options, backend=fused.backend))
    (gradient,) = torch.autograd.grad(loss, x[0], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_topk_div have no second derivative"):
        gradient.sum().backward()


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "k beyond the vocabulary": (
        {"teacher_values": torch.zeros(N, V + 1), "teacher_indices": torch.zeros(N, V + 1).long()}, ValueError,
        f"between 1 and {V} entries a row .*, got {V + 1}",
    ),
    "index": ({"teacher_indices": torch.full((N, K), V)}, IndexError, f"teacher_indices must be from 0 to {V - 1}, or -1; got {V}"),
    "index of the padding": (
        {"vocab_size": V - 3, "teacher_indices": torch.full((N, K), V - 3)}, IndexError, f"from 0 to {V - 4}, or -1"
    ),
    "tokens": (
        {"student_hidden": torch.zeros(N + 1, H)}, ValueError, r"same rows: student_hidden has shape \(8, 4\) and teacher_val"
    ),
    "head": ({"student_weight": torch.zeros(V, H + 1)}, ValueError, "one column a feature of student_hidden"),
    "chunk": ({"chunk_bytes": 8 * V - 1}, ValueError, f"chunk_bytes must be at least {8 * V}, the logits of one row"),
    "exclusion": ({"missing": "tail"}, ValueError, "needs the teacher's mass"),
    "temperature": ({"temperature": torch.ones((), requires_grad=True)}, ValueError, "temperature gets no gradient"),
    "labels": ({"labels": torch.full((N,), V)}, IndexError, f"labels hold {V}"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changed, error, words = BAD[name]
    made = {
        "student_hidden": torch.zeros(N, H), "student_weight": torch.zeros(V, H), "teacher_values": torch.zeros(N, K),
        "teacher_indices": torch.zeros(N, K).long(),
    }  # fmt: skip
    with pytest.raises(error, match=words):
        linear_topk_div(**{**made, **changed})
