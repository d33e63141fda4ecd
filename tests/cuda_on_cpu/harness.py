"""Calls entry points of csrc/*/cuda.cu in a runner process, as if they were native functions."""

from __future__ import annotations

import atexit
import contextlib
import copy
import ctypes
import os
import re
import select
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from . import build

unavailable = build.unavailable

DTYPES = {
    torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int64: 3,
    torch.int32: 4, torch.uint8: 5, torch.bool: 5, torch.float64: 6,
}  # fmt: skip
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=32:detect_stack_use_after_return=0:exitcode=99",
    "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=98",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
}


# Frames below the kernel, which are the same in every report.
_FOREIGN = re.compile(r"^\s*#\d+ .*(std::|kdk::make_entry|kdk::call|cudaLaunchKernelEx|runner\.cpp|libc_start|_start )")


class SanitizerError(AssertionError):
    """A sanitizer, or a crash, ended the runner. `kind` is the sanitizer's word, `report` all it said."""

    def __init__(self, name: str, report: str) -> None:
        found = re.search(r"(?:SUMMARY|ERROR|WARNING): \w+Sanitizer: ([\w-]+(?: race)?)", report)
        undefined = re.search(r"runtime error: (.*)", report)
        self.kind = found[1] if found else undefined[1] if undefined else "crash"
        self.report = report
        lines = [line for line in report.splitlines() if not _FOREIGN.search(line)]
        super().__init__("\n".join([f"{name}: {self.kind}", *lines])[:8000])


class NotDeterministic(AssertionError):
    """Two orders of threads gave different bits."""


class StrayWrite(AssertionError):
    """A kernel wrote between the elements of a strided tensor."""


class KernelTimeout(AssertionError):
    """No answer in time: a loop that never ends, or one that waits for another block."""


ERRORS = {
    "invalid_argument": ValueError,
    "out_of_range": IndexError,
    "runtime_error": RuntimeError,
    "not_deterministic": NotDeterministic,
}


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<I", len(data)) + data


