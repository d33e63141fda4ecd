"""Every case of the registry on every backend against float64, by the bar that accuracy.py states."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sweep import (
    BF16,
    CASES,
    EXTRA,
    F16,
    F32,
    MIXED,
    REGISTERED,
    SAME,
    SPECS,
    Dtypes,
    cast,
    check,
    dtype_id,
    runs_on,
)
from targets import TARGETS, Target

from kdkernels.ops.registry import Case, Shape

pytestmark = pytest.mark.usefixtures("poisoned")
FUSED = [t for t in TARGETS if t.fused]
SMALL = (5, 7)
# Of these the interpreter and the emulator also run every shape.
THOROUGH = ("kl_div", "distillation_loss-smooth")


def sweep() -> Iterator[Any]:
    """(target, case, dtypes, shape, whether the upstream gradient is 1)."""
    for target, case in itertools.product(FUSED, (*REGISTERED, *EXTRA)):
        if not runs_on(case, target):
            continue
        small = SMALL if SMALL in case.shapes else min(case.shapes, key=lambda s: abs(torch.Size(s).numel() - 35))
        known = SPECS[case.name].dtypes if case.name in SPECS else (F32, F16, BF16)
        same = [d for d in SAME if d[0] in known]
        for shape in case.shapes if not target.slow or case.name in THOROUGH else (small,):
            dtypes = list(same) if not target.slow or shape == small else same[-1:]
            if shape == small and len(case.grads) == 2:
                dtypes += [d for d in MIXED if set(d) <= set(known)][: 1 if target.slow else None]
            for d in dtypes:
                # The gradient stored by the forward is returned as it is, scaled, or recomputed.
                for unit in (True, False) if shape == small and d in SAME else (False,):
                    name = f"{target}-{case.name}-{dtype_id(d)}-{'x'.join(map(str, shape))}{'-unit' if unit else ''}"
                    yield pytest.param(target, case, d, shape, unit, id=name)


@pytest.mark.parametrize("fused, case, dtypes, shape, unit", list(sweep()))
def test_loss_and_gradients(
    fused: Target, case: Case, dtypes: Dtypes, shape: Shape, unit: bool, generator: torch.Generator
) -> None:
    inputs = cast(case, case.make(shape, generator), dtypes)
    check(case, inputs, fused, shape, dtypes, unit=unit)


@pytest.mark.parametrize("wanted", [(), ("student_logits",), ("teacher_logits",)], ids=["none", "student", "teacher"])
@pytest.mark.parametrize("name", ["kl_div", "kl_div-none", "distillation_loss-smooth", "extra-log-probs"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=["stored", "recomputed"])
def test_only_the_gradients_that_are_wanted(
    fused: Target, wanted: tuple[str, ...], name: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    case, dtypes, shape = CASES[name], (dtype, dtype), SMALL
    check(case, cast(case, case.make(shape, generator), dtypes), fused, shape, dtypes, unit=False, wanted=wanted)


@pytest.mark.parametrize("factor", [0.7, -3.0, 1e-3])
def test_a_stored_gradient_times_any_number(fused: Target, factor: float, generator: torch.Generator) -> None:
    """In bfloat16 the gradient of factor * loss is that of the loss, times factor in float32, rounded: to the bit."""
    case = CASES["distillation_loss"]
    inputs = {n: x.to(fused.device) for n, x in cast(case, case.make((5, 33), generator), SAME[2]).items()}
    student = inputs.pop("student_logits").requires_grad_()

    def gradient(by: float) -> torch.Tensor:
        loss = case.function(student, **inputs, **case.options, backend=fused.backend)
        return torch.autograd.grad(loss, student, torch.full_like(loss, by))[0]

    assert torch.equal(gradient(factor), (gradient(1.0).float() * torch.tensor(factor)).bfloat16())


# ------------------------------------------------------------------------------------------------------------- layouts


def strided(x: torch.Tensor, order: tuple[int, ...], offset: int = 0, gap: int = 0) -> torch.Tensor:
    """x with its axes stored in `order` (slowest first), `gap` unused elements after each run of the fastest axis,
    starting `offset` elements into its storage. The unused elements are NaN."""
    stride, step = [0] * x.dim(), 1
    for axis in reversed(order):
        stride[axis] = step
        step *= x.shape[axis]
        if axis == order[-1]:
            step += gap
    y = torch.full((step + offset + 8,), float("nan"), dtype=x.dtype).as_strided(x.shape, stride, offset)
    return y.copy_(x)


LAYOUTS = {
    # name: (student's layout, teacher's layout), from (A, B, C, V)
    "odd-offset": (lambda x: strided(x, (0, 1, 2, 3), offset=1), lambda x: strided(x, (0, 1, 2, 3), offset=3)),
    "sliced-classes": (lambda x: strided(x, (0, 1, 2, 3), gap=3), lambda x: strided(x, (0, 1, 2, 3), gap=1)),
    "sliced-rows": (
        lambda x: torch.cat([x, x.new_full((x.shape[0], 1, *x.shape[2:]), float("nan"))], 1)[:, :-1],
        lambda x: torch.cat([x.new_full((x.shape[0], 1, *x.shape[2:]), float("nan")), x], 1)[:, 1:],
    ),
    "class-strided": (lambda x: strided(x, (0, 3, 1, 2)), lambda x: strided(x, (0, 3, 1, 2))),
    "class-slowest": (lambda x: strided(x, (3, 0, 1, 2)), lambda x: strided(x, (3, 0, 1, 2), offset=1)),
    "class-strided-student": (lambda x: strided(x, (0, 3, 1, 2)), lambda x: x),
    "class-strided-teacher": (lambda x: x, lambda x: strided(x, (0, 3, 1, 2), gap=2)),
    "expanded-teacher": (lambda x: x, lambda x: x[:1, :1, :1].expand_as(x)),
    "expanded-batch": (lambda x: x, lambda x: x[:1].expand_as(x)),
    # No two row axes merge: one of the two, or both, must be copied, and their gradients still arrive.
    "shuffled-student": (lambda x: strided(x, (2, 0, 3, 1)), lambda x: x),
    "shuffled-both": (lambda x: strided(x, (2, 0, 3, 1)), lambda x: strided(x, (1, 3, 2, 0))),
    "swapped-rows": (lambda x: strided(x, (1, 0, 2, 3)), lambda x: strided(x, (0, 2, 1, 3))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, BF16)], ids=dtype_id)
@pytest.mark.parametrize("name", ["kl_div", "distillation_loss-none"])
def test_layouts(fused: Target, name: str, layout: str, dtypes: Dtypes, generator: torch.Generator) -> None:
    case, shape = CASES[name], (2, 3, 2, 19)
    inputs = cast(case, case.make(shape, generator), dtypes)
    for n, restride in zip(case.grads, LAYOUTS[layout], strict=True):
        inputs[n] = restride(inputs[n])
        assert inputs[n].shape == shape
    if fused.device != "cpu":
        inputs = {n: on_device(x, fused.device) for n, x in inputs.items()}
    check(case, inputs, fused, shape, dtypes, unit=False)


def on_device(x: torch.Tensor, device: str) -> torch.Tensor:
    """x with its strides and its offset."""
    storage = torch.tensor([], dtype=x.dtype).set_(x.untyped_storage())
    return storage.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.parametrize("dim", [0, 1, 2, -3])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", ["kl_div", "distillation_loss-smooth"])
def test_class_axis_anywhere(
    fused: Target, dim: int, dtype: torch.dtype, name: str, generator: torch.Generator
) -> None:
    """NCHW and its like: the same as with the class axis last."""
    case, shape = CASES[name], (2, 3, 5, 21)
    inputs = cast(case, case.make(shape, generator), (dtype, dtype))
    for n in case.grads:
        inputs[n] = inputs[n].movedim(-1, dim).contiguous()
    check(case, inputs, fused, shape, (dtype, dtype), unit=False, dim=dim)


@pytest.mark.parametrize("shape", [(40, 33), (33, 257)], ids=str)
def test_class_axis_first_of_two(fused: Target, shape: Shape, generator: torch.Generator) -> None:
    case = CASES["kl_div"]
    inputs = {n: x.t().contiguous() for n, x in case.make(shape, generator).items()}
    check(case, inputs, fused, shape, (F32, F32), unit=False, dim=0)


@pytest.mark.parametrize("name", ["kl_div-labels", "kl_div-weight", "distillation_loss-smooth"])
def test_side_inputs_may_be_strided(fused: Target, name: str, generator: torch.Generator) -> None:
    """Labels, weights and class weights that are slices, transposes or expanded."""
    case, shape = CASES[name], (4, 3, 9)
    inputs = case.make(shape, generator)
    for n in {"labels", "weight", "class_weight"} & set(inputs):
        x = inputs[n]
        filler = torch.full_like(x, 0.125 if x.is_floating_point() else 1)
        inputs[n] = (
            torch.stack([x, filler], -1)[..., 0] if x.dim() == 1 else torch.stack([x.t(), filler.t()], -1)[..., 0].t()
        )
        assert not inputs[n].is_contiguous()
    check(case, inputs, fused, shape, (F32, F32), unit=False)


def test_one_row_axis_of_strided_side_inputs(fused: Target, generator: torch.Generator) -> None:
    case, shape = CASES["distillation_loss-smooth"], (6, 9)
    inputs = case.make(shape, generator)
    inputs["labels"] = torch.stack([inputs["labels"], torch.zeros(6).long()], -1)[:, 0]
    inputs["class_weight"] = torch.tensor(0.75).expand(9)
    check(case, inputs, fused, shape, (F32, F32), unit=False)
    inputs["labels"] = torch.tensor(3).expand(6)
    check(case, inputs, fused, shape, (F32, F32), unit=False)


WIDE = [8191, 8192, 8193, 32000, 50257, 262144, 262145, 300001]
SLOW_WIDE = {(8193, F32), (32000, F16), (50257, BF16), (262145, BF16)}


@pytest.mark.parametrize("classes", WIDE)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.slow_takes(lambda classes, dtype: (classes, dtype) in SLOW_WIDE)
def test_long_rows(fused: Target, classes: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    case, shape = CASES["distillation_loss"], (2, classes)
    check(case, cast(case, case.make(shape, generator), (dtype, dtype)), fused, shape, (dtype, dtype), unit=False)


@pytest.mark.parametrize("rows", [1, 17, 1000])
@pytest.mark.parametrize("classes", [1, 2, 3, 10])
@pytest.mark.slow_takes(lambda rows, classes: rows < 1000 or classes == 3)
def test_many_short_rows(fused: Target, rows: int, classes: int, generator: torch.Generator) -> None:
    case, shape = CASES["distillation_loss"], (rows, classes)
    check(case, case.make(shape, generator), fused, shape, (F32, F32), unit=False)
