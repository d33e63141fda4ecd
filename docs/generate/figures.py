"""Every figure on the site, from the committed files in bench/results: tables of costs, and plots as inline SVG.

No number is typed into a page. A page says `{{ cost kl_div 256x32000 }}` and the build puts what was measured there.
"""

from __future__ import annotations

import functools
import html
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kdkernels.bench.readme import NATIVE, result_files, verified
from kdkernels.bench.results import duration, ratio, size
from kdkernels.console import markdown_table
from kdkernels.ops.registry import Case, Spec, specs

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
NOT_YET = "not measured yet"
Record = dict[str, Any]


@functools.cache
def files() -> list[Record]:
    return result_files(RESULTS)


@functools.cache
def newest() -> dict[tuple[str, str], Record]:
    """(device, family) -> the newest result file's content."""
    return {(f["environment"]["slug"], family): f for f in files() for family in f.get("families", ())}


def _pairs(content: Record) -> list[tuple[Record, Record | None]]:
    """(our fastest backend's row, eager's) of every case, shape and dtype that loss and gradient were timed for."""
    timed = [r for r in content["rows"] if r["mode"] != "forward" and r["label"] != "tiny" and r["status"] == "ok"]
    found = []
    for key in dict.fromkeys((r["case"], tuple(r["shape"]), r["dtype"]) for r in timed):
        rows = [r for r in timed if (r["case"], tuple(r["shape"]), r["dtype"]) == key]
        ours = [r for r in rows if r["contender"].startswith("kdkernels[")]
        eager = next((r for r in rows if r["contender"] == "eager"), None)
        if ours:
            found.append((min(ours, key=lambda r: r["ms"]), eager))
    return found


def _shape(row: Record, cross: str = " × ") -> str:
    return cross.join(map(str, row["shape"]))


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}×" if value < 100 else f"{value:.0f}×"


def _measured(case_names: set[str]) -> list[tuple[Record, Record, Record | None]]:
    """(environment, ours, eager's) of these cases in the newest file of each device and family."""
    found = []
    for content in newest().values():
        for ours, eager in _pairs(content):
            if ours["case"] in case_names:
                found.append((content["environment"], ours, eager))
    return found


def _cases(function: Callable[..., Any]) -> list[Case]:
    return [c for s in specs() for c in s.cases if c.function is function]


def cost_table(function: Callable[..., Any]) -> str:
    """What a loss and its gradient took, on every device that has a result file."""
    measured = _measured({c.name for c in _cases(function)})
    if not measured:
        return (
            "Not measured yet: no result file in `bench/results` has it. `kdkernels bench` measures on your machine.\n"
        )
    rows = [
        [f"`{ours['case']}`", _shape(ours), ours["dtype"], about["device"], ours["contender"][10:-1], duration(ours["ms"]),
         _times(ratio(ours, "eager")), size(ours["extra_bytes"]), size(eager["extra_bytes"]) if eager else ""]
        for about, ours, eager in measured
    ]  # fmt: skip
    columns = ("case", "shape", "dtype", "device", "backend", "time", "eager takes", "extra memory", "eager's")
    dates = ", ".join(sorted({about["date"] for about, _, _ in measured}))
    return (
        markdown_table(columns, rows)
        + f"\nLoss and gradient together, measured {dates}; extra memory is the peak during the call beyond inputs and "
        "gradients, in tensors. How: [benchmarks](../benchmarks.md).\n"
    )


def one_cost(ours: Record, eager: Record | None) -> str:
    taken = ratio(ours, "eager")
    text = duration(ours["ms"]) + (f", eager {_times(taken)} as long" if taken else "")
    if ours["extra_bytes"] is not None and eager and eager["extra_bytes"] is not None:
        text += f"; {size(ours['extra_bytes'])} extra memory, eager {size(eager['extra_bytes'])}"
    return text


def cost(case: str, shape: str, dtype: str = "float32") -> str:
    """What `{{ cost CASE SHAPE [DTYPE] }}` becomes.

    Raises:
        ValueError: the registry has no such case.
    """
    if not any(c.name == case for s in specs() for c in s.cases):
        raise ValueError(f"a page asks for the cost of {case!r}, and no spec.py has that case")
    for _, ours, eager in _measured({case}):
        if _shape(ours, "x") == shape and ours["dtype"] == dtype:
            return one_cost(ours, eager)
    return NOT_YET


