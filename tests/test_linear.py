"""Losses from hidden states and heads: the same as from whole logits, in a chunk's memory, however they are called."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sweep import BF16, F16, F32, F64
from targets import Target
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels
from kdkernels import distillation_loss, kl_div, linear_distillation_loss, linear_js_div, linear_kl_div
from kdkernels.bench.memory import peak_bytes
from kdkernels.ops.linear_divergence import gemm
from kdkernels.ops.linear_divergence.heads import chunk_rows

PAIRS = (
    ("linear_kl_div", "kl_div", {}),
    ("linear_reverse_kl_div", "reverse_kl_div", {"temperature": 2.0}),
    ("linear_js_div", "js_div", {"reduction": "sum"}),
    ("linear_generalized_js_div", "generalized_js_div", {"beta": 0.2, "reduction": "mean", "scale_by_t2": False}),
)


def make(
    generator: torch.Generator, tokens: tuple[int, ...] = (7,), classes: int = 11, device: str = "cpu",
    dtype: torch.dtype = F32,
) -> list[torch.Tensor]:  # fmt: skip
    """Student hidden and head, teacher hidden and head; the first two require grad."""
    shapes = ((*tokens, 4), (classes, 4), (*tokens, 6), (classes, 6))
    made = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    return [x.requires_grad_() if i < 2 else x for i, x in enumerate(made)]


def logits(x: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return F.linear(x[0], x[1]), F.linear(x[2], x[3])


def close(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("linear, whole, options", PAIRS, ids=[p[0] for p in PAIRS])
@pytest.mark.parametrize("tokens", [(7,), (2, 3), ()], ids=str)
def test_the_same_as_from_logits(
    target: Target, linear: str, whole: str, options: Any, tokens: Any, generator: torch.Generator
) -> None:
    x = make(generator, tokens, device=target.device)
    loss = getattr(kdkernels, linear)(*x, **options, chunk_bytes=400, backend=target.backend)
    expected = getattr(kdkernels, whole)(*logits(x), **options, backend="reference")
    close(loss, expected)
    close(torch.autograd.grad(loss, x[:2]), torch.autograd.grad(expected, x[:2]))


def test_published_heads(target: Target, generator: torch.Generator) -> None:
    """Gemma 2 caps its logits, Cohere scales them, others have biases: in plain PyTorch, in float64."""
    x = [t.detach().double() for t in make(generator)]
    bias = [torch.randn(11, generator=generator) for _ in range(2)]
    labels = torch.randint(0, 11, (7,), generator=generator)
    wide = [t.clone().requires_grad_() for t in x]
    s = 3.0 * torch.tanh(0.5 * (wide[0] @ wide[1].T + bias[0]) / 3.0)
    t = 0.25 * (wide[2] @ wide[3].T + bias[1])
    soft = F.kl_div(F.log_softmax(s / 2, -1), F.softmax(t / 2, -1), reduction="batchmean")
    expected = 0.3 * F.cross_entropy(s, labels) + 0.7 * 4 * soft
    narrow = [t.float().to(target.device).requires_grad_() for t in x]
    loss = linear_distillation_loss(
        *narrow, labels.to(target.device), 2.0, 0.7, student_bias=bias[0].to(target.device),
        teacher_bias=bias[1].to(target.device), student_softcap=3.0, student_logit_scale=0.5, teacher_logit_scale=0.25,
        backend=target.backend,
    )  # fmt: skip
    close(loss.double().cpu(), expected)
    for got, wanted in zip(torch.autograd.grad(loss, narrow), torch.autograd.grad(expected, wide), strict=True):
        close(got.double().cpu(), wanted)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("reduction", ["rowmean", "batchmean", "mean", "none"])
def test_masks_are_those_of_the_whole_batch(
    target: Target, compact: bool, reduction: str, generator: torch.Generator
) -> None:
    """Every chunk divides by what all tokens count."""
    x = make(generator, (2, 5), device=target.device)
    labels = torch.randint(0, 11, (2, 5), generator=generator).to(target.device)
    labels[0, :4] = -100
    cw = torch.rand(11, generator=generator).to(target.device)
    options = {"reduction": reduction, "class_weight": cw}
    loss = linear_distillation_loss(*x, labels, compact=compact, chunk_bytes=200, **options, backend=target.backend)
    expected = distillation_loss(*logits(x), labels, **options, backend="reference")
    close(loss, expected)
    upstream = torch.rand(loss.shape, generator=generator).to(target.device)
    close(torch.autograd.grad(loss, x[:2], upstream), torch.autograd.grad(expected, x[:2], upstream))


@pytest.mark.parametrize("compact", [False, True])
def test_all_tokens_ignored(target: Target, compact: bool, generator: torch.Generator) -> None:
    x = make(generator, device=target.device)
    labels = torch.full((7,), -100, device=target.device)
    loss = linear_distillation_loss(*x, labels, compact=compact, backend=target.backend)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, x[:2]))


def test_empty_batch(target: Target, generator: torch.Generator) -> None:
    x = make(generator, (0,), device=target.device)
    loss = linear_js_div(*x, backend=target.backend)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, x[:2]))


def test_padded_vocabularies(target: Target, generator: torch.Generator) -> None:
    """What is behind the vocabulary has no mass, whatever its logits, and no gradient."""
    x = make(generator, device=target.device)
    with torch.no_grad():
        x[1][9:] = 100
        x[3] = torch.cat([x[3][:9], torch.full((5, 6), 1e4, device=target.device)])
    loss = linear_kl_div(*x, vocab_size=9, backend=target.backend)
    cut = [x[0], x[1][:9], x[2], x[3][:9]]
    close(loss, kl_div(*logits(cut), backend="reference"))
    gradient = torch.autograd.grad(loss, x[1])[0]
    assert (gradient[9:] == 0).all()
    assert gradient[:9].any()


# ------------------------------------------------------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("reduction", ["rowmean", "none"])
def test_memory_does_not_grow_with_the_tokens(reduction: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Two tensors of a chunk's logits and the weight's gradient in float32, while N grows 16 times."""
    classes, width, budget = 4096, 16, 2 * 4 * 4096 * 32
    head, teacher = (torch.randn(classes, width, generator=generator, dtype=dtype) for _ in range(2))
    head.requires_grad_()

    def step(student_hidden: torch.Tensor, teacher_hidden: torch.Tensor) -> Any:
        loss = linear_js_div(
            student_hidden, head, teacher_hidden, teacher, reduction=reduction, chunk_bytes=budget, backend="cpu"
        )
        return torch.autograd.grad(loss.sum(), (student_hidden, head))

    extra = []
    for n in (64, 1024):
        x = [torch.randn(n, width, generator=generator, dtype=dtype) for _ in range(2)]
        call = partial(step, x[0].requires_grad_(), x[1])
        call()
        peak = peak_bytes(call, torch.device("cpu"))
        if peak is None:
            pytest.skip("this torch does not report its allocations; see kdkernels/bench/memory.py")
        extra.append(peak - x[0].nbytes - head.nbytes)
        with Largest() as seen:
            call()
        assert seen.numel <= max(32 * classes, classes * width), "a tensor larger than a chunk was made"
    wide_weight = 4 * (head.numel() + (0 if dtype == F32 else 2 * gemm.SLAB["cpu"] * width))
    # And chunk-sized copies of hidden states, and a few floats a token.
    assert extra[0] <= budget + wide_weight + 64 * 1024
    assert extra[1] <= budget + wide_weight + 64 * 1024 + 16 * 1024


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_slabs_of_classes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Eleven classes in slabs of four are the eleven at once."""
    x = make(generator, dtype=dtype)

    def step() -> Any:
        loss = linear_js_div(*x, backend="cpu")
        return loss, *torch.autograd.grad(loss, x[:2])

    expected = step()
    monkeypatch.setitem(gemm.SLAB, "cpu", 4)
    torch.testing.assert_close(step(), expected, rtol=1e-5 if dtype == F32 else 2**-7, atol=1e-7)


def test_frozen_parts_cost_no_product(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    called: list[str] = []
    for name in ("by_hidden", "by_weight"):
        real = getattr(gemm.Products, name)
        monkeypatch.setattr(gemm.Products, name, lambda *a, real=real, name=name: (called.append(name), real(*a)))
    x = make(generator)
    for wanted, expected in (
        ((), []),
        ((0,), ["by_hidden"]),
        ((1,), ["by_weight"]),
        ((0, 1), ["by_hidden", "by_weight"]),
    ):
        called.clear()
        args = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(x)]
        loss = linear_kl_div(*args, backend="cpu")
        if wanted:
            torch.autograd.grad(loss, [args[i] for i in wanted])
        assert called == expected
    with torch.no_grad():
        called.clear()
        linear_kl_div(*x, backend="cpu")
        assert called == []


@pytest.mark.parametrize("rows", [0, 1, 5, 63, 64, 1000])
@pytest.mark.parametrize("chunk_bytes", [0, 80, 4000, 10**6])
def test_chunks_fit_their_budget(rows: int, chunk_bytes: int) -> None:
    step = chunk_rows(rows, 10, 16, chunk_bytes, 2, "cpu")
    assert 1 <= step <= max(rows, 1)
    if chunk_bytes:
        assert step * 2 * 10 * 4 <= chunk_bytes
    if 8 < step < rows:
        assert step % 8 == 0


# ------------------------------------------------------------------------------------------------- training loops' ways


def test_micro_batches_with_num_items(target: Target, generator: torch.Generator) -> None:
    x = make(generator, (8,), device=target.device)
    labels = torch.randint(0, 11, (8,), generator=generator).to(target.device)
    labels[:3] = -100
    whole = torch.autograd.grad(linear_distillation_loss(*x, labels, backend=target.backend), x[:2])
    for part in (slice(0, 4), slice(4, 8)):
        linear_distillation_loss(
            x[0][part], x[1], x[2][part], x[3], labels[part], num_items=torch.tensor(5), backend=target.backend
        ).backward()
    close((x[0].grad, x[1].grad), whole)


def test_tied_weights_and_a_retained_graph(generator: torch.Generator) -> None:
    """The head is also the embedding, and both models may share it."""
    table = torch.randn(11, 4, generator=generator).requires_grad_()
    tokens = torch.randint(0, 11, (7,), generator=generator)

    def gradients(backend: str) -> list[torch.Tensor]:
        hidden = torch.tanh(F.embedding(tokens, table))
        loss = linear_kl_div(hidden, table, hidden.flip(0), table, backend=backend) * 3
        return [torch.autograd.grad(loss, table, retain_graph=i < 2)[0] for i in range(3)]

    first, *again = gradients("cpu")
    close(first, gradients("reference")[0])
    assert all(torch.equal(first, g) for g in again)


def test_inside_activation_checkpointing(generator: torch.Generator) -> None:
    x = make(generator)
    plain = torch.autograd.grad(linear_kl_div(torch.tanh(x[0]), *x[1:]), x[:2])
    loss = torch.utils.checkpoint.checkpoint(
        lambda a, b: linear_kl_div(torch.tanh(a), b, *x[2:]), x[0], x[1], use_reentrant=False
    )
    for got, wanted in zip(torch.autograd.grad(loss, x[:2]), plain, strict=True):
        assert torch.equal(got, wanted)


def test_float16_gradients_do_not_underflow(target: Target, generator: torch.Generator) -> None:
    """With a GradScaler's factor they are those of float64, though without it most would be 0."""
    x = make(generator, device=target.device, dtype=F16)
    loss = linear_kl_div(*x, num_items=1e8, backend=target.backend)
    got = torch.autograd.grad(loss, x[:2], torch.full_like(loss, 65536.0))
    wide = [t.detach().double().requires_grad_(i < 2) for i, t in enumerate(x)]
    wanted = torch.autograd.grad(65536 * linear_kl_div(*wide, num_items=1e8), wide[:2])
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=2**-10, atol=1e-7)
    unscaled = torch.autograd.grad(linear_kl_div(*x, num_items=1e8, backend=target.backend), x[0])[0]
    assert unscaled.abs().max() <= 2**-23


