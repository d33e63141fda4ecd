"""What the experiments' tables have in common."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


def mean(values: Sequence[float], sign: str = "", digits: int = 1) -> str:
    """Mean and, of several, the standard deviation."""
    if len(values) == 1:
        return f"{values[0]:{sign}.{digits}f}"
    return f"{statistics.mean(values):{sign}.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def gains(found: Sequence[float], alone: Sequence[float]) -> list[float]:
    """Student by student, how much higher `found` is."""
    return [x - y for x, y in zip(found, alone, strict=True)]


def of_students(count: int) -> str:
    """What the cells of a table are, for its title."""
    return f"mean ± standard deviation of {count} students" if count > 1 else "one student"


@dataclass
class Comparison:
    """The same students without something and with it; nothing where there was no time for it.

    Attributes:
        kind: "loss" or "scheme", whose students have an accuracy in percent, or "text", whose have a perplexity.
        name: what is compared.
        other: with what.
        alone, found: student by student, without it and with it.
    """

    kind: str
    name: str
    other: str
    alone: list[float] = field(default_factory=list)
    found: list[float] = field(default_factory=list)

    @property
    def digits(self) -> int:
        """How many the table shows after the point."""
        return 2 if self.kind == "text" else 1

    @property
    def gains(self) -> list[float]:
        """Student by student, what is better: a higher accuracy, or a lower perplexity."""
        return gains(self.alone, self.found) if self.kind == "text" else gains(self.found, self.alone)

    def cells(self) -> tuple[str, str, str]:
        """Without, with, and the gain."""
        if not self.found:
            return "", "no time left", ""
        columns = (self.alone, ""), (self.found, ""), (self.gains, "+")
        without, with_it, gain = (mean(values, sign, self.digits) for values, sign in columns)
        return without, with_it, gain


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def speed(what: str, one: float, other: float) -> tuple[str, ...]:
    """A table's row of two times in seconds, and how many times longer the first is."""
    return what, _time(one), _time(other), f"{one / other:.2f}x"
