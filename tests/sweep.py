"""Running a registry case: inputs in a dtype and a layout, the loss, its gradients, and fp32 eager's errors."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from accuracy import Level, assert_accurate, draws
from targets import seeded

from kdkernels.ops.registry import Case, Inputs, Shape, specs

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
Dtypes = tuple[torch.dtype, ...]  # one for each of case.grads
MORE_DRAWS = 16
SAME: tuple[Dtypes, ...] = ((F32, F32), (F16, F16), (BF16, BF16))
MIXED: tuple[Dtypes, ...] = ((F16, F32), (F32, BF16), (BF16, F16), (BF16, F32))


def dtype_id(dtypes: Dtypes) -> str:
    return "-".join(dict.fromkeys(str(d).removeprefix("torch.") for d in dtypes))


def cast(case: Case, inputs: Inputs, dtypes: Dtypes) -> Inputs:
    """The inputs with those of case.grads rounded to `dtypes`."""
    of = dict(zip(case.grads, itertools.chain(dtypes, itertools.repeat(dtypes[-1])), strict=False))
    return {n: x.to(of[n]) if n in of else x for n, x in inputs.items()}


def upstream_of(loss_shape: torch.Size, unit: bool, dtypes: Dtypes = SAME[0]) -> torch.Tensor:
    """What the loss is multiplied by before the backward: not 1 and not one number, unless `unit`.

    A bfloat16 gradient that the forward stores is rounded before it is multiplied, which only a power of two
    leaves at one rounding; test_a_stored_gradient_times_any_number covers the others.
    """
    if unit:
        return torch.ones(loss_shape, dtype=F64)
    if not loss_shape:
        return torch.tensor(-0.125 if BF16 in dtypes else 1.375, dtype=F64)
    g = torch.Generator().manual_seed(0)
    return torch.randint(-24, 24, loss_shape, generator=g).double() / 16 + 0.03125


def evaluate(
    case: Case,
    inputs: Inputs,
    backend: str,
    dtypes: Dtypes,
    *,
    unit: bool,
    wanted: tuple[str, ...] | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """The loss and the gradients of the `wanted` inputs (default: case.grads). The upstream gradient suits `dtypes`."""
    wanted = case.grads if wanted is None else wanted
    inputs = {n: x.detach().requires_grad_(n in wanted) for n, x in inputs.items()}
    loss = case.function(**inputs, **{**case.options, **options}, backend=backend)
    result = {"loss": loss.detach()}
    if wanted:
        upstream = upstream_of(loss.shape, unit, dtypes).to(loss)
        grads = torch.autograd.grad(loss, [inputs[n] for n in wanted], upstream)
        result |= dict(zip(wanted, grads, strict=True))
    return result


def widened(case: Case, inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same values on the CPU in `dtype`."""
    return {n: x.detach().to("cpu", dtype if x.is_floating_point() else None) for n, x in inputs.items()}


def exact(case: Case, inputs: Inputs, dtypes: Dtypes, **options: Any) -> dict[str, torch.Tensor]:
    """The float64 reference on the same values."""
    return evaluate(case, widened(case, inputs, F64), "reference", dtypes, **options)


@functools.cache
def levels(case_name: str, shape: Shape, dtypes: Dtypes, unit: bool, times: int = 1) -> dict[str, Level]:
    """fp32 eager's errors on inputs of this shape and these dtypes, class axis last, in `times` the usual draws."""
    case = CASES[case_name]
    generator = seeded(f"{case_name}{shape}{dtypes}{unit}{times}")
    found = {name: Level() for name in ("loss", *case.grads)}
    of_loss, of_gradients = (times * n for n in draws(torch.Size(shape).numel()))
    for i in range(of_loss):
        inputs = cast(case, case.make(shape, generator), dtypes)
        wanted = case.grads if i < of_gradients else ()
        truth = exact(case, inputs, dtypes, unit=unit, wanted=wanted)
        eager = evaluate(case, widened(case, inputs, F32), "reference", dtypes, unit=unit, wanted=wanted)
        found |= {name: found[name].seen(eager[name], truth[name]) for name in truth}
    return found


