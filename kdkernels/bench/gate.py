"""Nothing is timed that is not right: the check in front of every row of the bench."""

from __future__ import annotations

import math

import torch

from kdkernels.bench import accuracy
from kdkernels.bench.inputs import Loss, bench_grads, dtype_name, evaluate
from kdkernels.ops.registry import Case, Inputs, Shape, Spec

# Float64 needs about a dozen tensors of this many elements; larger shapes are checked on fewer rows.
ORACLE_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
# Foreign code is held only to computing the same loss: relative norms, by the bits of the dtype.
SAME_LOSS = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def cut(shape: Shape, elements: int) -> Shape:
    """The shape with fewer entries on its first axis, so that it holds at most `elements`."""
    rest = math.prod(shape[1:])
    return (max(1, min(shape[0], elements // max(1, rest))), *shape[1:])


def kernels(
    spec: Spec, case: Case, shape: Shape, dtype: torch.dtype, names: tuple[str, ...], device: torch.device
) -> dict[str, tuple[float, str]]:
    """backend -> (worst error over bar, why it failed or ""), against float64 at this shape or at fewer rows of it."""
    rows, *rest = cut(shape, ORACLE_ELEMENTS.get(device.type, 2**22))
    small = (min(rows, case.oracle_rows or rows), *rest)
    verdicts = dict.fromkeys(names, (0.0, ""))
    for result in accuracy.check(spec, case, small, (dtype,), names, device, seeds=1):
        ratio, why = verdicts[result.backend]
        if not result.passed:
            why = result.note or f"{result.output} is off by {result.error:.3g} where {result.bar:.3g} is allowed"
        verdicts[result.backend] = max(ratio, result.ratio), why
    return verdicts


def distance(value: torch.Tensor, exact: torch.Tensor) -> float:
    """||value - exact|| / ||exact||, in float32 and by chunks."""
    error = norm = 0.0
    for v, e in zip(value.flatten().split(2**26), exact.flatten().split(2**26)):
        error += float((v.float() - e.float()).square().sum(dtype=torch.float64))
        norm += float(e.float().square().sum(dtype=torch.float64))
    return math.sqrt(error / norm) if norm else math.sqrt(error)


def same_loss(case: Case, loss: Loss, inputs: Inputs, options: dict, expected: Inputs, dtype: torch.dtype) -> str:
    """Why a loss is not the expected one on these very inputs, or ""."""
    try:
        values = evaluate(loss, inputs, options, bench_grads(case))
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    for name, value in values.items():
        off = distance(value, expected[name])
        if not off <= SAME_LOSS[dtype]:
            return f"another {name} in {dtype_name(dtype)}: {off:.2g} away, {SAME_LOSS[dtype]:.0e} allowed"
    return ""


def expected(case: Case, inputs: Inputs) -> Inputs:
    """What everybody's outputs are compared with: plain PyTorch in float32 on the same values."""
    wide = {name: x.float() if name in case.grads else x for name, x in inputs.items()}
    return evaluate(case.eager or accuracy.oracle(case), wide, dict(case.options), bench_grads(case))
