"""Tables and progress on a terminal: with rich where it is installed, in plain text otherwise."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol

try:
    import rich.console
    import rich.markup
    import rich.progress
    import rich.table
except ImportError:
    rich = None  # type: ignore[assignment]


class UsageError(ValueError):
    """An argument that a command cannot work with; said in one line, without a traceback."""


def without_empty(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The same table less the columns in which no row has anything."""
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    return [columns[i] for i in used], [[row[i] for i in used] for row in rows]


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded with spaces."""
    widths = [max(map(len, column)) for column in zip(columns, *rows)] if rows else [len(c) for c in columns]
    lines = [columns, ["-" * w for w in widths], *rows]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], bad: Sequence[bool] = ()) -> None:
    """Prints a table to stdout; rows flagged in `bad` are red."""
    if rich is None or not sys.stdout.isatty():
        print(f"{title}\n{plain_table(columns, rows)}\n")
        return
    table = rich.table.Table(*columns, title=title, title_justify="left", title_style="bold")
    for i, row in enumerate(rows):
        table.add_row(*map(rich.markup.escape, row), style="red" if i < len(bad) and bad[i] else None)
    rich.console.Console().print(table)


class Reporter(Protocol):
    """What a long run tells about itself."""

    def step(self, what: str) -> None:
        """Says what is being done now."""

    def advance(self) -> None:
        """One part of the total is finished."""


class _Lines:
    def __init__(self, total: int):
        self.total, self.done = total, 0

    def step(self, what: str) -> None:
        print(f"[{self.done + 1}/{self.total}] {what}", file=sys.stderr, flush=True)

    def advance(self) -> None:
        self.done += 1


class _Quiet(_Lines):
    def step(self, what: str) -> None:
        pass


class _Bar:
    def __init__(self, bar: rich.progress.Progress, total: int):
        self.bar, self.task = bar, bar.add_task("", total=total)

    def step(self, what: str) -> None:
        self.bar.update(self.task, description=what)

    def advance(self) -> None:
        self.bar.advance(self.task)


@contextlib.contextmanager
def progress(total: int, lines: bool = True) -> Iterator[Reporter]:
    """A progress bar on stderr; where stderr is no terminal, a line a step if `lines`, else nothing."""
    if rich is None or not sys.stderr.isatty():
        yield _Lines(total) if lines else _Quiet(total)
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), transient=True) as bar:
        yield _Bar(bar, total)