def test_fitted_factors_keep_small_gradients() -> None:
    for size in (1e-9, 1e-3, 1e5):
        g = size * torch.tensor([[1.0, -0.01], [1e-5, 0.3]])
        narrow, back = gemm.fitted(g)
        torch.testing.assert_close(narrow.float() * back, g, rtol=2**-10, atol=size * 2**-38)
    narrow, back = gemm.fitted(torch.zeros(2, 2))
    assert not narrow.any() and back.isfinite()


def test_under_autocast_as_linear(generator: torch.Generator) -> None:
    x = make(generator)
    with torch.autocast("cpu", BF16):
        loss = linear_kl_div(*x, backend="cpu")
        rounded = [t.to(BF16) for t in x]
        expected = linear_kl_div(*rounded, backend="cpu")
    assert torch.equal(loss, expected)
    gradients = torch.autograd.grad(loss, x[:2])
    assert all(g.dtype == F32 and g.any() for g in gradients)


def test_second_derivatives_are_refused(generator: torch.Generator) -> None:
    x = make(generator)
    (gradient,) = torch.autograd.grad(linear_kl_div(*x, backend="cpu"), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("reduction", ["rowmean", "none"])
def test_compiles_without_breaks_and_once(reduction: str, generator: torch.Generator) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    x = make(generator)

    @torch.compile(backend=counter, fullgraph=True)
    def step(temperature: float, softcap: float) -> torch.Tensor:
        return linear_js_div(
            *x, temperature=temperature, student_softcap=softcap, reduction=reduction, backend="cpu"
        ).sum()

    for temperature in (1.0, 1.5, 2.0, 2.5):
        loss = step(temperature, 3 * temperature)
        plain = linear_js_div(
            *x, temperature=temperature, student_softcap=3 * temperature, reduction=reduction, backend="cpu"
        ).sum()
        close(loss, plain)
        close(torch.autograd.grad(loss, x[:2]), torch.autograd.grad(plain, x[:2]))
    assert counter.frame_count <= 2  # the second sees that the numbers change
    torch._dynamo.reset()


@pytest.mark.parametrize("wants", [(True, True, False, False), (False,) * 4], ids=str)
def test_opcheck(fused: Target, wants: tuple[bool, ...], generator: torch.Generator) -> None:
    x = [t.detach() for t in make(generator, device=fused.device, dtype=F16)]
    labels = torch.randint(0, 11, (7,), generator=generator).to(fused.device)
    arguments = (
        *x[:2], None, None, *x[2:], None, None, labels, None, None, torch.tensor([2.0, 2, 1, 1, 0, 0, 0, 0]),
        torch.zeros(4), None, 0, True, 0, -100, 300, [*wants, *(False,) * 4], fused.backend,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.kdkernels.linear_divergence.default, arguments)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js", "alpha_beta"])
def test_gradients_in_the_teachers_place(fused: Target, divergence: str, generator: torch.Generator) -> None:
    """Rows of several tiles and blocks: no logit is overwritten before it was read for the last time."""
    classes = 2100 if fused.slow else 40000
    x = make(generator, (2,), classes, fused.device)
    labels = torch.randint(0, classes, (2,), generator=generator).to(fused.device)
    loss = linear_distillation_loss(*x, labels, 1.5, divergence=divergence, backend=fused.backend)
    expected = distillation_loss(*logits(x), labels, 1.5, divergence=divergence, backend="reference")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for got, wanted in zip(torch.autograd.grad(loss, x[:2]), torch.autograd.grad(expected, x[:2]), strict=True):
        assert float((got - wanted).norm()) <= 1e-4 * float(wanted.norm())


@pytest.mark.parametrize("shift", [True, False])
def test_sequence_level(target: Target, shift: bool, generator: torch.Generator) -> None:
    """As trainers write it: shifted logits, prompts and padding ignored, each sequence with its own weight."""
    x, head = make(generator, (3, 5), device=target.device)[:2]
    tokens = torch.randint(0, 11, (3, 5), generator=generator).to(target.device)
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]], device=target.device).bool()
    weight = torch.tensor([0.5, 2.0, 3.0], device=target.device)
    scores = F.linear(x, head)
    used, wanted, kept = (scores[:, :-1], tokens[:, 1:], mask[:, 1:]) if shift else (scores, tokens, mask)
    each = F.cross_entropy(used.mT, wanted, reduction="none")
    w = kept * weight[:, None]
    expected = (each * w).sum() / w.sum()
    options = {"sequence_weight": weight, "shift": shift, "backend": target.backend}
    gradients = torch.autograd.grad(expected, (x, head), retain_graph=True)
    for loss in (
        kdkernels.sequence_loss(scores, tokens, mask, **options),
        kdkernels.linear_sequence_loss(x, head, tokens, mask, **options),
        kdkernels.linear_sequence_loss(x, head, tokens, mask, **options, compact=True, chunk_bytes=100),
    ):
        close(loss, expected)
        close(torch.autograd.grad(loss, (x, head), retain_graph=True), gradients)
    each = F.cross_entropy(used.mT, wanted, reduction="none", label_smoothing=0.2)
    smooth = {**options, "label_smoothing": 0.2}
    close(kdkernels.sequence_loss(scores, tokens, mask, **smooth), (each * w).sum() / w.sum())
    close(kdkernels.linear_sequence_loss(x, head, tokens, mask, **smooth), (each * w).sum() / w.sum())
    nothing = kdkernels.sequence_loss(scores, tokens, mask & False, **options)
    assert nothing == 0 and not torch.autograd.grad(nothing, x)[0].any()


