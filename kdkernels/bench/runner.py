"""Times every case: kdkernels on each backend, plain PyTorch, torch.compile and other libraries."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from kdkernels.bench import accuracy, gate, peers
from kdkernels.bench.inputs import Loss, bench_grads, dtype_name, make, with_leaves
from kdkernels.bench.memory import peak_bytes
from kdkernels.bench.results import Record
from kdkernels.bench.timing import Call, Rounds, Timer, WallTimer, floor_probe, interleave, throughput, timer_for
from kdkernels.ops.registry import Case, Inputs, Shape, Spec


@dataclass(frozen=True)
class Options:
    """How to run: see `kdkernels bench --help`."""

    seconds: float = 2.0
    backend: str | None = None
    compile: bool = True
    peers: bool = True
    forward_only: bool = False


@dataclass(frozen=True)
class Row:
    """One case at one shape and dtype."""

    spec: Spec
    case: Case
    label: str
    shape: Shape
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.case.name} {self.label} {self.shape} {dtype_name(self.dtype)}"


@dataclass
class Contender:
    """Something to time, or the reason not to."""

    name: str
    loss: Loss | None = None
    options: dict[str, Any] = field(default_factory=dict)
    status: str = "ok"
    note: str = ""
    error_over_bar: float | None = None
    first_call_ms: float | None = None  # of torch.compile and other libraries: what compiling takes

    def refuse(self, status: str, note: str) -> None:
        self.status, self.note = status, note


def contenders(row: Row, device: torch.device, options: Options) -> list[Contender]:
    """Everything that could run this row; kernels are checked against float64 already."""
    case, fixed = row.case, dict(row.case.options)
    names = tuple(b for b in accuracy.available(row.spec, device, options.backend) if b != "reference")
    verdicts = gate.kernels(row.spec, case, row.shape, row.dtype, names, device)
    found = []
    for name, (error, why) in verdicts.items():
        status = "failed" if why else "ok"
        found.append(
            Contender(
                f"kdkernels[{name}]", case.function, {**fixed, "backend": name}, status, why, None if why else error
            )
        )
    if case.eager is not None:
        found.append(Contender("eager", case.eager, fixed))
        if options.compile:
            torch._dynamo.reset()
            found.append(Contender("compile", torch.compile(case.eager, dynamic=False), fixed))
    if options.peers:
        losses, absent = peers.contenders(case, device)
        found += [Contender(name, loss, fixed) for name, loss in losses.items()]
        found += [Contender(name, status="absent", note=why) for name, why in absent.items()]
    return found


def calls(case: Case, contender: Contender, inputs: Inputs, mode: str) -> Call:
    """One whole operation: the loss alone as in evaluation, or the loss and its gradients."""
    assert contender.loss is not None
    loss, options = contender.loss, contender.options
    if mode == "forward":

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return loss(**inputs, **options)

        return forward
    names = bench_grads(case)
    leaves = with_leaves(inputs, names)
    wanted = [leaves[n] for n in names]

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss(**leaves, **options).sum(), wanted)

    def both_scalar() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss(**leaves, **options), wanted)

    return both_scalar if options.get("reduction") != "none" else both


def _refuse_other_losses(row: Row, found: list[Contender], inputs: Inputs) -> None:
    """At the full shape, everybody must compute the loss that plain PyTorch computes in float32."""
    others = [c for c in found if c.status == "ok" and c.name != "eager"]
    if not others:
        return
    wanted = gate.expected(row.case, inputs)
    for c in others:
        assert c.loss is not None
        start = time.perf_counter()
        if why := gate.same_loss(row.case, c.loss, inputs, c.options, wanted, row.dtype):
            c.refuse("failed", why)
        if not c.name.startswith("kdkernels"):
            c.first_call_ms = (time.perf_counter() - start) * 1e3


def _warm(c: Contender, call: Call) -> None:
    try:
        for _ in range(3):
            call()
    except Exception as error:
        c.refuse("failed", f"{type(error).__name__}: {error}".splitlines()[0])


def run_row(
    row: Row, device: torch.device, options: Options, timer: Timer, step: Callable[[str], None]
) -> Iterator[Record]:
    """The records of one row: every mode and contender, timed or with the reason why not."""
    step(f"{row}: checking")
    inputs = make(row.case, row.shape, row.dtype, device)
    found = contenders(row, device, options)
    _refuse_other_losses(row, found, inputs)
    for mode in ("forward",) if options.forward_only else ("forward", "forward+backward"):
        step(f"{row}: {mode}")
        backward = mode != "forward"
        nbytes = row.case.floor_bytes(row.shape, row.dtype.itemsize, backward) if row.case.floor_bytes else None
        ready: dict[str, Call] = {}
        for c in found:
            if c.status == "ok":
                call = calls(row.case, c, inputs, mode)
                _warm(c, call)
                if c.status == "ok":
                    ready[c.name] = call
        if not ready:
            yield from (record(row, mode, c, nbytes, device) for c in found)
            continue
        grads = sum(inputs[n].nbytes for n in bench_grads(row.case)) if backward else 0
        peaks = {name: peak_bytes(call, device) for name, call in ready.items()}
        if row.case.floor_work:
            ready["floor"] = row.case.floor_work(inputs, backward)
        elif nbytes:
            ready["floor"] = floor_probe(nbytes, device)
        rounds = interleave(ready, timer, options.seconds)
        wall = rounds
        if device.type == "cuda":
            wall = interleave(ready, WallTimer(device), options.seconds / 4)
        if "floor" in ready:
            yield record(row, mode, Contender("floor"), nbytes, device, rounds, wall)
        for c in found:
            timed = c.name in ready
            peak = (peaks[c.name], grads) if timed else None
            yield record(row, mode, c, nbytes, device, rounds if timed else None, wall, peak)


def record(
    row: Row, mode: str, c: Contender, nbytes: int | None, device: torch.device, rounds: Rounds | None = None,
    wall: Rounds | None = None, peak: tuple[int | None, int] | None = None,
) -> Record:  # fmt: skip
    """One contender in one mode, as results.py writes it. `speedup_over` holds [quartile, median, quartile]."""
    out: Record = {
        "family": row.spec.family, "case": row.case.name, "label": row.label, "shape": list(row.shape),
        "dtype": dtype_name(row.dtype), "device": device.type, "mode": mode, "headline": row.case.headline,
        "contender": c.name, "status": c.status, "note": c.note, "error_over_bar": c.error_over_bar,
        "floor_bytes": nbytes, "ms": None, "ms_spread": None, "wall_ms": None, "rounds": 0, "gbs": None,
        "speedup_over": {}, "first_call_ms": c.first_call_ms, "peak_bytes": None, "extra_bytes": None,
    }  # fmt: skip
    if rounds is None:
        return out
    spread = rounds.time(c.name)
    out |= {
        "ms": spread.median * 1e3,
        "ms_spread": [s * 1e3 for s in spread.record()],
        "rounds": len(rounds.seconds[c.name]),
    }
    if wall is not None:
        out["wall_ms"] = wall.time(c.name).median * 1e3
    if nbytes:
        out["gbs"] = throughput(nbytes, spread.median)
    others = [n for n in rounds.seconds if n != c.name]
    out["speedup_over"] = {n: rounds.ratio(c.name, n).record() for n in others}
    if peak is not None and peak[0] is not None:
        out["peak_bytes"], out["extra_bytes"] = peak[0], max(0, peak[0] - peak[1])
    return out


def plan(
    chosen: list[tuple[Spec, Case]],
    device: torch.device,
    dtypes: Callable[[tuple[torch.dtype, ...]], tuple[torch.dtype, ...]],
    wanted: Callable[[str], bool],
) -> list[Row]:
    """The rows that cases and filters make, all of the first dtype before the second.

    "tiny" is a shape of the tests, where nothing counts but the cost of a call.

    Args:
        dtypes: narrows a case's own.
        wanted: says which shape labels.
    """
    rows = []
    for spec, case in chosen:
        real = case.bench_gpu if device.type == "cuda" else case.bench
        labels = {**real, "tiny": case.shapes[len(case.shapes) // 4]} if real and case.shapes else real
        for label, shape in labels.items():
            if wanted(label):
                rows += [(i, Row(spec, case, label, shape, dtype)) for i, dtype in enumerate(dtypes(case.bench_dtypes))]
    return [row for _, row in sorted(rows, key=lambda r: r[0])]


def run(
    rows: list[Row],
    device: torch.device,
    options: Options,
    step: Callable[[str], None],
    time_limit: float | None = None,
) -> Iterator[list[Record]]:
    """The records of each row in turn; past `time_limit` seconds no further row is begun."""
    timer = timer_for(device)
    start = time.perf_counter()
    for row in rows:
        if time_limit is not None and time.perf_counter() - start > time_limit:
            return
        try:
            yield list(run_row(row, device, options, timer, step))
        except torch.OutOfMemoryError as error:
            note = str(error).partition(".")[0]
            yield [record(row, "forward", Contender("all", status="failed", note=note), None, device)]
        if device.type == "cuda":
            torch.cuda.empty_cache()
