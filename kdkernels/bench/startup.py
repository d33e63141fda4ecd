"""Costs that come once: importing the package, and the first call of each backend, in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import torch

from kdkernels import backends

_PROGRAM = """
import json, sys, time
backend, device = sys.argv[1:]
start = time.perf_counter()
import torch
torch_seconds = time.perf_counter() - start
start = time.perf_counter()
import kdkernels
package_seconds = time.perf_counter() - start
calls = []
if backend:
    s, t = (torch.randn(64, 100, device=device) for _ in range(2))
    s.requires_grad_()
    torch.autograd.grad((s * 2).sum(), s)  # torch's own first time
    for _ in range(2):
        start = time.perf_counter()
        torch.autograd.grad(kdkernels.kl_div(s, t, temperature=4.0, backend=backend), s)
        if device == "cuda":
            torch.cuda.synchronize()
        calls.append(time.perf_counter() - start)
print(json.dumps([torch_seconds, package_seconds, *calls]))
"""


def _fresh(backend: str, device: str, cache: str) -> list[float]:
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    command = [sys.executable, "-c", _PROGRAM, backend, device]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(device: torch.device) -> dict[str, float]:
    """Seconds, by what they are for."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        imports = [_fresh("", device.type, cache) for _ in range(3)]
        found["import torch"] = min(torch_seconds for torch_seconds, _ in imports)
        found["import kdkernels, over torch"] = min(package for _, package in imports)
        for backend in backends.order(device.type):
            if backend == "reference" or backends.unavailable(backend, device.type) is not None:
                continue
            found[f"first kl_div, {backend}"] = _fresh(backend, device.type, cache)[2]
            if backend == "triton":  # once more, with its compiled kernels on disk
                found[f"first kl_div, {backend}, cached on disk"] = _fresh(backend, device.type, cache)[2]
    return found
