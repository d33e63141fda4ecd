"""How time and memory grow with the number of samples, next to plain PyTorch until that fails."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kdkernels.bench import runner
from kdkernels.bench.environment import write_json
from kdkernels.bench.inputs import make
from kdkernels.bench.memory import peak_bytes
from kdkernels.bench.results import Record, describe_environment
from kdkernels.bench.timing import WallTimer
from kdkernels.ops.registry import Case, Spec

CASES = ("rkd_distance", "rkd_angle")
SMALLEST, LARGEST, FEATURES = 64, 8192, 512
SECONDS = 20.0  # a contender whose calls take longer goes no further
SHARE = 0.7  # of the free memory that a call may take


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def sizes(largest: int) -> list[int]:
    """64, 128, ... up to the largest."""
    n, found = SMALLEST, []
    while n <= largest:
        found.append(n)
        n *= 2
    return found


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The median of three calls after one that warms up, or that one where it took long."""
    timer = WallTimer(device)
    first = timer(call, 1)
    return first if first > 2.0 else statistics.median(timer(call, 1) for _ in range(3))


def _why_not(times: Sequence[float], peaks: Sequence[int], device: torch.device) -> str | None:
    """Why twice as many samples are too many, by what the last sizes took."""
    if times and times[-1] > SECONDS:
        return f"a call took {times[-1]:.0f} s"
    if len(peaks) > 1:
        expected = peaks[-1] * max(peaks[-1] / max(peaks[-2], 1), 1.0)
        if expected > SHARE * free_bytes(device):
            return f"would take about {expected / 2**30:.0f} GiB"
    return None


def _contender(
    row: runner.Row,
    contender: runner.Contender,
    sizes: Sequence[int],
    device: torch.device,
    step: Callable[[str], None],
) -> Iterator[Record]:
    times: list[float] = []
    peaks: list[int] = []
    for n in sizes:
        out: Record = {
            "case": row.case.name, "contender": contender.name, "n": n, "features": FEATURES, "status": "ok", "note": "",
            "ms": None, "peak_bytes": None,
        }  # fmt: skip
        if why := _why_not(times, peaks, device):
            yield out | {"status": "stopped", "note": why}
            return
        step(f"{row.case.name}, {contender.name}, {n} samples")
        inputs = make(row.case, (n, FEATURES), torch.float32, device)
        call = runner.calls(row.case, contender, inputs, "forward+backward")
        try:
            times.append(_seconds(call, device))
            peak = peak_bytes(call, device)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            yield out | {"status": "failed", "note": f"{type(error).__name__}: {error}".splitlines()[0]}
            return
        peaks.append(peak or 0)
        yield out | {"ms": times[-1] * 1e3, "peak_bytes": peak}


def run(
    chosen: Sequence[tuple[Spec, Case]],
    device: torch.device,
    backend: str | None,
    largest: int,
    step: Callable[[str], None],
) -> Iterator[Record]:
    """A record for each case, contender and N = 64, 128, ... of 512 features, loss and gradient in float32.

    Everybody is compared with float64 at the smallest size. A contender's last record says why it went no further.
    """
    for spec, case in chosen:
        row = runner.Row(spec, case, f"n{SMALLEST}", (SMALLEST, FEATURES), torch.float32)
        options = runner.Options(backend=backend, compile=False, peers=False)
        for contender in runner.contenders(row, device, options):
            if contender.status == "ok":
                yield from _contender(row, contender, sizes(largest), device, step)


def plot(path: Path, environment: Record, records: Sequence[Record]) -> None:
    """Time and memory against N, a row of two axes for each case."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(r["case"] for r in records))
    sizes = sorted({r["n"] for r in records})
    figure = Figure(figsize=(10, 1 + 3.6 * len(cases)), layout="constrained")
    for axes, case in zip(figure.subplots(len(cases), 2, squeeze=False), cases, strict=True):
        for name in dict.fromkeys(r["contender"] for r in records if r["case"] == case):
            mine = [r for r in records if (r["case"], r["contender"]) == (case, name)]
            good = [r for r in mine if r["status"] == "ok"]
            for axis, what, unit in zip(axes, ("ms", "peak_bytes"), (1.0, 2.0**20)):
                points = [(r["n"], r[what] / unit) for r in good if r[what]]
                if not points:
                    continue
                (drawn,) = axis.plot(*zip(*points), "o-", ms=4, label=name)
                if len(good) < len(mine):  # where it went no further, and why
                    axis.annotate(
                        f"  {mine[-1]['note'][:40]}", points[-1], color=drawn.get_color(), fontsize=7, va="bottom"
                    )
        for axis, title in zip(axes, ("time, ms", "peak memory, MiB")):
            axis.set(xscale="log", yscale="log", xlabel="samples", ylabel=title, title=f"{case}, {FEATURES} features")
            axis.set_xticks(sizes, [f"{n}" for n in sizes], minor=False)
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3, which="both")
            axis.legend(fontsize=8)
    figure.suptitle(f"loss and gradient: {describe_environment(environment)}", fontsize=8)
    figure.savefig(path, dpi=130)


def write(directory: Path, environment: Record, records: Sequence[Record]) -> list[Path]:
    """The records as JSON, and their plot."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = directory / f"{environment['date']}-scaling"
    write_json(stem.with_suffix(".json"), {"environment": environment, "scaling": list(records)})
    plot(stem.with_suffix(".png"), environment, records)
    return [stem.with_suffix(".json"), stem.with_suffix(".png")]