class _Runner:
    """One process; it is started at the first request, and again after a crash."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, name: str, request: bytes, timeout: float) -> memoryview:
        if self.process is None or self.process.poll() is not None:
            self.close()
            self.words = tempfile.TemporaryFile()
            self.process = subprocess.Popen(
                [self.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.words,
                env={**os.environ, **{k: f"{v}:{os.environ.get(k, '')}".rstrip(":") for k, v in OPTIONS.items()}},
            )  # fmt: skip
        deadline = time.monotonic() + timeout
        try:
            self.process.stdin.write(struct.pack("<Q", len(request)) + request)
            self.process.stdin.flush()
            size = self._read(8, deadline)
            return self._read(struct.unpack("<Q", size)[0], deadline)
        except (BrokenPipeError, EOFError):
            self.process.wait()
            self.words.seek(0)
            report = self.words.read().decode(errors="replace")
            code = self.process.returncode
            self.close()
            raise SanitizerError(name, report or f"the runner ended with code {code} and no words") from None
        except TimeoutError:
            self.close()
            raise KernelTimeout(f"{name}: no answer within {timeout:g} s") from None
        except BaseException:  # an interrupt would leave an answer that nobody asked for
            self.close()
            raise

    def _read(self, size: int, deadline: float) -> memoryview:
        data = bytearray(size)
        view, got, fd = memoryview(data), 0, self.process.stdout.fileno()
        while got < size:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            n = os.readv(fd, [view[got:]])
            if n == 0:
                raise EOFError
            got += n
        return view

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            self.words.close()
            self.process = None


class _Buffers:
    """The memory that a call's tensors cover. Tensors that share bytes share a buffer."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        spans = sorted((t.data_ptr(), t.data_ptr() + _extent(t)) for t in tensors)
        self.spans: list[list[int]] = []
        for low, high in spans:
            if self.spans and low < self.spans[-1][1]:
                self.spans[-1][1] = max(self.spans[-1][1], high)
            else:
                self.spans.append([low, high])
        self.before = [ctypes.string_at(low, high - low) for low, high in self.spans]
        self.tensors = tensors

    def place(self, t: torch.Tensor) -> tuple[int, int]:
        for i, (low, high) in enumerate(self.spans):
            if low <= t.data_ptr() < high:
                return i, t.data_ptr() - low
        raise AssertionError("tensor without a buffer")

    def packed(self) -> bytes:
        parts = [struct.pack("<I", len(self.spans))]
        for (low, _), data in zip(self.spans, self.before, strict=True):
            parts += [struct.pack("<QI", len(data), low % 256), data]
        return b"".join(parts)

    def write_back(self, name: str, answer: memoryview) -> None:
        at = 0
        for i, (low, high) in enumerate(self.spans):
            changed = answer[at]
            at += 1
            if not changed:
                continue
            after = answer[at : at + high - low]
            at += high - low
            self._check_gaps(name, i, after)
            ctypes.memmove(low, bytes(after), high - low)

    def _check_gaps(self, name: str, i: int, after: memoryview) -> None:
        own = torch.zeros(len(after), dtype=torch.bool)
        for t in self.tensors:
            index, at = self.place(t)
            if index != i:
                continue
            item = t.element_size()
            if t.numel() * item == len(after) and 0 not in t.stride():
                return  # dense
            shape = [1 if stride == 0 else size for size, stride in zip(t.shape, t.stride(), strict=True)]
            own.as_strided([*shape, item], [*(s * item for s in t.stride()), 1], at).fill_(True)
        changed = torch.frombuffer(bytearray(after), dtype=torch.uint8) != torch.frombuffer(
            bytearray(self.before[i]), dtype=torch.uint8
        )
        stray = (changed & ~own).nonzero()
        if len(stray):
            raise StrayWrite(f"{name}: wrote {len(stray)} bytes between the elements of a tensor, the first at byte "
                             f"{int(stray[0])} of its storage")  # fmt: skip


