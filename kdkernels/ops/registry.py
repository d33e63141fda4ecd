"""What the tests sweep, the bench times and `kdkernels check` verifies: every family's spec.py.

A family declares a `SPEC`; nothing else lists it. A case is one way to call one public loss: how to
make its inputs, which of them get gradients, and the plain PyTorch lines that people write today,
which are both the yardstick of accuracy (in float32) and the baseline of speed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import kdkernels.ops

Shape = tuple[int, ...]
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One variant of one public loss.

    Attributes:
        name: unique, e.g. "kl_div-T4" or "distillation_loss-smooth".
        function: the public loss. Called as function(**inputs, **options, backend=...).
        make: make(shape, generator) -> named input tensors on the CPU, floating ones in float32. Callers cast,
            move, slice and restride the floating ones named in `grads`; the rest they only move.
        options: further keyword arguments.
        eager: eager(**inputs, **options) in plain PyTorch, as users write it; None where nobody would.
        grads: the inputs that get a gradient.
        shapes: small and odd ones, for tests.
        bench: real ones, for benchmarks on a CPU: label -> shape.
        bench_gpu: the same for a GPU.
        floor_bytes: floor_bytes(shape, itemsize, backward) -> the least traffic that the mathematics allows.
        floor_work: floor_work(inputs, backward) -> a call that does what no implementation can do without, where that
            is not traffic but matrix products.
        bench_dtypes: what to time.
        bench_grads: the inputs that get a gradient when timed; default: the first of `grads` (a teacher is frozen).
        oracle_rows: how many entries of the first axis float64 is asked for before timing, where its cost grows faster
            than the inputs.
        headline: whether the README's table shows it.
    """

    name: str
    function: Callable[..., torch.Tensor]
    make: Callable[[Shape, torch.Generator], Inputs]
    options: Mapping[str, Any] = field(default_factory=dict)
    eager: Callable[..., torch.Tensor] | None = None
    grads: tuple[str, ...] = ("student_logits", "teacher_logits")
    shapes: tuple[Shape, ...] = ()
    bench: Mapping[str, Shape] = field(default_factory=dict)
    bench_gpu: Mapping[str, Shape] = field(default_factory=dict)
    floor_bytes: Callable[[Shape, int, bool], int] | None = None
    floor_work: Callable[[Inputs, bool], Callable[[], Any]] | None = None
    bench_dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    bench_grads: tuple[str, ...] = ()
    oracle_rows: int | None = None
    headline: bool = False


@dataclass(frozen=True)
class Spec:
    """One kernel family: its cases, backends and dtypes."""

    family: str
    backends: tuple[str, ...]
    cases: tuple[Case, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)

    def case(self, name: str) -> Case:
        return next(c for c in self.cases if c.name == name)


@functools.cache
def specs() -> tuple[Spec, ...]:
    """The spec of every family, found by looking for kdkernels/ops/<family>/spec.py."""
    found = []
    for module in pkgutil.iter_modules(kdkernels.ops.__path__, "kdkernels.ops."):
        if module.ispkg and importlib.util.find_spec(f"{module.name}.spec"):
            found.append(importlib.import_module(f"{module.name}.spec").SPEC)
    return tuple(found)
