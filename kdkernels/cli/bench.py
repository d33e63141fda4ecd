"""`kdkernels bench`: how fast every loss is here, against plain PyTorch, torch.compile and other libraries."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from pathlib import Path

import torch

from kdkernels import console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", help="only this kernel family, e.g. row_divergence")
    parser.add_argument("--case", default="*", help="only cases whose name matches this pattern")
    parser.add_argument("--shape", help="only shapes with these labels, comma-separated, e.g. cifar,llm-32k")
    parser.add_argument("--dtype", help="these instead of the case's own, comma-separated")
    parser.add_argument("--backend", help="only this backend of kdkernels")
    parser.add_argument("--device", help='"cpu", "cuda", ...; default: the GPU if there is one')
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for a row and mode (default 2)")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="begin no row after this long")
    parser.add_argument("--forward-only", action="store_true", help="the loss without gradients only")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes a while)")
    parser.add_argument("--no-peers", action="store_true", help="leave other libraries out")
    parser.add_argument("--no-startup", action="store_true", help="leave import time and first calls out")
    parser.add_argument(
        "--quick", action="store_true", help="a first impression: short turns, small shapes, no torch.compile"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="write result files into DIR/<device>/")
    parser.add_argument("--output-exactly", type=Path, metavar="DIR", help="write them into DIR itself")
    parser.add_argument("--format", default="json,csv,md", help="which files: json, csv, md, png (default json,csv,md)")
    parser.add_argument("--plot", action="store_true", help="also draw PNG plots")
    parser.add_argument("--scaling", nargs="?", const="", metavar="CASE,...", help="time and peak memory of these cases "
                        "(default: RKD's two) for 64, 128, ... samples, until plain PyTorch fails, with a plot")  # fmt: skip
    parser.add_argument(
        "--largest", type=int, default=8192, metavar="N", help="samples in --scaling (default %(default)s)"
    )
    parser.add_argument("--list", action="store_true", help="print the rows that would be timed, and stop")
    parser.add_argument("--static", nargs=argparse.REMAINDER, metavar="ARG", help="compile kernels for GPUs that are not "
                        "here and report registers, spills and load widths; further arguments are its own")  # fmt: skip
    parser.add_argument("--readme", action="store_true", help="write README's tables anew from the newest result files")


def _formats(args: argparse.Namespace) -> list[str]:
    from kdkernels.bench.results import FORMATS

    chosen = args.format.split(",") + (["png"] if args.plot else [])
    for name in chosen:
        if name not in FORMATS:
            raise console.UsageError(f"unknown format {name!r}: choose among {', '.join(FORMATS)}")
    if "png" in chosen:
        import matplotlib  # noqa: F401  (better said before an hour of timing than after)
    return list(dict.fromkeys(chosen))


def _scaling(args: argparse.Namespace) -> int:
    from kdkernels.bench import results, scaling, select
    from kdkernels.bench.environment import describe

    device = select.device(args.device) if args.device else select.default_device()
    if args.threads:
        torch.set_num_threads(args.threads)
    backend = select.backend(args.backend, device)
    names = args.scaling.split(",") if args.scaling else scaling.CASES
    chosen = [found for name in names for found in select.cases(None, name)]
    if not chosen:
        raise console.UsageError(f"no case is called {args.scaling}")
    directory = args.output_exactly or args.output
    if directory:
        import matplotlib  # noqa: F401  (better said before the timing than after)
    environment = describe(device)
    records = []
    with console.progress(2 * len(chosen) * len(scaling.sizes(args.largest))) as report:
        for record in scaling.run(chosen, device, backend, args.largest, report.step):
            records.append(record)
            report.advance()
    console.print_table(
        results.describe_environment(environment),
        ("case", "contender", "samples", "time", "peak memory", "note"),
        [(r["case"], r["contender"], f"{r['n']}", results.duration(r["ms"]), results.size(r["peak_bytes"]), r["note"])
         for r in records],
    )  # fmt: skip
    if directory:
        directory = args.output_exactly or directory / environment["slug"]
        for path in scaling.write(directory, environment, records):
            print(f"wrote {path}")
    return 0


def run(args: argparse.Namespace) -> int:
    """0: done; 1: a row failed its check; 2: nothing to do."""
    if args.static is not None:
        from kdkernels.bench import static

        return static.main(args.static) or 0
    if args.readme:
        from kdkernels.bench import readme

        return readme.main([])
    if args.scaling is not None:
        return _scaling(args)

    from kdkernels.bench import ceilings, results, runner, select, startup
    from kdkernels.bench.environment import describe

    formats = _formats(args)
    wanted = torch.device if args.list else select.device  # a list needs no GPU
    device = wanted(args.device) if args.device else select.default_device()
    if args.threads:
        torch.set_num_threads(args.threads)
    backend = None if args.list else select.backend(args.backend, device)
    labels = args.shape.split(",") if args.shape else None
    rows = runner.plan(
        select.cases(args.family, args.case),
        device,
        lambda own: select.dtypes(args.dtype, own),
        lambda label: labels is None or any(fnmatch.fnmatchcase(label, pattern) for pattern in labels),
    )
    if args.quick:
        smallest = {row.case.name: min(torch.Size(r.shape).numel() for r in rows if r.case is row.case) for row in rows}
        rows = [r for r in rows if torch.Size(r.shape).numel() <= max(smallest[r.case.name], 10**6)]
    if not rows:
        print("kdkernels bench: no case matches, or none of those has shapes to time", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(map(str, rows)))
        return 0
    options = runner.Options(
        seconds=min(args.seconds, 0.4) if args.quick else args.seconds, backend=backend,
        compile=not (args.no_compile or args.quick), peers=not args.no_peers, forward_only=args.forward_only,
    )  # fmt: skip
    environment = describe(device)
    directory = args.output_exactly or (args.output / environment["slug"] if args.output else None)
    if directory:
        planned: dict[str, set[tuple[str, tuple[int, ...], str]]] = {}
        for r in rows:
            planned.setdefault(r.spec.family, set()).add((r.case.name, tuple(r.shape), runner.dtype_name(r.dtype)))
        lost = results.would_lose(directory, environment["date"], planned)
        if lost:
            raise console.UsageError(lost)
    content = {
        "schema": results.SCHEMA,
        "environment": environment,
        "families": list(dict.fromkeys(r.spec.family for r in rows)),
        "ceilings": ceilings.bandwidth(device),
        "startup": {},
        "rows": [],
    }
    if environment["load"] is not None and environment["load"] > 0.5:
        print(f"other programs are running (load {environment['load']:.1f}): expect noise", file=sys.stderr)

    def save() -> list[Path]:
        return results.write(directory, content, formats) if directory else []

    with console.progress(len(rows) + 1) as report:
        for records in runner.run(rows, device, options, report.step, args.time_limit):
            content["rows"] += records
            report.advance()
            save()
        if not args.no_startup and not args.quick:
            report.step("start-up")
            content["startup"] = startup.measure(device)
        report.advance()
    title = f"{results.describe_environment(environment)}\n" + ", ".join(
        f"{k} {v:.4g}" for k, v in content["ceilings"].items()
    )
    results.print_records(content["rows"], title)
    for what, seconds in content["startup"].items():
        print(f"{what}: {seconds * 1e3:.1f} ms")
    for path in save():
        print(f"wrote {path}")
    return 1 if any(r["status"] == "failed" and r["contender"].startswith("kdkernels") for r in content["rows"]) else 0