def check(
    case: Case, inputs: Inputs, target: Any, shape: Shape, dtypes: Dtypes, *, unit: bool, dim: int = -1,
    wanted: tuple[str, ...] | None = None, **options: Any,
) -> None:  # fmt: skip
    """The kernel's loss and gradients meet the bar, and nothing was written into an input."""
    if dim != -1:
        options["dim"] = dim
    inputs = {n: x if x.device.type == target.device else x.to(target.device) for n, x in inputs.items()}
    before = {n: x.detach().clone() for n, x in inputs.items()}
    got = evaluate(case, inputs, target.backend, dtypes, unit=unit, wanted=wanted, **options)
    truth = exact(case, inputs, dtypes, unit=unit, wanted=wanted, **options)
    eager = evaluate(case, widened(case, inputs, F32), "reference", dtypes, unit=unit, wanted=wanted, **options)
    bars = levels(case.name, shape, dtypes, unit)
    for name, value in got.items():
        if name == "loss":
            assert value.dtype == F32, f"the loss is {value.dtype}"
        else:
            assert value.dtype == inputs[name].dtype, f"the gradient of {name} is {value.dtype}"
        level, what = bars[name].seen(eager[name], truth[name]), f"{case.name} on {target}, {name}"
        try:
            assert_accurate(value, truth[name], level, what)
        except AssertionError:
            # Among thousands of checks some meet a draw that is one in thousands: eager gets as many tries.
            bars = levels(case.name, shape, dtypes, unit, times=MORE_DRAWS)
            assert_accurate(value, truth[name], bars[name].seen(eager[name], truth[name]), what)
    for name, x in inputs.items():
        assert torch.equal(x.nan_to_num(), before[name].nan_to_num()), f"{name} was written to"


# --------------------------------------------------------------------------------------- more cases than the registry's


def _scores(shape: Shape, generator: torch.Generator) -> Inputs:
    return {name: 3 * torch.randn(shape, generator=generator) for name in ("student_logits", "teacher_logits")}


def _log_probs(shape: Shape, generator: torch.Generator) -> Inputs:
    return {n: x.log_softmax(-1) for n, x in _scores(shape, generator).items()}


def _everything(shape: Shape, generator: torch.Generator) -> Inputs:
    """Row weights (some 0), labels (some ignored), class weights."""
    rows = shape[:-1]
    labels = torch.randint(0, shape[-1], rows, generator=generator)
    labels.view(-1)[1::3] = -7
    weight = torch.rand(rows, generator=generator)
    weight.view(-1)[2::4] = 0
    return {**_scores(shape, generator), "labels": labels, "weight": weight,
            "class_weight": 0.5 + torch.rand(shape[-1], generator=generator)}  # fmt: skip


def _masked(shape: Shape, generator: torch.Generator) -> Inputs:
    mask = torch.rand(shape[:-1], generator=generator) < 0.6
    mask.view(-1)[0] = True
    return {**_scores(shape, generator), "weight": mask}


def _extra() -> tuple[Case, ...]:
    from kdkernels import distillation_loss, kl_div

    def case(name: str, function: Any, make: Any = _scores, **options: Any) -> Case:
        return Case(name, function, make, options, shapes=((3, 2), (5, 7), (4, 100), (3, 1030), (2, 3, 130)))

    return (
        case("extra-log-probs", kl_div, _log_probs, from_log_probs=True),
        case("extra-log-probs-T", kl_div, _log_probs, from_log_probs=True, temperature=3.0, reduction="none"),
        case("extra-bool-mask", kl_div, _masked, temperature=2.0),
        case("extra-tensor-temperatures", kl_div, temperature=torch.tensor(2.0), teacher_temperature=torch.tensor([1.5])),
        case("extra-tiny-temperature", kl_div, temperature=0.25),
        case("extra-everything", distillation_loss, _everything, label_smoothing=0.1, alpha=0.7, ignore_index=-7),
        case("extra-everything-none", distillation_loss, _everything, label_smoothing=0.1, ignore_index=-7, reduction="none"),
        case("extra-num-items-tensor", distillation_loss, _everything, num_items=torch.tensor(13), ignore_index=-7),
        case("extra-batchmean", distillation_loss, _everything, reduction="batchmean", ignore_index=-7, scale_by_t2=False),
    )  # fmt: skip


SPECS = {case.name: spec for spec in specs() for case in spec.cases}
REGISTERED = tuple(case for spec in specs() for case in spec.cases)
EXTRA = _extra()
CASES = {case.name: case for case in (*REGISTERED, *EXTRA)}


def runs_on(case: Case, target: Any) -> bool:
    """Whether the case's family has kernels for the target's backend."""
    if case.name not in SPECS:
        return True
    return {"cuda_on_cpu": "cuda"}.get(target.backend, target.backend) in SPECS[case.name].backends
