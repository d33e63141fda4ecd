"""Where the kernels can run here: each backend with the device of its tensors, and the CUDA kernels on the CPU."""

from __future__ import annotations

import dataclasses
import os
import secrets
import zlib
from typing import Any

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
# In the environment, so that the workers of pytest-xdist draw from the same.
SEED = int(os.environ.setdefault("KDKERNELS_SEED", str(secrets.randbits(32))))

import cuda_on_cpu  # noqa: E402

from kdkernels import backends  # noqa: E402
from kdkernels.native import View  # noqa: E402


class CudaOnCpu:
    """csrc/*/cuda.cu, compiled by g++ under AddressSanitizer, as a backend for CPU tensors.

    It runs under two orders of threads per call, other ones with every seed; test_cuda_on_cpu.py runs more.
    """

    def __init__(self) -> None:
        self._library: Any = None

    def __bool__(self) -> bool:
        return bool(cuda_on_cpu.build.families()) and cuda_on_cpu.unavailable() is None

    def __contains__(self, name: str) -> bool:
        return name in self._start().entries()

    def _start(self) -> Any:
        if self._library is None:
            os.environ.setdefault("KDK_CPU_FIRST_SEED", str(SEED))
            self._library = cuda_on_cpu.Library(seeds=2)
        return self._library

    def context(self, tensor: torch.Tensor) -> tuple[int, int]:
        return 0, 0  # device, stream

    def call(self, name: str, *args: Any) -> None:
        self._start().call(name, *(a.materialise() if isinstance(a, View) else a for a in args))


backends.register_library("cuda_on_cpu", CudaOnCpu())


@dataclasses.dataclass(frozen=True)
class Target:
    """A backend and the device that its tensors live on."""

    backend: str
    device: str

    @property
    def slow(self) -> bool:
        """Interpreted or emulated: give it few and small shapes."""
        return self.backend == "cuda_on_cpu" or (self.backend == "triton" and self.device == "cpu")

    @property
    def fused(self) -> bool:
        return self.backend != "reference"

    def skip_reason(self) -> str | None:
        if self.backend == "cuda_on_cpu" and not backends.library("cuda_on_cpu"):
            return cuda_on_cpu.unavailable() or "csrc has no cuda.cu"
        return backends.unavailable(self.backend, self.device)

    def __str__(self) -> str:
        return self.backend


if GPU:
    TARGETS = (Target("cuda", "cuda"), Target("triton", "cuda"), Target("reference", "cuda"), Target("cpu", "cpu"))
else:
    TARGETS = tuple(Target(name, "cpu") for name in ("cpu", "triton", "cuda_on_cpu", "reference"))
# KDKERNELS_TEST_BACKENDS=cpu,triton runs the tests of these only.
if chosen := os.environ.get("KDKERNELS_TEST_BACKENDS"):
    TARGETS = tuple(t for t in TARGETS if t.backend in chosen.split(","))


def seeded(text: str) -> torch.Generator:
    """A generator that depends on this run's seed and on `text`."""
    # torch keeps 32 bits of a seed.
    return torch.Generator().manual_seed(zlib.crc32(f"{SEED} {text}".encode()))
