"""Paired timing: contenders take turns in every round, and ratios are taken within a round.

Noise that lasts longer than a round (another process, a clock that changes) hits all contenders of
that round alike and cancels in the ratio; what does not cancel shows in the quartiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Call = Callable[[], Any]


class Timer(Protocol):
    """Seconds a call takes, over `repeats` calls in a row."""

    def __call__(self, call: Call, repeats: int) -> float: ...


class WallTimer:
    """Host time; on a GPU up to the end of the last call's work, so launches count and overlap as they do in training."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, call: Call, repeats: int) -> float:
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if gpu:
            torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / repeats


class EventTimer:
    """Device time between events, with the L2 cache overwritten before every call."""

    def __init__(self, device: torch.device):
        l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self.flush = torch.empty(max(4 * l2, 256 * 2**20) // 4, dtype=torch.int32, device=device)
        self.device = device

    def __call__(self, call: Call, repeats: int) -> float:
        with torch.cuda.device(self.device):
            events = [
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
            ]
            for start, end in events:
                self.flush.zero_()
                start.record()
                call()
                end.record()
            torch.cuda.synchronize(self.device)
            return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def timer_for(device: torch.device) -> Timer:
    """What times a whole operation on this device."""
    return EventTimer(device) if device.type == "cuda" else WallTimer(device)


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)

    def record(self) -> list[float]:
        return [self.low, self.median, self.high]


@dataclass
class Rounds:
    """Seconds a call, for every contender and round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def time(self, name: str) -> Spread:
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, over: str) -> Spread:
        """How many times longer `over` took than `name`, round by round."""
        return Spread.of([b / a for a, b in zip(self.seconds[name], self.seconds[over], strict=True)])


def interleave(
    contenders: Mapping[str, Call],
    timer: Timer,
    seconds: float = 2.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    clock: Callable[[], float] = time.perf_counter,
) -> Rounds:
    """Times contenders in turn, each round from another one, for about `seconds` in all.

    Args:
        contenders: name -> call; already warm.
        timer: seconds of one call.
        seconds: when to stop, after at least `min_rounds`.
    """
    names = list(contenders)
    once = {name: min(timer(contenders[name], 1) for _ in range(2)) for name in names}
    # A turn is a few milliseconds, or one call where that is longer.
    turn = min(max(seconds / (len(names) * 40), 5e-4), 2e-2)
    repeats = {name: max(1, round(turn / max(t, 1e-7))) for name, t in once.items()}
    rounds = Rounds({name: [] for name in names})
    start = clock()
    for i in range(max_rounds):
        if i >= min_rounds and clock() - start >= seconds:
            break
        first = i % len(names)
        order = names[first:] + names[:first]
        for name in order if i // len(names) % 2 == 0 else reversed(order):
            rounds.seconds[name].append(timer(contenders[name], repeats[name]))
    return rounds


def throughput(nbytes: int, seconds: float) -> float:
    """GB/s."""
    return nbytes / seconds / 1e9


def floor_probe(nbytes: int, device: torch.device) -> Call:
    """A call that moves this many bytes as fast as the device can, in torch.

    A three-tensor add on a CPU, which reads two and writes one as a loss with its gradient does; a copy on a GPU.
    """
    if device.type == "cuda":
        source = torch.ones(max(1, nbytes // 2), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)
    a = torch.ones(max(1, nbytes // 12), device=device)
    b, out = torch.ones_like(a), torch.zeros_like(a)
    return lambda: torch.add(a, b, out=out)
