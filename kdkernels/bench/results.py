"""Result files: JSON for machines, CSV and a markdown table for people, plots."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdkernels.bench.environment import write_json
from kdkernels.console import markdown_table, print_table, without_empty

SCHEMA = 1
FORMATS = ("json", "csv", "md", "png")
Record = dict[str, Any]
CSV_COLUMNS = (
    "family", "case", "label", "shape", "dtype", "mode", "contender", "status", "ms", "gbs", "x_eager", "x_compile",
    "x_floor", "peak_bytes", "extra_bytes", "error_over_bar", "first_call_ms", "rounds", "note",
)  # fmt: skip
COLUMNS = (
    "case",
    "shape",
    "dtype",
    "what",
    "contender",
    "time",
    "x eager",
    "x compile",
    "GB/s",
    "of floor",
    "extra memory",
    "note",
)


def duration(ms: float | None) -> str:
    if ms is None:
        return ""
    return f"{ms:.3g} ms" if ms >= 1 else f"{ms * 1e3:.3g} us"


def size(nbytes: int | None) -> str:
    if nbytes is None:
        return ""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{nbytes} B"
        nbytes /= 1024  # type: ignore[assignment]
    return f"{nbytes:.3g} GiB"


def times(spread: Sequence[float] | None) -> str:
    """A ratio with its quartiles."""
    if not spread:
        return ""
    low, median, high = spread
    return f"{median:.2f} ({low:.2f}-{high:.2f})" if median < 100 else f"{median:.0f} ({low:.0f}-{high:.0f})"


def ratio(record: Record, over: str) -> float | None:
    spread = record.get("speedup_over", {}).get(over)
    return spread[1] if spread else None


def line(record: Record) -> list[str]:
    """One record as cells of COLUMNS."""
    what = "forward" if record["mode"] == "forward" else "fwd + bwd"
    share = ratio(record, "floor")
    if record["status"] != "ok":
        note = f"{record['status']}: {record['note']}" if record["note"] else record["status"]
    else:
        note = record["note"]
    return [
        record["case"], "x".join(map(str, record["shape"])), record["dtype"], what, record["contender"],
        duration(record["ms"]) + (f" ({duration(record['wall_ms'])} wall)" if record["device"] == "cuda" else ""),
        times(record["speedup_over"].get("eager")) if record["contender"] != "eager" else "1",
        times(record["speedup_over"].get("compile")) if record["contender"] != "compile" else "1",
        "" if record["gbs"] is None else f"{record['gbs']:.3g}",
        "" if share is None else f"{share:.0%}",
        size(record["extra_bytes"]),
        note,
    ]  # fmt: skip


def shown(records: list[Record]) -> list[Record]:
    return [r for r in records if r["contender"] != "floor" and r["status"] != "absent"]


def absent(records: list[Record]) -> str:
    """One line about the libraries that were not there."""
    reasons = dict.fromkeys((r["contender"], r["note"]) for r in records if r["status"] == "absent")
    return "Not measured: " + ", ".join(f"{name} ({why})" for name, why in reasons) + "." if reasons else ""


def print_records(records: list[Record], title: str) -> None:
    rows = shown(records)
    print_table(title, *without_empty(COLUMNS, [line(r) for r in rows]), [r["status"] == "failed" for r in rows])
    if missing := absent(records):
        print(missing)


def describe_environment(environment: Record) -> str:
    """One line: device, date, versions."""
    parts = [environment["device"], environment["date"], f"torch {environment['torch']}"]
    parts += [f"{k} {environment[k]}" for k in ("triton", "driver", "nvcc") if environment.get(k)]
    if environment["device_type"] == "cpu":
        threads = environment["threads"]
        parts.append(f"{threads} thread{'s' if threads > 1 else ''}")
    parts += [f"commit {environment['commit']}"] if environment.get("commit") else []
    return ", ".join(parts)


def markdown(content: Record) -> str:
    ceilings = ", ".join(f"{k} {v:.4g}" for k, v in content["ceilings"].items())
    lines = [f"# {', '.join(content['families'])}", "", describe_environment(content["environment"]), "", ceilings, ""]
    lines += [markdown_table(COLUMNS, [line(r) for r in shown(content["rows"])]), absent(content["rows"]), ""]
    if content["startup"]:
        lines.append(markdown_table(("start-up", "seconds"), [[k, f"{v:.3f}"] for k, v in content["startup"].items()]))
    return "\n".join(lines)


def write_csv(path: Path, records: list[Record]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for r in records:
            extra = {f"x_{over}": ratio(r, over) for over in ("eager", "compile", "floor")}
            writer.writerow({**r, **extra, "shape": "x".join(map(str, r["shape"]))})


def would_lose(directory: Path, date: str, planned: Mapping[str, set[tuple[str, tuple[int, ...], str]]]) -> str | None:
    """Which file holds rows that a run of these (case, shape, dtype) of each family would put nothing in the place of."""
    for family, rows in planned.items():
        path = directory / f"{date}-{family}.json"
        if not path.exists():
            continue
        there = {(r["case"], tuple(r["shape"]), r["dtype"]) for r in json.loads(path.read_text())["rows"]}
        if there - rows:
            return (
                f"{path} holds {len(there - rows)} rows that this run does not time: move it, or give another --output"
            )
    return None


def write(directory: Path, content: Record, formats: Sequence[str]) -> list[Path]:
    """Writes what a run has so far, a set of files for each family; returns their paths."""
    written = []
    for family in content["families"]:
        rows = [r for r in content["rows"] if r["family"] == family]
        if not rows:
            continue
        part = {**content, "families": [family], "rows": rows}
        stem = directory / f"{content['environment']['date']}-{family}"
        directory.mkdir(parents=True, exist_ok=True)
        for suffix in formats:
            path = stem.with_suffix(f".{suffix}")
            if suffix == "json":
                write_json(path, part)
            elif suffix == "csv":
                write_csv(path, rows)
            elif suffix == "md":
                path.write_text(markdown(part))
            elif suffix == "png":
                from kdkernels.bench.plots import plot

                plot(path, part)
            written.append(path)
    return written
