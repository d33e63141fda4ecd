"""Every launch of a Triton kernel through Triton's own front end, as on a GPU, with none there.

Run by test_triton_launches.py in a process of its own, where Triton does not interpret. A launch with real arguments
is not what `aot_signatures` compile: integers of 1 become constants, addresses and sizes are taken by their alignment,
large ones are 64 bits wide. Here the launchers run on CPU tensors, Triton specialises their arguments as it does for a
GPU, and each kernel is made into IR (with --full: into machine code) and not started. What a launch would refuse, this
refuses; the numbers are not looked at.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kdkernels import backends
from kdkernels.ops.registry import Case, Shape, specs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class NoGpu:
    """What the launchers ask of a driver."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class Launches:
    """Stands in for JITFunction.run and the compiler; counts what it saw."""

    def __init__(self, target: GPUTarget, full: bool):
        self.full = full
        self.kernels: dict[str, set[Any]] = {}
        self.grids: list[tuple[int, ...]] = []
        self.compiler = triton.compiler.compile
        driver.set_active(NoGpu(target))
        real, binder = JITFunction.run, JITFunction.create_binder

        def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            assert all(0 <= n < limit for n, limit in zip(grid, (1 << 31, 1 << 16, 1 << 16))), f"a grid of {grid}"
            return real(kernel, *args, grid=grid, warmup=True, **options)

        def create_binder(kernel: JITFunction) -> Any:
            made = binder(kernel)
            kernel.compile = self.compile
            return made

        JITFunction.run, JITFunction.create_binder = run, create_binder

    def compile(self, source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> Any:
        self.kernels.setdefault(source.fn.__name__, set()).add(source.hash())
        if self.full:
            made = self.compiler(source, target=target, options=options)
            assert made.metadata.shared <= 163 * 1024, f"{made.metadata.shared} bytes of shared memory"
            return made
        from triton._C.libtriton import ir

        backend = make_backend(target)
        parsed, context = backend.parse_options(options), ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        return source.make_ir(
            target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context
        )


def shapes_of(case: Case, every: bool) -> list[Shape]:
    """The largest shape, with each of its sizes 1 in turn, and with all; or these of all shapes."""
    chosen = sorted(case.shapes, key=lambda shape: torch.Size(shape).numel())[0 if every else -1 :]
    found = []
    for shape in chosen:
        found += [shape, *((*shape[:i], 1, *shape[i + 1 :]) for i in range(len(shape))), (1,) * len(shape)]
    return list(dict.fromkeys(found))


def calls(families: list[str], every: bool) -> Iterator[tuple[str, Case, Shape, torch.dtype]]:
    turn = itertools.count()
    for spec in specs():
        if "triton" not in spec.backends or (families and spec.family not in families):
            continue
        for case in spec.cases:
            for shape in shapes_of(case, every):
                # Whichever comes next: a kernel's other dtypes meet the same sizes at another case.
                known = [d for d in DTYPES if d in spec.dtypes]
                for dtype in known if every else [known[next(turn) % len(known)]]:
                    yield spec.family, case, shape, dtype


def one(case: Case, shape: Shape, dtype: torch.dtype) -> None:
    try:
        inputs = case.make(shape, torch.Generator().manual_seed(0))
        wide = {n: x.double() if n in case.grads else x for n, x in inputs.items()}
        case.function(**wide, **case.options, backend="reference")
    except (ValueError, IndexError, RuntimeError):
        return  # a shape that this loss does not take
    inputs = {n: x.to(dtype).requires_grad_() if n in case.grads else x for n, x in inputs.items()}
    loss = case.function(**inputs, **case.options, backend="triton")
    torch.autograd.grad(loss, [inputs[n] for n in case.grads], torch.full_like(loss, 0.5), allow_unused=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--families", nargs="*", default=[])
    parser.add_argument("--every", action="store_true", help="all shapes and dtypes")
    parser.add_argument("--full", action="store_true", help="down to machine code")
    parser.add_argument("--arch", type=int, default=80)
    args = parser.parse_args()
    launches = Launches(GPUTarget("cuda", args.arch, 32), args.full)
    backends._unavailable = lambda backend, device: None
    problems, count = [], 0
    for family, case, shape, dtype in calls(args.families, args.every):
        count += 1
        try:
            one(case, shape, dtype)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            problems.append(f"{family}: {case.name} {tuple(shape)} {dtype}: {type(error).__name__}: {error} ({where})")
    seen = {name: len(found) for name, found in sorted(launches.kernels.items())}
    print(json.dumps({"calls": count, "kernels": seen, "problems": problems}, indent=1))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
