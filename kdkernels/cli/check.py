"""`kdkernels check`: every kernel on this machine against float64."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from kdkernels import backends, console
from kdkernels.bench import accuracy, select
from kdkernels.bench.accuracy import Result
from kdkernels.bench.environment import describe, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", help="only this one, and fail where it is not available")
    parser.add_argument("--family", help="only this kernel family, e.g. row_divergence")
    parser.add_argument("--case", default="*", help="only cases whose name matches this pattern")
    parser.add_argument("--dtype", help="only these, comma-separated")
    parser.add_argument("--device", help='"cpu", "cuda", ...; default: every kind that is here')
    parser.add_argument("--small", action="store_true", help="few small shapes, for compute-sanitizer and emulators")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the worst comparisons to FILE (--verbose: all)"
    )
    parser.add_argument("--verbose", action="store_true", help="one line for every shape and output")


def run(args: argparse.Namespace) -> int:
    """0: all passed; 1: something is over the bar; 2: nothing could be checked."""
    devices = [select.device(args.device)] if args.device else select.devices()
    plan, reasons = [], []
    for device in devices:
        for spec, case in select.cases(args.family, args.case):
            names = accuracy.available(spec, device, args.backend)
            if not names:
                reasons.append(backends.unavailable(args.backend, device.type) or "" if args.backend else "")
                continue
            for shape in accuracy.shapes_of(case, device.type == "cuda", args.small):
                plan.append((spec, case, shape, select.dtypes(args.dtype, spec.dtypes), names, device))
    if not plan:
        why = next(filter(None, reasons), "no case matches")
        print(f"kdkernels check: nothing to check: {why}", file=sys.stderr)
        return 2

    results: list[Result] = []
    with console.progress(len(plan), lines=False) as report:
        for spec, case, shape, dtypes, names, device in plan:
            report.step(f"{case.name} {shape}")
            # On a CPU, where the arithmetic under test does not also make the answer.
            seeds = 1 if args.small else 2
            results += accuracy.check(spec, case, shape, dtypes, names, device, torch.device("cpu"), seeds)
            report.advance()

    if args.verbose:
        _print(results)
    _print(_worst(results))
    failed = [r for r in results if not r.passed]
    for r in failed[:10]:
        print(
            f"FAILED {r.case} {r.shape} {r.dtype} on {r.backend}, {r.output}: {r.note or f'{r.error:.3g} > {r.bar:.3g}'}"
        )
    print(f"{len(results) - len(failed)} of {len(results)} outputs are within the bar: "
          "twice the error of float32 PyTorch, plus one rounding")  # fmt: skip
    if args.json:
        listed = results if args.verbose else _worst(results, per_output=True)
        content = {"schema": 1, "environment": describe(devices[-1]), "compared": len(results), "failed": len(failed)}
        write_json(args.json, {**content, "results": [r.record() for r in listed]})
    return 1 if failed else 0


def _worst(results: list[Result], per_output: bool = False) -> list[Result]:
    """Per case, backend and dtype the comparison nearest to the bar, or over it."""
    worst: dict[tuple[str, ...], Result] = {}
    for r in results:
        key = r.case, r.device, r.backend, r.dtype, r.output if per_output else ""
        if key not in worst or (not r.passed, r.ratio) > (not worst[key].passed, worst[key].ratio):
            worst[key] = r
    return list(worst.values())


def _print(results: list[Result]) -> None:
    columns = ("case", "device", "backend", "dtype", "worst output", "shape", "error", "bar", "error/bar", "")
    rows = [
        (r.case, r.device, r.backend, r.dtype, r.output, str(r.shape), f"{r.error:.2e}", f"{r.bar:.2e}", f"{r.ratio:.2f}",
         "ok" if r.passed else "FAILED")
        for r in results
    ]  # fmt: skip
    console.print_table("kernels against float64", columns, rows, [not r.passed for r in results])
