"""The registry's cases under pytest-benchmark: pytest bench/

For watching one kernel while working on it; `kdkernels bench` is what results are quoted from, since
it interleaves the contenders. Nothing here fails on a time.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from kdkernels.bench import gate, runner, select
from kdkernels.bench.inputs import bench_grads, evaluate, make

DEVICE = select.default_device()
ROWS = [
    row
    for row in runner.plan(select.cases(), DEVICE, lambda own: own[:1], lambda label: True)
    if torch.Size(row.shape).numel() <= 2**20
]
OPTIONS = runner.Options(compile=False, peers=False)


def _names(row: runner.Row) -> list[str]:
    backends = [b for b in row.spec.backends if b != "reference"]
    return [f"kdkernels[{b}]" for b in backends] + (["eager"] if row.case.eager else [])


_checked: dict[str, dict[str, runner.Contender]] = {}


def _contenders(row: runner.Row) -> dict[str, runner.Contender]:
    """What runs a row, compared with float64 once."""
    if str(row) not in _checked:
        _checked[str(row)] = {c.name: c for c in runner.contenders(row, DEVICE, OPTIONS)}
    return _checked[str(row)]


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize(
    ("row", "name"), [pytest.param(r, n, id=f"{r.case.name}-{r.label}-{n}") for r in ROWS for n in _names(r)]
)
def test_speed(benchmark, row: runner.Row, name: str, mode: str) -> None:
    found = _contenders(row)
    if name not in found:
        pytest.skip(f"{name} does not run on {DEVICE.type} tensors here")
    contender = found[name]
    assert contender.status == "ok", contender.note
    inputs = make(row.case, row.shape, row.dtype, DEVICE)
    wanted = gate.expected(row.case, inputs)
    values = evaluate(contender.loss, inputs, contender.options, bench_grads(row.case))
    assert all(gate.distance(values[k], wanted[k]) <= gate.SAME_LOSS[row.dtype] for k in wanted)

    call = runner.calls(row.case, contender, inputs, mode)

    def whole() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{row} {mode}"
    benchmark(whole)