def headline_cost(function: Callable[..., Any]) -> str:
    """The largest shape in float32 of a loss's first measured case."""
    measured = [m for m in _measured({c.name for c in _cases(function)}) if m[1]["dtype"] == "float32"]
    if not measured:
        return NOT_YET
    _, ours, eager = max(measured, key=lambda m: (m[1]["case"] == measured[0][1]["case"], math.prod(m[1]["shape"])))
    return f"{_shape(ours)}: {one_cost(ours, eager)}"


def verified_table(function: Callable[..., Any], spec: Spec | None) -> str:
    """The backends of a loss, and where each was last compared with float64."""
    if spec is None:
        return "Plain PyTorch on every device; `backend=` chooses kernels only where it calls another loss that has them.\n"
    when, names = verified(files()), {c.name for c in _cases(function)}
    rows = []
    for backend, title in NATIVE.items():
        places = [place for (case, b), place in when.items() if case in names and b == backend]
        if backend not in spec.backends:
            said = "none: " + ("the reference runs there" if backend == "cpu" else "another backend runs it")
        elif not places:
            said = "built and tested without a GPU; not yet run on one" if backend != "cpu" else "not yet"
        else:
            wrong = [p for p in places if p.startswith("**")]
            said = f"missed the accuracy bar: {wrong[-1]}" if wrong else f"within the accuracy bar on {max(places)}"
        rows.append([title, said])
    return markdown_table(("backend", "verified"), [*rows, ["reference", "plain PyTorch, any device and float64"]])


def failures() -> str:
    """What the newest check of each device found outside the bar, or that it found nothing."""
    lines = []
    checks = {f["environment"]["slug"]: f for f in files() if "results" in f}
    for content in checks.values():
        about, results = content["environment"], content["results"]
        wrong = [r for r in results if not r["passed"]]
        lines.append(
            f"On {about['device']}, {about['date']}, {len(results) - len(wrong)} of {len(results)} outputs were within the bar."
        )
        lines += [f"Outside: `{r['case']}` on {r['backend']}, {r['dtype']}, {r['output']}." for r in wrong]
    return " ".join(lines) if lines else "No result file of `kdkernels check` is committed yet."


def slower() -> str:
    """The measured rows in which eager PyTorch was the faster one."""
    found = []
    for content in newest().values():
        for ours, _ in _pairs(content):
            taken = ratio(ours, "eager")
            if taken is not None and taken < 1:
                found.append(f"`{ours['case']}` at {_shape(ours)} in {ours['dtype']} (eager {taken:.2f}× as long)")
    return ", ".join(found) if found else "none"


# ---- the benchmark page ----


def environments() -> str:
    """Devices, dates and versions of what is shown, in words."""
    lines = []
    for slug in dict.fromkeys(s for s, _ in newest()):
        mine = [f["environment"] for (s, _), f in newest().items() if s == slug]
        about = mine[-1]
        dates = sorted({e["date"] for e in mine})
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        lines.append(
            f"- **{about['device']}**, {when}: {about['system']}, torch {about['torch']}, "
            f"{about['threads']} threads, kernels {about.get('cpu_target') or 'none'}"
        )
    gpus = [e for e in (f["environment"] for f in newest().values()) if e["device_type"] != "cpu"]
    if not gpus:
        lines.append(
            "- **No GPU.** CUDA C++ and Triton kernels have not run on one yet, so nothing here is about GPUs."
        )
    return "\n".join(lines) + "\n"


def family_tables() -> str:
    out = []
    for (_, family), content in sorted(newest().items(), key=lambda item: item[0]):
        rows = [
            [f"`{ours['case']}`", _shape(ours), ours["dtype"], duration(ours["ms"]), _spread(ours), _share(ours),
             size(ours["extra_bytes"]), size(eager["extra_bytes"]) if eager else ""]
            for ours, eager in _pairs(content)
        ]  # fmt: skip
        about = content["environment"]
        columns = ("case", "shape", "dtype", "time", "eager takes", "of floor", "extra memory", "eager's")
        out.append(f"### {family}\n\n{about['device']}, {about['date']}\n\n{markdown_table(columns, rows)}")
    return "\n".join(out)