def _extent(t: torch.Tensor) -> int:
    return (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size()


class Library:
    """All entry points of all families, compiled for the CPU under one sanitizer.

    `call` takes what kdkernels._C takes, but tensors as they are: CPU tensors of any strides, None, ints,
    floats and bools. What the kernel wrote is in the tensors when it returns. It can stand as a backend:
    `kdkernels.backends.register_library("cuda_on_cpu", Library())`.
    """

    def __init__(
        self,
        sanitizer: str = "address",
        families: dict[str, Path] | None = None,
        seeds: int | None = None,
        timeout: float | None = None,
        first_seed: int | None = None,
    ) -> None:
        self.sanitizer = sanitizer
        self.families = build.families() if families is None else families
        self.seeds = seeds or int(os.environ.get("KDK_CPU_SEEDS", "1" if sanitizer == "thread" else "4"))
        self.timeout = timeout or float(os.environ.get("KDK_CPU_TIMEOUT", "300"))
        self.first_seed = int(os.environ.get("KDK_CPU_FIRST_SEED", "0")) if first_seed is None else first_seed
        self._environment: dict[str, str] = {}
        self._runners: dict[str, _Runner] | None = None
        self._family_of: dict[str, str] = {}
        self._under_tsan: Library | None = None
        atexit.register(self.close)

    def __contains__(self, name: str) -> bool:
        return name in self.entries()

    def context(self, tensor: torch.Tensor) -> tuple[int, int]:
        """The trailing arguments of an entry, device and stream, as kdkernels' own libraries give them."""
        return 0, 0

    def _start(self) -> dict[str, _Runner]:
        if self._runners is None:
            built = build.build(self.families, self.sanitizer)
            runners = {family: _Runner(path) for family, path in built.items()}
            for family, runner in runners.items():
                answer = runner.ask(family, self._header("", 0) + struct.pack("<II", 0, 0), self.timeout)
                at = 1
                while at < len(answer):
                    (size,) = struct.unpack_from("<I", answer, at)
                    entry = bytes(answer[at + 4 : at + 4 + size]).decode()
                    at += 4 + size
                    if entry in self._family_of:
                        raise RuntimeError(f"{entry} is exported by {self._family_of[entry]} and by {family}")
                    self._family_of[entry] = family
            self._runners = runners
        return self._runners

    def _header(self, name: str, seeds: int) -> bytes:
        parts = [struct.pack("<I", len(self._environment))]
        parts += [_text(key) + _text(value) for key, value in self._environment.items()]
        first = self.first_seed & ~1  # the two of a pair are each other's reverse
        return b"".join(parts) + struct.pack("<IQ", seeds, first) + _text(name)

    def entries(self) -> list[str]:
        """The names that `call` knows."""
        self._start()
        return sorted(self._family_of)

    def call(self, name: str, *args: object, seeds: int | None = None) -> None:
        """Runs an entry point under several orders of threads, which must agree to the bit."""
        runners = self._start()
        if name not in self._family_of:
            raise AttributeError(f"no entry point is called {name}; there are: {', '.join(self.entries())}")
        args = tuple(a.materialise() if hasattr(a, "materialise") else a for a in args)  # kdkernels' View
        for i, a in enumerate(args):
            if isinstance(a, torch.Tensor) and (a.device.type != "cpu" or a.dtype not in DTYPES):
                raise TypeError(f"argument {i} must be a CPU tensor of a known dtype, got {a.dtype} on {a.device}")
        buffers = _Buffers([a for a in args if isinstance(a, torch.Tensor) and a.numel()])
        parts = [self._header(name, seeds or self.seeds), buffers.packed(), struct.pack("<I", len(args))]
        for i, a in enumerate(args):
            if a is None:
                parts.append(b"\0")
            elif isinstance(a, torch.Tensor):
                index, offset = buffers.place(a) if a.numel() else (0xFFFFFFFF, 0)
                dims = [*a.shape, *a.stride()]
                parts.append(struct.pack(f"<BIQii{len(dims)}q", 3, index, offset, DTYPES[a.dtype], a.dim(), *dims))
            elif isinstance(a, float):
                parts.append(struct.pack("<Bd", 2, a))
            elif isinstance(a, int):
                parts.append(struct.pack("<Bq", 1, a))
            else:
                raise TypeError(f"argument {i} must be a tensor, None or a number, got {type(a).__name__}")
        answer = runners[self._family_of[name]].ask(name, b"".join(parts), self.timeout)
        if answer[0]:
            buffers.write_back(name, answer[1:])
            return
        size = struct.unpack_from("<I", answer, 1)[0]
        kind = bytes(answer[5 : 5 + size]).decode()
        raise ERRORS[kind](bytes(answer[9 + size :]).decode(errors="replace"))

    def call_under_tsan(self, name: str, *args: object) -> None:
        """The same call once under ThreadSanitizer, on copies: keep it near 64 threads and a few blocks."""
        if self._under_tsan is None:
            self._under_tsan = self if self.sanitizer == "thread" else Library("thread", self.families)
        self._under_tsan._environment = self._environment
        self._under_tsan.call(name, *copy.deepcopy(args))

    @contextlib.contextmanager
    def pretend(self, **device: int) -> Iterator[None]:
        """Another device for a while: `pretend(arch=80)`, `pretend(sms=2, smem=99 * 1024, max_cluster=8)`."""
        before = self._environment
        self._environment = {**before, **{f"KDK_CPU_{key.upper()}": str(value) for key, value in device.items()}}
        try:
            yield
        finally:
            self._environment = before

    def close(self) -> None:
        for runner in (self._runners or {}).values():
            runner.close()
        if self._under_tsan not in (None, self):
            self._under_tsan.close()
