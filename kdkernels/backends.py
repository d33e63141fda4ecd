"""Which code runs an operation: names, what is available here and why not, and the choice.

A backend is asked for, strongest first, by the `backend=` argument of a call, by
`use_backend(...)`, or by the environment variable KDKERNELS_BACKEND, which is read once, when
kdkernels is imported; "auto" takes the best one that the tensors' device and dtype allow.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from kdkernels import native

BACKENDS = ("cuda", "triton", "cpu", "reference")
FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class BackendError(RuntimeError):
    """The backend that was asked for cannot run here; the message says why."""


forced: ContextVar[str | None] = ContextVar("kdkernels_backend", default=None)
environment = os.environ.get("KDKERNELS_BACKEND") or "auto"
_forced_while_tracing: str | None = None  # the same: Dynamo reads and guards a global, and no ContextVar
_libraries: dict[str, Any] = {}


def register_library(name: str, library: Any, device: str = "cpu") -> None:
    """Adds a native backend under a new name. `library` has `call` and `context`, as NativeLibrary does."""
    _libraries[name] = library
    _devices[name] = device
    _unavailable.cache_clear()


def library(backend: str) -> Any:
    """What runs the native entry points of `backend`."""
    if backend not in _libraries:
        _libraries[backend] = native.NativeLibrary(backend)
    return _libraries[backend]


_devices = {"cuda": "cuda", "cpu": "cpu"}  # where a native backend's tensors live


@functools.cache
def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result  # Dynamo asks at trace time, instead of tracing how it is found out
def unavailable(backend: str, device: str) -> str | None:
    """Why `backend` cannot run on tensors of this device type, or None where it can."""
    return _unavailable(backend, device)


@functools.cache
def _unavailable(backend: str, device: str) -> str | None:
    if backend == "reference":
        return None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        if device == "cuda" or (device == "cpu" and _interpreting()):
            return None
        return f"triton runs on GPU tensors, and these are on {device!r} (TRITON_INTERPRET=1 interprets it on the CPU)"
    if backend not in _devices:
        return f"there is no backend of that name; choose one of {', '.join(('auto', *BACKENDS))}"
    if device != _devices[backend]:
        return f"the {backend} backend runs on {_devices[backend]!r} tensors, and these are on {device!r}"
    if not library(backend):
        info = native.build_info()
        reason = info.get("native") or info.get(backend) or f"the extension has no {backend} kernels"
        return f"the native {backend} kernels are not in this installation: {reason}"
    if backend == "cuda":
        if torch.version.hip is not None:
            return "this is a ROCm build of torch; use triton"
        if torch.cuda.get_device_capability() < (8, 0):
            return "the CUDA kernels need compute capability 8.0 or newer"
        with _disable_current_modes():  # a real tensor, also where fake ones are being traced
            return does_not_start(library(backend), torch.ones(1, device=device))
    return None


def does_not_start(kernels: Any, one: torch.Tensor) -> str | None:
    """Why not even the smallest kernel starts, or None: a driver older than the toolkit says so at the first launch only."""
    try:
        kernels.call("scale_in_place", one, one, *kernels.context(one))
    except RuntimeError as error:
        return (
            f"the CUDA kernels do not start here: {error} (update the driver, or build with the toolkit that it is of)"
        )
    return None


def requested() -> str:
    """The backend asked for by use_backend or the environment, else "auto"."""
    return (_forced_while_tracing if torch.compiler.is_compiling() else forced.get()) or environment


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every kdkernels operation inside the `with` on one backend.

    Args:
        name: "auto", "cuda", "triton", "cpu" or "reference".

    Raises:
        BackendError: at the first operation that the backend cannot run, with the reason.
        ValueError: for an unknown name.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a backend's, got {type(name).__name__}")
    if name != "auto" and name not in BACKENDS and name not in _libraries:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(('auto', *BACKENDS))}")
    global _forced_while_tracing
    token, before = forced.set(name), _forced_while_tracing
    _forced_while_tracing = name
    try:
        yield
    finally:
        forced.reset(token)
        _forced_while_tracing = before


@functools.cache
def _note_fallback(operation: str, backend: str) -> None:
    warnings.warn(f"{operation} has no {backend} kernel; another backend runs it", stacklevel=4)


def order(device: str) -> tuple[str, ...]:
    """The backends that "auto" tries for tensors of this device type, best first."""
    return ("cpu", "reference") if device == "cpu" else ("cuda", "triton", "reference")


def transformed() -> bool:
    """Inside torch.func's transforms or forward-mode differentiation, of which a kernel's backward knows nothing."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def resolve(
    operation: str,
    tensors: tuple[torch.Tensor, ...],
    backend: str = "auto",
    supported: tuple[str, ...] = BACKENDS,
) -> str:
    """The backend that runs `operation` on these tensors.

    Args:
        operation: its public name, for messages.
        tensors: the floating-point inputs, all on one device.
        backend: the call's own wish.
        supported: the backends that have this operation.

    Raises:
        BackendError: the backend asked for cannot run here.
        TypeError: it is no name.
    """
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a name, got {type(backend).__name__}")
    if backend == "auto":
        backend = requested()
    if not torch.compiler.is_compiling() and transformed():
        if backend in ("auto", "reference"):
            return "reference"
        raise BackendError(
            f"{operation} cannot run on backend {backend!r}: kernels have neither torch.func's transforms nor forward-mode "
            "derivatives; 'reference' has, and 'auto' takes it there"
        )
    device = tensors[0].device.type
    fused = True
    for t in tensors:
        fused = fused and t.dtype in FUSED_DTYPES
    if backend == "auto":
        return _best(device, supported) if fused else "reference"
    # A library under another name runs the CUDA kernels, and has what these have.
    kind = "cuda" if backend in _libraries and backend not in BACKENDS else backend
    if kind in BACKENDS and kind not in supported:
        _note_fallback(operation, backend)
        return _best(device, supported) if fused else "reference"
    reason = unavailable(backend, device)
    if reason is None and not fused and backend != "reference":
        dtypes = ", ".join(str(t.dtype).removeprefix("torch.") for t in tensors)
        reason = f"kernels take float32, float16 and bfloat16, and these are {dtypes}; float64 runs on 'reference'"
    if reason is not None:
        raise BackendError(f"{operation} cannot run on backend {backend!r}: {reason}")
    return backend


def _best(device: str, supported: tuple[str, ...]) -> str:
    """The first backend in `order` that has the operation and runs here."""
    for candidate in order(device):
        if candidate in supported and unavailable(candidate, device) is None:
            return candidate
    return "reference"