def _spread(ours: Record) -> str:
    spread = ours["speedup_over"].get("eager")
    return f"{_times(spread[1])} ({spread[0]:.3g} to {spread[2]:.3g})" if spread else ""


def _share(ours: Record) -> str:
    share = ratio(ours, "floor")
    return "" if share is None else f"{share:.0%}"


def _svg(width: int, height: int, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{html.escape(text)}</text>'


class _LogAxis:
    """A logarithmic axis from x0 to x1 with a tick at 1, 2, 5, 10, ... or each power of ten."""

    def __init__(self, values: Sequence[float], x0: float, x1: float):
        self.low, self.high = math.log10(min(values)), math.log10(max(values) * 1.08)
        self.x0, self.x1 = x0, x1

    def __call__(self, value: float) -> float:
        return self.x0 + (math.log10(value) - self.low) / (self.high - self.low) * (self.x1 - self.x0)

    def ticks(self, base: float = 10.0) -> list[float]:
        if base != 10.0:
            found = [base**e for e in range(40)]
            return [t for t in found if self.low <= math.log10(t) <= self.high]
        steps = (1, 2, 5) if self.high - self.low < 3.2 else (1,)
        found = [s * 10.0**e for e in range(math.floor(self.low), math.ceil(self.high) + 1) for s in steps]
        return [t for t in found if self.low - 1e-9 <= math.log10(t) <= self.high]


def _rows_plot(rows: list[tuple[str, Record, Record | None]], what: str) -> str:
    """A line a row: a bar from 1 to the ratio over eager with its quartiles, or two dots of extra memory."""
    top, step, left, width = 34, 17, 330, 860
    height = top + step * len(rows) + 8
    if what == "speed":
        values = [v for _, ours, _ in rows for v in ours["speedup_over"]["eager"]]
        axis = _LogAxis([1.0 / 1.3, *values], left, width - 56)
        label = "how many times longer eager PyTorch takes"
    else:
        values = [float(max(r["extra_bytes"], 1)) for _, ours, eager in rows for r in (ours, eager) if r]
        axis = _LogAxis([min(values) / 2, *values], left, width - 56)
        label = "extra memory during the call: filled ours, open eager"
    parts = [_text(left, 12, label, kind="title")]
    for t in axis.ticks(10.0 if what == "speed" else 32.0):
        x = axis(t)
        shown = f"{t:g}×" if what == "speed" else size(round(t))
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{height - 6}" class="grid"/>')
        parts.append(_text(x, top - 9, shown, "middle", "tick"))
    for i, (name, ours, eager) in enumerate(rows):
        y = top + step * i + step / 2
        parts.append(_text(left - 8, y + 4, name, "end"))
        if what == "speed":
            low, median, high = ours["speedup_over"]["eager"]
            x0, x1 = sorted((axis(1.0), axis(median)))
            slow = " slow" if median < 1 else ""
            parts.append(
                f'<rect x="{x0:.1f}" y="{y - 5:.1f}" width="{max(x1 - x0, 1):.1f}" height="10" class="bar{slow}"/>'
            )
            parts.append(f'<line x1="{axis(low):.1f}" x2="{axis(high):.1f}" y1="{y:.1f}" y2="{y:.1f}" class="spread"/>')
            parts.append(_text(max(axis(1.0), axis(high)) + 5, y + 4, _times(median), kind="tick"))
        elif eager is not None:
            a, b = axis(max(ours["extra_bytes"], 1)), axis(max(eager["extra_bytes"], 1))
            parts.append(f'<line x1="{a:.1f}" x2="{b:.1f}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            parts.append(f'<circle cx="{a:.1f}" cy="{y:.1f}" r="4" class="dot"/>')
            parts.append(f'<circle cx="{b:.1f}" cy="{y:.1f}" r="4" class="ring"/>')
    if what == "speed":
        parts.append(f'<line x1="{axis(1.0):.1f}" x2="{axis(1.0):.1f}" y1="{top - 6}" y2="{height - 6}" class="one"/>')
    return _svg(width, height, parts, label)


def plots(what: str) -> str:
    """One plot for each device: "speed" over eager, or extra "memory", of every float32 row."""
    out = []
    for slug in dict.fromkeys(s for s, _ in newest()):
        rows, about = [], {}
        for (s, _), content in sorted(newest().items()):
            if s != slug:
                continue
            about = content["environment"]
            for ours, eager in _pairs(content):
                complete = "eager" in ours["speedup_over"] if what == "speed" else ours["extra_bytes"] is not None
                if eager and complete and ours["dtype"] == "float32" and (what == "speed" or eager["extra_bytes"]):
                    rows.append((f"{ours['case']}  {_shape(ours)}", ours, eager))
        if rows:
            words = f"Float32, loss and gradient, on {about['device']}, {about['date']}."
            out.append(f'<figure class="wide">{_rows_plot(rows, what)}<figcaption>{words}</figcaption></figure>\n')
    return "\n".join(out)


def scaling() -> str:
    """Time against the number of samples, where a result file has it."""
    found = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*/*-scaling.json"))]
    if not found:
        return "No scaling run is committed yet: `kdkernels bench --scaling` makes one.\n"
    content = found[-1]
    good = [r for r in content["scaling"] if r["status"] == "ok" and r["ms"]]
    out = []
    for case in dict.fromkeys(r["case"] for r in good):
        mine = [r for r in good if r["case"] == case]
        x = _LogAxis([r["n"] for r in mine], 70, 620)
        y = _LogAxis([r["ms"] for r in mine], 260, 30)
        parts = [_text(70, 14, f"{case}: time in ms against samples of {mine[0]['features']} features", kind="title")]
        for t in sorted({r["n"] for r in mine}):
            parts.append(f'<line x1="{x(t):.1f}" x2="{x(t):.1f}" y1="30" y2="260" class="grid"/>')
            parts.append(_text(x(t), 276, f"{t}", "middle", "tick"))
        for t in y.ticks():
            parts.append(f'<line x1="70" x2="620" y1="{y(t):.1f}" y2="{y(t):.1f}" class="grid"/>')
            parts.append(_text(64, y(t) + 4, f"{t:g}", "end", "tick"))
        for name in dict.fromkeys(r["contender"] for r in mine):
            points = [(x(r["n"]), y(r["ms"])) for r in mine if r["contender"] == name]
            kind = "ours" if name.startswith("kdkernels") else "theirs"
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            parts.append(f'<polyline points="{path}" class="{kind}"/>')
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" class="{kind}"/>' for a, b in points]
            parts.append(_text(points[-1][0] + 6, points[-1][1] + 4, name))
        out.append(f'<figure class="wide">{_svg(760, 284, parts, f"{case} against samples")}</figure>\n')
    about = content["environment"]
    return "\n".join(out) + f"\nLoss and gradient in float32 on {about['device']}, {about['date']}.\n"


# ---- what a page can ask for ----


def drawing(name: str) -> str:
    """A drawing of docs/drawings, inline, so that it takes the page's colours."""
    text = (ROOT / "docs" / "drawings" / f"{name}.svg").read_text()
    return f'<figure class="wide">{re.sub(r"<[?!].*?>", "", text).strip()}</figure>\n'


ASK = {
    "cost": cost, "environments": environments, "family_tables": family_tables, "plots": plots, "scaling": scaling,
    "drawing": drawing, "failures": failures, "slower": slower,
}  # fmt: skip


def filled(markdown: str) -> str:
    """Markdown with what stands in double braces put in.

    Raises:
        ValueError: it asks for something that is not there.
    """

    def answer(match: re.Match[str]) -> str:
        what, *arguments = match[1].split()
        if what not in ASK:
            raise ValueError(f"a page asks for {what!r}; there is {', '.join(ASK)}")
        return ASK[what](*arguments)  # type: ignore[operator]

    return re.sub(r"\{\{ (.+?) \}\}", answer, markdown)
