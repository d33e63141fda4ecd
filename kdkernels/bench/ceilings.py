"""What the device can do at most, measured: memory bandwidth and matrix products.

python -m kdkernels.bench.ceilings [--device cuda] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from kdkernels.bench import select
from kdkernels.bench.environment import describe, write_json
from kdkernels.bench.timing import Spread, timer_for


def bandwidth(device: torch.device, nbytes: int | None = None) -> dict[str, float]:
    """GB/s, reads and writes counted, of a copy and of a three-tensor add on buffers far larger than any cache."""
    n = (nbytes or (2**30 if device.type == "cuda" else 2**27)) // 4
    a = torch.randn(n, device=device)
    b, out = torch.randn(n, device=device), torch.zeros(n, device=device)
    timer = timer_for(device)
    work = {"copy": (lambda: out.copy_(a), 8 * n), "add": (lambda: torch.add(a, b, out=out), 12 * n)}
    found = {}
    for name, (call, moved) in work.items():
        timer(call, 2)
        found[f"{name} GB/s"] = moved / Spread.of([timer(call, 1) for _ in range(9)]).median / 1e9
    return found


def gemm(device: torch.device, n: int | None = None) -> dict[str, float]:
    """TFLOP/s of a square matrix product on random data."""
    n = n or (8192 if device.type == "cuda" else 1024)
    timer = timer_for(device)
    found = {}
    for dtype in (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        call = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)  # noqa: E731
        timer(call, 3)
        name = str(dtype).removeprefix("torch.")
        found[f"gemm {name} TFLOP/s"] = 2 * n**3 / Spread.of([timer(call, 3) for _ in range(5)]).median / 1e12
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=select.default_device())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    found = {**bandwidth(args.device), **gemm(args.device)}
    for name, value in found.items():
        print(f"{name:24} {value:10.4g}")
    if args.json:
        write_json(args.json, {"schema": 1, "environment": describe(args.device), "ceilings": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
