"""Writes README's tables of losses and of benchmark figures from the registry and the committed result files.

kdkernels bench --readme; python -m kdkernels.bench.readme --check says whether they are up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdkernels.bench.results import describe_environment, duration, ratio, size
from kdkernels.console import markdown_table, without_empty
from kdkernels.losses.module import LossModule
from kdkernels.ops.registry import Spec, specs

ROOT = Path(__file__).resolve().parents[2]
NATIVE = {"cpu": "CPU C++", "cuda": "CUDA C++", "triton": "Triton"}


def result_files(results: Path) -> list[dict[str, Any]]:
    """The contents of every result file, oldest first."""
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*/*.json"))]
    found = [c for c in found if c.get("schema") == 1 and ("rows" in c or "results" in c)]
    return sorted(found, key=lambda c: c["environment"]["date"])


def by_losses() -> list[Spec]:
    """The families, those with the most losses first: what most readers look for."""
    return sorted(specs(), key=lambda spec: -len({case.function for case in spec.cases}))


def _runs(content: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """(case, backend, right or not) of everything that a result file compared with float64."""
    for r in content.get("results", ()):
        yield r["case"], r["backend"], r["passed"]
    for r in content.get("rows", ()):
        if match := re.fullmatch(r"kdkernels\[(\w+)\]", r["contender"]):
            yield r["case"], match[1], r["status"] == "ok"


def verified(files: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """(case, backend) -> where and when it was last right."""
    found: dict[tuple[str, str], str] = {}
    for content in files:
        about = content["environment"]
        together: dict[tuple[str, str], bool] = {}
        for case, backend, right in _runs(content):
            together[case, backend] = together.get((case, backend), True) and right
        for (case, backend), right in together.items():
            interpreted = backend == "triton" and about.get("triton_interpreter")
            where = "Triton's interpreter" if interpreted else about["device"].partition(",")[0]
            place = f"{where}, {about['date']}"
            wrong = f"**wrong** on {place}"
            # One right file does not excuse another of the same day.
            found[case, backend] = place if right and found.get((case, backend)) != wrong else wrong
    return found


def losses_table(files: list[dict[str, Any]]) -> str:
    """Every public loss with the backends that it has and where each was last verified."""
    modules = {m.__dict__["function"].__func__: m.__name__ for m in LossModule.__subclasses__()}
    when = verified(files)
    rows = []
    for spec in by_losses():
        for function in dict.fromkeys(c.function for c in spec.cases):
            names = [c.name for c in spec.cases if c.function is function]
            cells = []
            for backend in NATIVE:
                places = [when[n, backend] for n in names if (n, backend) in when]
                wrong = [p for p in places if p.startswith("**")]
                missing = (
                    "no" if backend not in spec.backends else "not yet run on a GPU" if backend != "cpu" else "not yet"
                )
                cells.append(
                    wrong[-1] if wrong else max(places, key=lambda p: p.rpartition(", ")[2]) if places else missing
                )
            module = f", `{modules[function]}`" if function in modules else ""
            rows.append([f"`{function.__name__}`{module}", f"`{spec.family}`", *cells])
    return markdown_table(("loss", "kernel family", *NATIVE.values()), rows)


def _best(records: list[dict[str, Any]], prefix: str) -> dict[str, Any] | None:
    right = [r for r in records if r["status"] == "ok" and r["contender"].startswith(prefix)]
    return min(right, key=lambda r: r["ms"]) if right else None


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}x" if value < 100 else f"{value:.0f}x"


def bench_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Loss and gradient of the headline cases: the fastest backend against the others."""
    timed = [r for r in rows if r["headline"] and r["mode"] != "forward" and r["label"] != "tiny"]
    table = []
    for key in dict.fromkeys((r["case"], tuple(r["shape"]), r["dtype"]) for r in timed):
        records = [r for r in timed if (r["case"], tuple(r["shape"]), r["dtype"]) == key]
        ours = _best(records, "kdkernels[")
        if ours is None:
            continue
        eager = _best(records, "eager")
        theirs = [r for r in records if r["status"] == "ok" and not r["contender"].startswith("kdkernels[")]
        theirs = [r for r in theirs if r["contender"] not in ("eager", "compile", "floor")]
        peer = min(theirs, key=lambda r: r["ms"]) if theirs else None
        share = ratio(ours, "floor")
        table.append([
            f"`{key[0]}`", " x ".join(map(str, key[1])), key[2], ours["contender"][len("kdkernels[") : -1],
            duration(ours["ms"]), _times(ratio(ours, "eager")), _times(ratio(ours, "compile")),
            f"{_times(ratio(ours, peer['contender']))} ({peer['contender']})" if peer else "",
            "" if share is None else f"{share:.0%}",
            size(ours["extra_bytes"]) + (f" ({size(eager['extra_bytes'])})" if eager else ""),
        ])  # fmt: skip
    return table


def measured_on(contents: list[dict[str, Any]]) -> str:
    """One line about files of one device, with all of their dates and commits."""
    about = contents[-1]["environment"]
    several = {key: sorted({c["environment"].get(key) or "unknown" for c in contents}) for key in ("date", "commit")}
    return describe_environment({**about, **{key: ", ".join(values) for key, values in several.items()}})


def bench_table(files: list[dict[str, Any]]) -> str:
    """The newest results of every device, without the columns that none of its rows has."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for content in files:
        for family in content.get("families", ()):
            newest[content["environment"]["slug"], family] = content
    order = [spec.family for spec in by_losses()]
    parts = []
    for slug in dict.fromkeys(s for s, _ in newest):
        contents = [newest[slug, family] for family in order if (slug, family) in newest]
        rows = [r for c in contents for r in bench_rows(c["rows"])]
        if not rows:
            continue
        columns = ("loss", "shape", "dtype", "backend", "time", "over eager", "over torch.compile", "over the best peer",
                   "of the bandwidth floor", "extra memory (eager)")  # fmt: skip
        parts.append(f"{measured_on(contents)}:\n\n{markdown_table(*without_empty(columns, rows))}")
    if not parts:
        return "No result file is committed yet.\n"
    return (
        "Loss and gradient, whole operation; medians of paired, interleaved rounds. The floor is the time in which the same\n"
        "run moved the least bytes that the loss needs (a three-tensor add on a CPU, a copy on a GPU).\n\n"
        + "\n".join(parts)
    )


def between(text: str, name: str, content: str) -> str:
    """`text` with what stands between <!-- name:begin --> and <!-- name:end --> replaced.

    Raises:
        ValueError: the markers are not there.
    """
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"there is no <!-- {name}:begin --> ... <!-- {name}:end -->")
    return pattern.sub(lambda m: m[1] + content.strip() + "\n" + m[2], text)


def main(argv: list[str] | None = None) -> int:
    """0: written or up to date; 1: out of date (--check); 2: no such file or markers."""
    parser = argparse.ArgumentParser("kdkernels bench --readme", description="Write README's tables anew.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where README is out of date")
    parser.add_argument("--file", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args(argv)
    files = result_files(args.results)
    try:
        old = args.file.read_text()
        new = between(between(old, "losses", losses_table(files)), "bench", bench_table(files))
    except (OSError, ValueError) as error:
        print(f"kdkernels bench --readme: {args.file}: {error}", file=sys.stderr)
        return 2
    if new == old:
        return 0
    if args.check:
        print(f"{args.file.name} is out of date: kdkernels bench --readme", file=sys.stderr)
        return 1
    args.file.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