# --------------------------------------------------------------------------------------------------------------- errors

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "hidden against head": (
        {"student_weight": torch.zeros(11, 5)}, ValueError, r"student_weight must have one column a feature of student_hidden"
    ),
    "tokens differ": ({"teacher_hidden": torch.zeros(6, 6)}, ValueError, r"same tokens: .*\(7, 4\) and .*\(6, 6\)"),
    "vocabularies differ": (
        {"teacher_weight": torch.zeros(12, 6)}, ValueError, r"11 classes and teacher_weight 12: .*vocab_size"
    ),
    "no such vocabulary": ({"vocab_size": 12}, ValueError, r"between 1 and the 11 rows of student_weight, got 12"),
    "bias": ({"student_bias": torch.zeros(4)}, ValueError, r"student_bias must have one value a class, shape \(11,\)"),
    "softcap": ({"student_softcap": 0.0}, ValueError, r"student_softcap must be"),
    "integer hidden": ({"student_hidden": torch.zeros(7, 4, dtype=torch.int64)}, TypeError, r"student_hidden must be float"),
    "head of one axis": ({"teacher_weight": torch.zeros(6)}, ValueError, r"teacher_weight must have shape \(V, H\)"),
    "chunk": ({"chunk_bytes": 87}, ValueError, r"chunk_bytes must be at least 88, the logits of one row here, got 87"),
    "labels": ({"labels": torch.full((7,), 11)}, IndexError, r"labels hold 11, outside 0 to 10"),
    "temperature": ({"temperature": torch.ones((), requires_grad=True)}, ValueError, r"temperature gets no gradient"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changed, error, words = BAD[name]
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    made = dict(zip(names, (torch.zeros(7, 4), torch.zeros(11, 4), torch.zeros(7, 6), torch.zeros(11, 6)), strict=True))
    with pytest.raises(error, match=words):
        linear_kl_div(**{**made, **changed})


@pytest.mark.parametrize(
    "name", [n for n in kdkernels.__all__ if n.startswith("Linear") and n[6:9] not in ("Seq", "Top")]
)
def test_modules(name: str, generator: torch.Generator) -> None:
    module = getattr(kdkernels, name)
    x = make(generator)
    extra = [torch.randint(0, 11, (7,), generator=generator)] if "Distillation" in name else []
    assert torch.equal(module(reduction="sum")(*x, *extra), module.function(*x, *extra, reduction="sum"))
    keywords = inspect.signature(module.function).parameters
    assert set(inspect.signature(linear_kl_div).parameters) - set(keywords) == set()


def test_float64_runs_on_the_reference(generator: torch.Generator) -> None:
    x = [t.detach().double().requires_grad_(i < 2) for i, t in enumerate(make(generator))]
    assert linear_kl_div(*x).dtype == F64
    assert torch.autograd.gradcheck(lambda a, b: linear_kl_div(a, b, *x[2:], student_softcap=2.0), x[:2])
