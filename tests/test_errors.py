"""Bad input: the exact kind of error, words that name the argument and its value, and nothing launched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from targets import Target

from kdkernels import BackendError, DistillationLoss, KLDivLoss, backends, distillation_loss, kl_div, native

N, V = 3, 5


def call(target: Target, function: Any = kl_div, **changed: Any) -> torch.Tensor:
    """A valid call, but for what is changed."""
    arguments: dict[str, Any] = {"student_logits": torch.zeros(N, V), "teacher_logits": torch.zeros(N, V)}
    if function is distillation_loss:
        arguments["labels"] = torch.zeros(N, dtype=torch.long)
    arguments |= changed
    moved = {
        k: v.to(target.device) if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v
        for k, v in arguments.items()
    }
    return function(**moved, backend=target.backend)


class Spy:
    """Fails the test if a kernel is called."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def __bool__(self) -> bool:
        return bool(self.real)

    def context(self, tensor: torch.Tensor) -> Any:
        return self.real.context(tensor)

    def call(self, name: str, *args: Any) -> None:
        pytest.fail(f"{name} was launched on bad input")


@pytest.fixture
def nothing_runs(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    if target.backend in ("cpu", "cuda", "cuda_on_cpu"):
        monkeypatch.setitem(backends._libraries, target.backend, Spy(backends.library(target.backend)))
    elif target.backend == "triton":
        from kdkernels.ops.row_divergence import triton

        for name in ("forward", "backward"):
            monkeypatch.setattr(triton, name, lambda *a, **k: pytest.fail("a Triton kernel was launched on bad input"))


f16, f32, f64 = torch.float16, torch.float32, torch.float64
BAD = {
    "class counts differ": (
        {"teacher_logits": torch.zeros(N, V + 1)}, ValueError,
        r"same number of classes: student_logits has shape \(3, 5\) and teacher_logits \(3, 6\)",
    ),
    "rows differ": (
        {"teacher_logits": torch.zeros(N + 1, V)}, ValueError,
        r"same shape: student_logits has shape \(3, 5\) and teacher_logits \(4, 5\)",
    ),
    "dimensions differ": (
        {"teacher_logits": torch.zeros(V)}, ValueError, r"same shape: .*\(3, 5\) and teacher_logits \(5,\)",
    ),
    "no class axis": (
        {"student_logits": torch.zeros(()), "teacher_logits": torch.zeros(())}, ValueError,
        r"student_logits must have a class axis, got a 0-d tensor",
    ),
    "no classes": (
        {"student_logits": torch.zeros(N, 0), "teacher_logits": torch.zeros(N, 0)}, ValueError,
        r"student_logits must have at least one class, got shape \(3, 0\)",
    ),
    "no such axis": ({"dim": 2}, IndexError, r"dim must be between -2 and 1, got 2"),
    "integer student": (
        {"student_logits": torch.zeros(N, V, dtype=torch.int64)}, TypeError,
        r"student_logits must be float16, bfloat16, float32 or float64, got int64",
    ),
    "boolean teacher": (
        {"teacher_logits": torch.zeros(N, V, dtype=torch.bool)}, TypeError, r"teacher_logits must be float16.*got bool",
    ),
    "complex teacher": (
        {"teacher_logits": torch.zeros(N, V, dtype=torch.complex64)}, TypeError, r"teacher_logits must be .*got complex64",
    ),
    "8-bit student": (
        {"student_logits": torch.zeros(N, V).to(torch.float8_e4m3fn)}, TypeError,
        r"student_logits must be float16, bfloat16, float32 or float64, got float8_e4m3fn",
    ),
    "a list": ({"student_logits": [[0.0]]}, TypeError, r"student_logits must be a tensor, got list"),
    "another device": (
        {"teacher_logits": torch.zeros(N, V, device="meta")}, ValueError,
        r"one device: student_logits is on (cpu|cuda:0), teacher_logits on meta",
    ),
    "temperature 0": ({"temperature": 0.0}, ValueError, r"temperature must be positive, got 0"),
    "negative temperature": ({"temperature": -2}, ValueError, r"temperature must be positive, got -2"),
    "NaN temperature": ({"temperature": float("nan")}, ValueError, r"temperature must be positive, got nan"),
    "infinite temperature": ({"temperature": float("inf")}, ValueError, r"temperature must be .*got inf"),
    "temperature of two": ({"temperature": torch.ones(2)}, ValueError, r"temperature must be .*one element, got shape \(2,\)"),
    "temperature in words": ({"temperature": "4"}, TypeError, r"temperature must be a number or a tensor.*got str"),
    "teacher temperature": ({"teacher_temperature": -1.0}, ValueError, r"teacher_temperature must be positive, got -1"),
    "reduction": (
        {"reduction": "average"}, ValueError,
        r"unknown reduction 'average': choose one of 'rowmean', 'batchmean', 'mean', 'sum', 'none'",
    ),
    "num_items 0": ({"num_items": 0}, ValueError, r"num_items must be positive, got 0"),
    "labels of another shape": (
        {"labels": torch.zeros(N + 1, dtype=torch.long)}, ValueError, r"labels must have the shape .*\(3,\); got \(4,\)",
    ),
    "one-hot labels": (
        {"labels": torch.zeros(N, V, dtype=torch.long)}, ValueError, r"labels must have the shape .*\(3,\); got \(3, 5\)",
    ),
    "floating labels": ({"labels": torch.zeros(N)}, TypeError, r"labels must hold class indices \(int64\), got float32"),
    "boolean labels": ({"labels": torch.zeros(N, dtype=torch.bool)}, TypeError, r"labels must hold class indices.*got bool"),
    "labels in a list": ({"labels": [0, 1, 2]}, TypeError, r"labels must be a tensor, got list"),
    "labels elsewhere": (
        {"labels": torch.zeros(N, dtype=torch.long, device="meta")}, ValueError, r"labels must be on (cpu|cuda:0).*got meta",
    ),
    "weight of another shape": ({"weight": torch.ones(N, V)}, ValueError, r"weight must have the shape .*\(3,\); got \(3, 5\)"),
    "weight elsewhere": ({"weight": torch.ones(N, device="meta")}, ValueError, r"weight must be on (cpu|cuda:0).*got meta"),
    "weight with a gradient": (
        {"weight": torch.ones(N, requires_grad=True)}, ValueError, r"weight gets no gradient here: pass weight.detach\(\)",
    ),
}  # fmt: skip
BAD_DISTILLATION = {
    "no labels": ({"labels": None}, TypeError, r"labels must be a tensor; without labels use kl_div"),
    "alpha above 1": ({"alpha": 1.5}, ValueError, r"alpha must be between 0 and 1, got 1.5"),
    "alpha below 0": ({"alpha": -0.1}, ValueError, r"alpha must be between 0 and 1, got -0.1"),
    "alpha NaN": ({"alpha": float("nan")}, ValueError, r"alpha must be between 0 and 1, got nan"),
    "learnable alpha": (
        {"alpha": torch.tensor(0.5, requires_grad=True)}, ValueError, r"alpha gets no gradient here: pass alpha.detach\(\)",
    ),
    "label_smoothing": ({"label_smoothing": 2}, ValueError, r"label_smoothing must be between 0 and 1, got 2"),
    "class_weight of another length": (
        {"class_weight": torch.ones(V + 1)}, ValueError, r"class_weight must have one value a class, shape \(5,\); got \(6,\)",
    ),
    "class_weight of integers": (
        {"class_weight": torch.ones(V, dtype=torch.long)}, TypeError, r"class_weight must be float16.*got int64",
    ),
    "class_weight with a gradient": (
        {"class_weight": torch.ones(V, requires_grad=True)}, ValueError, r"class_weight gets no gradient here",
    ),
}  # fmt: skip
CASES = [(kl_div, name, *case) for name, case in BAD.items()]
CASES += [(distillation_loss, name, *case) for name, case in {**BAD, **BAD_DISTILLATION}.items()]


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("function, name, changed, error, words", CASES, ids=[f"{c[0].__name__}-{c[1]}" for c in CASES])
def test_bad_input(target: Target, function: Any, name: str, changed: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        call(target, function, **changed)
    assert type(caught.value) is error


@pytest.mark.parametrize("label", [V, -1, -101, 2**40])
@pytest.mark.parametrize("function", [kl_div, distillation_loss])
def test_label_out_of_range(target: Target, function: Any, label: int, request: pytest.FixtureRequest) -> None:
    if target.device != "cpu":
        pytest.skip("looking at a GPU's labels would synchronise")
    if target.backend != "cpu":  # whose kernel looks itself, before it writes anything: see the test after next
        request.getfixturevalue("nothing_runs")
    labels = torch.tensor([0, label, 1])
    with pytest.raises(IndexError, match=rf"labels hold {label}, outside 0 to 4 and not ignore_index \(-100\)"):
        call(target, function, labels=labels)


@pytest.mark.backends("cuda_on_cpu", "cuda", "triton")
@pytest.mark.parametrize("label", [V, -1, 2**40])
def test_label_out_of_range_on_a_gpu(target: Target, label: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in its own row, nothing read out of bounds; an error with KDKERNELS_DEBUG=1."""
    if target.device == "cpu":
        monkeypatch.setattr("kdkernels.checks._may_read", lambda x: False)
    student = torch.randn(N, V, device=target.device, requires_grad=True)
    labels = torch.tensor([0, label, 1])
    loss = call(target, distillation_loss, student_logits=student, labels=labels, reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert student.grad.isnan().any(-1).tolist() == [False, True, False]
    monkeypatch.undo()
    monkeypatch.setenv("KDKERNELS_DEBUG", "1")
    with pytest.raises(IndexError, match=f"labels hold {label}"):
        call(target, distillation_loss, student_logits=student, labels=labels)


def test_the_native_kernel_checks_labels_before_it_writes() -> None:
    """Whoever calls the entry point itself still cannot read or write out of bounds."""
    library = backends.library("cpu")
    if not library:
        pytest.skip(f"no native kernels here: {native.build_info().get('native')}")
    x = torch.zeros(N, V)
    outputs = [torch.full(shape, 7.0) for shape in ((N,), (1,), (N, 8), (N, V, 1))]
    scalars = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    with pytest.raises(IndexError, match=r"labels hold 5, outside 0 to 4 and not ignore_index \(-100\): row 2"):
        library.call(
            "row_divergence_forward", x[..., None], x[..., None], torch.tensor([0, 1, 5]), None, None, scalars, None,
            *outputs, None, 0, 0, 1, 0, -100, 1,
        )  # fmt: skip
    assert all((x == 7).all() for x in outputs)


@pytest.mark.parametrize("dtypes", [(f64, f64), (f64, f32), (f32, f64)], ids=str)
def test_float64_on_a_kernel_is_refused(fused: Target, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher = (torch.zeros(N, V, dtype=d) for d in dtypes)
    with pytest.raises(
        BackendError, match=rf"kl_div cannot run on backend '{fused.backend}'.*float64 runs on 'reference'"
    ):
        call(fused, student_logits=student, teacher_logits=teacher)


@pytest.mark.parametrize("name", ["student_logits", "teacher_logits"])
def test_nothing_is_changed_by_an_error(target: Target, name: str) -> None:
    student = torch.randn(N, V, requires_grad=True)
    before = student.detach().clone()
    with pytest.raises(ValueError, match="reduction"):
        call(target, student_logits=student, reduction="?")
    assert torch.equal(student, before)
    assert student.grad is None


@pytest.mark.parametrize("module", [KLDivLoss, DistillationLoss])
def test_unknown_option_of_a_module(module: Any) -> None:
    with pytest.raises(TypeError, match=rf"{module.__name__} has no option 'temprature'"):
        module(temprature=2.0)
